/* SPDX-License-Identifier: Apache-2.0 */
/* store.c: a tier that is a sparse file: the offset of a page is its number times the page size. */
#include "internal.h"

int store_read(struct tierd_guest *g, unsigned int tier, uint64_t page, uint32_t count, void *to)
{
	size_t bytes = (size_t)count * g->page_bytes, done = 0;

	if (g->tiers[tier].fd < 0)
		return -ENODEV;
	while (done < bytes) {
		ssize_t n =
			sys_store_read(g->tiers[tier].fd, (char *)to + done, bytes - done, page * g->page_bytes + done);

		if (n == -EINTR)
			continue;
		if (n < 0)
			return (int)n;
		if (!n)
			return -EIO; /* the file is shorter than what was written to it */
		done += (size_t)n;
	}
	return 0;
}

int store_write(struct tierd_guest *g, unsigned int tier, uint64_t page, uint32_t count, const void *from)
{
	size_t bytes = (size_t)count * g->page_bytes, done = 0;

	while (done < bytes) {
		struct iovec part = {.iov_base = (char *)from + done, .iov_len = bytes - done};
		ssize_t n = sys_store_write(g->tiers[tier].fd, &part, 1, page * g->page_bytes + done);

		if (n == -EINTR)
			continue;
		if (n < 0)
			return (int)n;
		if (!n || n % g->page_bytes) /* a device that takes parts of pages is a device that is full or broken */
			return -EIO;
		done += (size_t)n;
	}
	return 0;
}

/* A write that returned is not stored: O_DIRECT, or a sync before anything depends on it. */
int store_settle(struct tierd_guest *g, unsigned int tier, uint64_t first_page, uint64_t end_page)
{
	struct tierd_tier *t = &g->tiers[tier];
	int error = 0;

	if (!(t->flags & TIERD_SPACE_DIRECT))
		error = sys_store_sync(t->fd);
	if (!error && (t->flags & TIERD_SPACE_DROP_CACHE))
		error = sys_store_drop_cache(t->fd, first_page * g->page_bytes,
					     (end_page - first_page) * g->page_bytes);
	return error;
}

int store_discard(struct tierd_guest *g, unsigned int tier, uint64_t page, uint64_t count)
{
	if (g->tiers[tier].fd < 0)
		return -ENODEV;
	return sys_store_discard(g->tiers[tier].fd, page * g->page_bytes, count * g->page_bytes);
}
