/* SPDX-License-Identifier: Apache-2.0 */
/*
 * engine.c: what the three engines do differently to a page. The order of the steps is evict.c's and cycle.py's.
 *
 *   stock   deactivation unmaps, the page cache keeps the bytes; who is mapped again was touched. Write-protection holds
 *           writers while a page leaves: on an unmapped page it is a marker.
 *           Of private anonymous memory: protected by the kernel alone, moved out while it leaves (stage.c).
 *   rfc     the same, unmapped by UFFDIO_DEACTIVATE; while pages leave, the context is in sync mode, so that readers wait,
 *           too. SET_MODE does not drain faults that are under way, so the marker stays what an eviction relies on.
 *   rwp     deactivation protects the page where it is mapped (RWPROTECT); who lost the protection was touched. While pages
 *           leave, the context is in sync mode: SET_MODE returns when no fault that saw the old mode is left.
 */
#include "internal.h"

static int again(int (*call)(int, uint64_t, uint64_t), struct tierd_guest *g, uint64_t page, uint64_t count)
{
	int error = -EAGAIN;

	for (int i = 0; error == -EAGAIN && i < AGAIN_MAX; i++)
		error = call(g->uffd, address_of(g, page), count * g->page_bytes);
	return error;
}

static int marker_hold(struct tierd_guest *g, uint64_t page, uint64_t count)
{
	return again(sys_uffd_protect, g, page, count);
}

static int marker_release(struct tierd_guest *g, uint64_t page, uint64_t count)
{
	return again(sys_uffd_unprotect, g, page, count);
}

/* Range after range, each of them whole; how far it came is in `ret`. */
static int deactivate_by(int (*call)(int, uint64_t, uint64_t), struct tierd_guest *g, struct iovec *ranges,
			 size_t count, struct tierd_pass *ret)
{
	for (size_t i = 0; i < count; i++) {
		int error = -EAGAIN;

		for (int k = 0; error == -EAGAIN && k < AGAIN_MAX; k++, ret->zap_calls++)
			error = call(g->uffd, (uintptr_t)ranges[i].iov_base, ranges[i].iov_len);
		if (error)
			return error;
		ret->zapped_pages += ranges[i].iov_len / g->page_bytes;
	}
	return 0;
}

/* Maps a page that the cache has. Its waiters are woken whatever the answer: EEXIST is a page that is mapped already, EFAULT one
 * that is a hole by now (they fault again, as MISSING); neither wakes by itself. */
static int map_cached(struct tierd_guest *g, uint64_t page)
{
	int error = sys_uffd_continue(g->uffd, address_of(g, page), g->page_bytes);

	if (error && error != -ESRCH)
		error = sys_uffd_wake(g->uffd, address_of(g, page), g->page_bytes);
	return error;
}

/* --- stock -------------------------------------------------------------------------------------------------------------- */

static ssize_t zap_inside(struct tierd_guest *g, const struct iovec *range)
{
	uint64_t stopped_ns = 0;
	int error = may_enter(g);

	if (!error)
		error = sys_zap_inside(g->inject_tid, (uint64_t)(uintptr_t)range->iov_base, range->iov_len,
				       &stopped_ns);
	count_add(&g->count.inject_stops, 1);
	count_add(&g->count.inject_stopped_ns, stopped_ns);
	return error ? error : (ssize_t)range->iov_len;
}

static int stock_deactivate(struct tierd_guest *g, struct iovec *ranges, size_t count, struct tierd_pass *ret)
{
	size_t first = 0;

	while (first < count) {
		ssize_t n = g->zap == TIERD_ZAP_INJECT ? zap_inside(g, &ranges[first])
						       : sys_pageout(g->pidfd, ranges + first, count - first);

		ret->zap_calls++;
		/* from inside, EAGAIN is a VMM that is stopped (SIGSTOP), for as long as somebody likes */
		if (n == -EINTR || (n == -EAGAIN && g->zap != TIERD_ZAP_INJECT))
			continue;
		if (n <= 0)
			return n ? (int)n : -EIO;
		ret->zapped_pages += (uint64_t)n / g->page_bytes;
		while (first < count && (size_t)n >= ranges[first].iov_len)
			n -= (ssize_t)ranges[first++].iov_len;
		if (first < count && n) {
			ranges[first].iov_base = (char *)ranges[first].iov_base + n;
			ranges[first].iov_len -= (size_t)n;
		}
	}
	return 0;
}

static int stock_resolve(struct tierd_guest *g, uint64_t page, uint64_t flags)
{
	(void)flags;
	return sys_uffd_unprotect(g->uffd, address_of(g, page), g->page_bytes);
}

static const struct engine stock = {
	.mode = UFFDIO_REGISTER_MODE_WP,
	.mode_missing = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING,
	.scan = {.any_of = SYS_PAGE_PRESENT},
	.protects_fetched = true,
	.deactivate = stock_deactivate,
	.hold = marker_hold,
	.release = marker_release,
	.resolve = stock_resolve,
};

/*
 * Private anonymous memory: writes are seen, by the protection that the kernel lifts itself (UFFD_FEATURE_WP_ASYNC). Reads are not:
 * who is read is found out in the staging area. Pages are never held.
 */
static int stock_anon_deactivate(struct tierd_guest *g, struct iovec *ranges, size_t count, struct tierd_pass *ret)
{
	return deactivate_by(sys_uffd_protect, g, ranges, count, ret);
}

