/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store.c: what a tier is asked for. A file is sparse, and the offset of a page is its number times the page size; a pool (pool.c)
 * is in our memory.
 */
#include "internal.h"

enum { FILING_PAUSE_US = 50 }; /* a batch takes longer */

/* --- a store that misbehaves, for tests --------------------------------------------------------------------------------- */

void tierd_guest_set_store_faults(struct tierd_guest *g, const struct tierd_store_faults *faults)
{
	if (faults->seed) {
		g->store_faults = *faults;
		atomic_store(&g->store_faults_state, faults->seed);
	}
	atomic_store_explicit(&g->store_faults_on, faults->seed != 0, memory_order_release);
}

static bool misbehave(struct tierd_guest *g, uint32_t thousandths)
{
	uint64_t x;

	if (!thousandths)
		return false;
	x = atomic_fetch_add_explicit(&g->store_faults_state, 0x9e3779b97f4a7c15ull, memory_order_relaxed);
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return (x ^ x >> 31) % 1000 < thousandths;
}

static void dawdle(struct tierd_guest *g, uint32_t slow, uint32_t hang)
{
	if (misbehave(g, slow))
		sys_pause_us(g->store_faults.slow_us);
	if (misbehave(g, hang))
		sys_pause_us(g->store_faults.hang_us);
}

static ssize_t read_some(struct tierd_guest *g, int fd, void *to, size_t bytes, uint64_t offset)
{
	struct tierd_store_faults *f = &g->store_faults;
	ssize_t n;

	if (!atomic_load_explicit(&g->store_faults_on, memory_order_acquire))
		return sys_store_read(fd, to, bytes, offset);
	dawdle(g, f->read_slow, f->read_hang);
	if (misbehave(g, f->read_error))
		return -EIO;
	if (misbehave(g, f->read_short) && bytes > g->page_bytes)
		bytes = g->page_bytes;
	n = sys_store_read(fd, to, bytes, offset);
	if (n > 0 && misbehave(g, f->read_flip))
		((uint8_t *)to)[n / 2] ^= 0x10;
	return n;
}

static ssize_t write_some(struct tierd_guest *g, int fd, struct iovec *from, uint64_t offset)
{
	struct tierd_store_faults *f = &g->store_faults;

	if (!atomic_load_explicit(&g->store_faults_on, memory_order_acquire))
		return sys_store_write(fd, from, 1, offset);
	dawdle(g, f->write_slow, f->write_hang);
	if (misbehave(g, f->write_error))
		return -EIO;
	if (misbehave(g, f->write_short) && from->iov_len > g->page_bytes)
		from->iov_len = g->page_bytes;
	return sys_store_write(fd, from, 1, offset);
}

/* --- the store ---------------------------------------------------------------------------------------------------------- */

static int store_read(struct tierd_guest *g, unsigned int tier, uint64_t page, uint32_t count, void *to)
{
	size_t bytes = (size_t)count * g->page_bytes, done = 0;

	if (g->tiers[tier].fd < 0)
		return -ENODEV;
	while (done < bytes) {
		ssize_t n =
			read_some(g, g->tiers[tier].fd, (char *)to + done, bytes - done, page * g->page_bytes + done);

		if (n == -EINTR)
			continue;
		if (n < 0)
			return (int)n;
		if (!n)
			return -EIO; /* the file is shorter than what was written to it */
		done += (size_t)n;
	}
	return g->ciphers[tier] ? page_cipher_run(g->ciphers[tier], false, page, count, g->page_bytes, to, to) : 0;
}

int store_write(struct tierd_guest *g, unsigned int tier, uint64_t page, uint32_t count, const void *from)
{
	size_t bytes = (size_t)count * g->page_bytes, done = 0;

	while (done < bytes) {
		struct iovec part = {.iov_base = (char *)from + done, .iov_len = bytes - done};
		ssize_t n = write_some(g, g->tiers[tier].fd, &part, page * g->page_bytes + done);

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

/*
 * An error of the device comes when the kernel writes back, and is told once to a descriptor: to a sync or (NFS) to a write,
 * whoever's pages it was about. So one batch at a time is between its first write and the end of its sync. O_DIRECT has no such errors.
 */
void store_enter(struct tierd_guest *g, unsigned int tier)
{
	while (!(g->tiers[tier].flags & TIERD_SPACE_DIRECT) && atomic_exchange(&g->filing[tier], true))
		sys_pause_us(FILING_PAUSE_US);
}

void store_leave(struct tierd_guest *g, unsigned int tier)
{
	atomic_store(&g->filing[tier], false);
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

/* --- any tier ----------------------------------------------------------------------------------------------------------- */

static int pool_read_run(struct tierd_guest *g, struct pool_reader *reader, uint64_t page, uint32_t count, uint8_t *to)
{
	int error = reader ? 0 : -EBADMSG;

	for (uint32_t i = 0; !error && i < count; i++)
		error = pool_read(reader, page + i, to + (size_t)i * g->page_bytes);
	return error;
}

int tier_read(struct tierd_guest *g, struct pool_reader *reader, unsigned int tier, uint64_t page, uint32_t count,
	      void *to)
{
	struct tier_count *c = &g->tier_counts[tier];
	uint64_t began_ns = sys_now_ns(), ns;
	int error = tier_is_asked(g, tier)  ? -EAGAIN /* not by us */
		    : tier == TIER_STAGING  ? staged_read(g, page, count, to)
		    : tier_is_pool(g, tier) ? pool_read_run(g, reader, page, count, to)
					    : store_read(g, tier, page, count, to);

	if (error) {
		count_add(&c->read_errors, 1);
		return error;
	}
	ns = sys_now_ns() - began_ns;
	count_add(&c->read_pages, count);
	count_add(&c->read_sum_ns, ns);
	count_add(&c->read_buckets[bucket_of(ns)], 1);
	return 0;
}

int tier_discard(struct tierd_guest *g, unsigned int tier, uint64_t page, uint64_t count)
{
	if (tier_is_asked(g, tier)) {
		for (uint64_t i = page; i < page + count; i++)
			bit_set(g->garbage[tier], i); /* Python says so to the store: ask.c */
		return 0;
	}
	if (g->tiers[tier].fd < 0)
		return -ENODEV;
	if (!tier_is_pool(g, tier))
		return sys_store_discard(g->tiers[tier].fd, page * g->page_bytes, count * g->page_bytes);
	for (uint64_t i = 0; g->pool && i < count; i++)
		pool_free(g->pool, page + i);
	return 0;
}