static const struct engine stock_anon = {
	.mode = UFFDIO_REGISTER_MODE_WP,
	.mode_missing = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING,
	.scan = {.all_of = SYS_PAGE_PRESENT /* holes are called written, too */, .any_of = SYS_PAGE_WRITTEN},
	.reads_unseen = true,
	.deactivate = stock_anon_deactivate,
	.resolve = stock_resolve,
};

/* --- rfc ---------------------------------------------------------------------------------------------------------------- */

static int rfc_deactivate(struct tierd_guest *g, struct iovec *ranges, size_t count, struct tierd_pass *ret)
{
	return deactivate_by(sys_rfc_deactivate, g, ranges, count, ret);
}

/* A hint of NUMA balancing in shared memory comes as a minor fault of a page that is mapped: to map it is EEXIST, and who is
 * woken faults again. Unmapped first, it is mapped without the hint. */
static int rfc_resolve(struct tierd_guest *g, uint64_t page, uint64_t flags)
{
	int error;

	if (!(flags & UFFD_PAGEFAULT_FLAG_MINOR))
		return stock_resolve(g, page, flags);
	error = sys_uffd_continue(g->uffd, address_of(g, page), g->page_bytes);
	if (!error)
		return 0;
	if (error == -EEXIST) {
		date_large(g, page); /* before it, as a kill may come between; and from its end on */
		error = sys_rfc_deactivate(g->uffd, address_of(g, page), g->page_bytes);
		date_large(g, page);
	}
	return error == -ESRCH ? error : map_cached(g, page);
}

static const struct engine rfc = {
	.mode = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MINOR,
	.mode_missing = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_MISSING,
	.scan = {.any_of = SYS_PAGE_PRESENT},
	.deactivate = rfc_deactivate,
	.hold = marker_hold,
	.release = marker_release,
	.resolve = rfc_resolve,
	.set_async = sys_rfc_set_async,
};

/* --- rwp ---------------------------------------------------------------------------------------------------------------- */

static int rwp_deactivate(struct tierd_guest *g, struct iovec *ranges, size_t count, struct tierd_pass *ret)
{
	return deactivate_by(sys_rwp_protect, g, ranges, count, ret);
}

/* Nothing: sync mode is the hold. */
static int rwp_hold(struct tierd_guest *g, uint64_t page, uint64_t count)
{
	(void)g, (void)page, (void)count;
	return 0;
}

/* A punch wakes nobody, and there is no marker to lift. */
static int rwp_release(struct tierd_guest *g, uint64_t page, uint64_t count)
{
	return sys_uffd_wake(g->uffd, address_of(g, page), count * g->page_bytes);
}

static int rwp_resolve(struct tierd_guest *g, uint64_t page, uint64_t flags)
{
	if (flags & UFFD_PAGEFAULT_FLAG_MINOR) /* in the cache and not mapped: there was nothing to protect */
		return map_cached(g, page);
	return sys_rwp_unprotect(g->uffd, address_of(g, page), g->page_bytes);
}

/* MINOR with MISSING, chunk by chunk: from when its pages may leave, no access to a page that is cached and not mapped may go
 * unseen, because such a page has no protection. */
static const struct engine rwp = {
	.mode = SYS_RWP_REGISTER_MODE,
	.mode_missing = SYS_RWP_REGISTER_MODE | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_MISSING,
	.scan = {.any_of = SYS_RWP_ACCESSED},
	.deactivate = rwp_deactivate,
	.hold = rwp_hold,
	.release = rwp_release,
	.resolve = rwp_resolve,
	.set_async = sys_rwp_set_async,
	.holds_mapped = true,
};

/* --- rfc and rwp, private anonymous memory ------------------------------------------------------------------------------ */

/* Reads are seen, and a move is atomic: whoever touches a page just then gets it back from the staging area. So nobody is ever held, and
 * the context stays in async mode. */

static int rfc_anon_resolve(struct tierd_guest *g, uint64_t page, uint64_t flags)
{
	(void)flags;
	return map_cached(g, page);
}

static const struct engine rfc_anon = {
	.mode = UFFDIO_REGISTER_MODE_MINOR,
	.mode_missing = UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_MISSING,
	.scan = {.inverted = SYS_RFC_DEACTIVATED, .all_of = SYS_PAGE_PRESENT, .any_of = SYS_RFC_DEACTIVATED},
	.deactivate = rfc_deactivate,
	.resolve = rfc_anon_resolve,
};

static const struct engine rwp_anon = {
	.mode = SYS_RWP_REGISTER_MODE,
	.mode_missing = SYS_RWP_REGISTER_MODE | UFFDIO_REGISTER_MODE_MISSING,
	.scan = {.all_of = SYS_PAGE_PRESENT, .any_of = SYS_RWP_ACCESSED},
	.deactivate = rwp_deactivate,
	.resolve = rwp_resolve,
};

static const struct engine *anon_engine_of(uint32_t number)
{
	static const struct engine *const engines[] = {
		[TIERD_ENGINE_STOCK] = &stock_anon, [TIERD_ENGINE_RWP] = &rwp_anon, [TIERD_ENGINE_RFC] = &rfc_anon};

	return number < sizeof(engines) / sizeof(engines[0]) ? engines[number] : NULL;
}

const struct engine *engine_of(uint32_t number, bool anon)
{
	if (anon)
		return anon_engine_of(number);
	switch (number) {
	case TIERD_ENGINE_STOCK:
		return &stock;
	case TIERD_ENGINE_RFC:
		return &rfc;
	case TIERD_ENGINE_RWP:
		return &rwp;
	default:
		return NULL;
	}
}
