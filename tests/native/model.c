/* SPDX-License-Identifier: Apache-2.0 */
/* model.c: the model kernel: see model.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "content.h"
#include "model.h"
#include "sys.h"
#include "tierd.h"

struct model M;

static int64_t page_at(uint64_t address)
{
	for (uint32_t i = 0; i < M.regions; i++) {
		struct model_region *r = &M.region[i];

		if (address - r->address < (uint64_t)r->pages * MODEL_PAGE_BYTES)
			return r->first_page + (int64_t)(address - r->address) / MODEL_PAGE_BYTES;
	}
	return -1;
}

/* A range of the VMM's addresses must lie in one region: nobody has a reason to ask for more. */
static uint32_t range(uint64_t address, uint64_t bytes, uint32_t *count)
{
	int64_t first = page_at(address), last = page_at(address + bytes - 1);

	*count = (uint32_t)(bytes / MODEL_PAGE_BYTES);
	if (M.anon && first < 0) /* the staging area, where that makes sense */
		first = page_at(address - MODEL_STAGING), last = page_at(address - MODEL_STAGING + bytes - 1);
	if (first < 0 || last != first + *count - 1 || address % MODEL_PAGE_BYTES || bytes % MODEL_PAGE_BYTES)
		model_fail("call on addresses %#lx + %#lx outside of a region", address, bytes);
	return (uint32_t)first;
}

static bool in_staging(uint64_t address)
{
	return M.anon && page_at(address) < 0;
}

static uint32_t file_page(int memfd, uint64_t offset)
{
	struct model_region *r = &M.region[memfd - FD_MEM];

	if (memfd < FD_MEM || memfd >= FD_MEM + (int)M.regions || offset < r->offset || offset % MODEL_PAGE_BYTES)
		model_fail("memory file %d has no offset %#lx", memfd, offset);
	return r->first_page + (uint32_t)((offset - r->offset) / MODEL_PAGE_BYTES);
}

static void wake(uint32_t first, uint32_t count)
{
	for (int i = 0; i < MODEL_THREADS_MAX; i++)
		if (M.waiter[i].waiting && M.waiter[i].page - first < count)
			M.waiter[i].waiting = M.waiter[i].unread = false;
}

static void unmap(uint32_t page)
{
	uint32_t first = page - page % MODEL_LARGE_PAGES;

	/* of shared memory, a part of such an entry cannot go: all of it does, without a trace */
	if (M.mapped_large[page])
		for (uint32_t p = first; p < first + MODEL_LARGE_PAGES; p++)
			M.mapped_large[p] = M.present[p] = M.protected[p] = M.rwp_protected[p] = false;
	if (M.anon)
		M.marker[page] = M.cached[page] = false;
	else if (M.present[page] && M.protected[page])
		M.marker[page] = true; /* zapping a protected page of shmem leaves a marker */
	M.present[page] = M.protected[page] = M.rwp_protected[page] = false;
}

/* The first touch of a large folio of which no page has an entry yet. */
static void map_large(uint32_t page)
{
	uint32_t first = page - page % MODEL_LARGE_PAGES;

	for (uint32_t p = first; p < first + MODEL_LARGE_PAGES; p++)
		if (p >= M.pages || !M.cached[p] || M.present[p] || M.marker[p] || M.poisoned[p] || M.swapped[p])
			return;
	for (uint32_t p = first; p < first + MODEL_LARGE_PAGES; p++)
		M.mapped_large[p] = M.present[p] = true;
}

static bool destroyed_anywhere(uint32_t page)
{
	bool destroyed = false;

	for (uint32_t i = 0; i < MODEL_STORES; i++)
		destroyed |= M.store[i].destroyed[page];
	return destroyed;
}

static void swap_in(uint32_t page)
{
	if (!M.swapped[page])
		return;
	M.swapped[page] = false;
	model_swapped_in();
}

/* --- the guest ---------------------------------------------------------------------------------------------------------- */

static enum model_access wait_for(uint32_t thread, uint32_t page, uint64_t flags)
{
	M.waiter[thread].waiting = M.waiter[thread].unread = true;
	M.waiter[thread].page = page;
	M.waiter[thread].flags = flags;
	return ACCESS_WAITS;
}

/* A fault that the kernel resolves by itself because of async mode, under the lock of the VMA only: others run meanwhile. */
static void fault_under_way(void)
{
	M.under_way++;
	for (uint32_t i = 0; i < 8 && model_chance(700); i++)
		model_pause();
	M.under_way--;
}

/* True when nothing is in the way of the access any more; false: look again, or *waits. */
static bool native_fault(uint32_t thread, uint32_t page, uint64_t write, bool *waits)
{
	bool present = M.present[page], marker = M.marker[page];

	*waits = false;
	if (present ? !M.rwp_protected[page] : !M.cached[page] || !M.minor[page])
		return true;
	if (!M.async || (!present && M.generation == TIERD_ENGINE_RWP)) { /* RWP_ASYNC is not about MINOR faults */
		wait_for(thread, page, write | (present ? SYS_RWP_FAULT : UFFD_PAGEFAULT_FLAG_MINOR));
		*waits = true;
		return false;
	}
	fault_under_way();
	if (M.present[page] != present || M.marker[page] != marker || !M.cached[page])
		return false; /* the entry has changed: the fault is taken again */
	M.rwp_protected[page] = false;
	return true;
}

static uint64_t last_word(uint64_t value)
{
	return is_one_word(value) ? value : ~value;
}

enum model_access model_access(uint32_t thread, uint32_t page, bool write, uint64_t *value)
{
	bool waits = false;

	while (M.generation != TIERD_ENGINE_STOCK && !M.poisoned[page] &&
	       !native_fault(thread, page, write ? UFFD_PAGEFAULT_FLAG_WRITE : 0, &waits))
		if (waits)
			return ACCESS_WAITS;
	if (!M.present[page]) {
		if (M.poisoned[page]) /* an entry of the page table, so it is seen before the page cache */
			return ACCESS_POISONED;
		if (!M.cached[page]) {
			if (M.missing[page])
				return wait_for(thread, page, write ? UFFD_PAGEFAULT_FLAG_WRITE : 0);
			/* nobody asked to be told: the kernel makes a page of zeros. Also below a marker. */
			M.cached[page] = true;
			memset(M.bytes[page], 0, MODEL_PAGE_BYTES);
		}
		if (M.large_entries)
			map_large(page);
		M.present[page] = true;
		M.swapped[page] = false;
		M.protected[page] = M.marker[page];
		M.marker[page] = false;
	}
	if (write && M.protected[page] && M.anon)
		M.protected[page] = false; /* UFFD_FEATURE_WP_ASYNC */
	if (write && M.protected[page])
		return wait_for(thread, page, UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP);
	for (int i = 0; i < MODEL_PAGE_BYTES / 8; i++) {
		uint64_t word = write ? *value : M.bytes[page][0];

		if (i == MODEL_PAGE_BYTES / 8 - 1)
			word = last_word(word);
		if (write)
			M.bytes[page][i] = word;
		else if (M.bytes[page][i] != word)
			model_fail("page %u is torn", page);
	}
	*value = M.bytes[page][0];
	M.idle[page] = false;
	M.may_fail[page] &= destroyed_anywhere(page);
	return ACCESS_MADE;
}

void model_zap(uint32_t page)
{
	unmap(page);
	M.poisoned[page] = false;
}

void model_reclaim(uint32_t page, bool swap_out)
{
	if (!M.cached[page])
		return;
	unmap(page);
	M.swapped[page] = swap_out || M.swapped[page];
}

bool model_remap(uint32_t page)
{
	if (M.no_remap)
		return false;
	unmap(page);
	M.marker[page] = M.wp[page] = M.missing[page] = M.minor[page] = M.rwp[page] = false;
	wake(page, 1);
	return true;
}

bool model_unread(void)
{
	for (int i = 0; i < MODEL_THREADS_MAX; i++)
		if (M.waiter[i].waiting && M.waiter[i].unread)
			return true;
	return false;
}

/* --- plain services ----------------------------------------------------------------------------------------------------- */

uint64_t sys_now_ns(void)
{
	return M.now_ns += 20000;
}

size_t sys_page_bytes(void)
{
	return M.huge ? MODEL_BASE_BYTES : MODEL_PAGE_BYTES;
}

void sys_pause_us(uint32_t us)
{
	M.now_ns += us * 1000ull;
	model_enter();
	model_pause();
	model_exit();
}

int sys_dup(int fd)
{
	return fd;
}

void sys_close(int fd)
{
	(void)fd;
}

void *sys_alloc(size_t bytes)
{
	return model_alloc(bytes);
}

void sys_free(void *memory, size_t bytes)
{
	model_free(memory, bytes);
}

/* --- userfaultfd -------------------------------------------------------------------------------------------------------- */

static void set_modes(uint32_t first, uint32_t count, uint64_t mode)
{
	bool wp = mode & UFFDIO_REGISTER_MODE_WP, missing = mode & UFFDIO_REGISTER_MODE_MISSING;
	bool minor = mode & UFFDIO_REGISTER_MODE_MINOR, rwp = mode & SYS_RWP_REGISTER_MODE;

	for (uint32_t p = first; p < first + count; p++) {
		if ((M.wp[p] || !wp) && (M.missing[p] || !missing) && (M.minor[p] || !minor) && (M.rwp[p] || !rwp))
			continue; /* has all of these modes: skipped, others stay */
		M.wp[p] = wp;
		M.missing[p] = missing;
		M.minor[p] = minor;
		M.rwp[p] = rwp;
	}
}

int sys_uffd_register(int uffd, uint64_t address, uint64_t bytes, uint64_t mode)
{
	uint32_t count, first = range(address, bytes, &count);
	bool rwp = mode & SYS_RWP_REGISTER_MODE, missing = mode & UFFDIO_REGISTER_MODE_MISSING;

	if (M.gone)
		return -ESRCH;
	if (in_staging(address))
		return mode == UFFDIO_REGISTER_MODE_MISSING ? 0 : -EINVAL;
	if (rwp && (mode & UFFDIO_REGISTER_MODE_WP || M.generation != TIERD_ENGINE_RWP))
		return -EINVAL;
	if (missing && M.faults.register_fails && model_chance(M.faults.register_fails)) /* vm.max_map_count */
		return model_chance(500) ? -ENOMEM : -EBUSY;
	(void)uffd;
	model_enter();
	set_modes(first, count, mode);
	model_exit();
	return 0;
}

int sys_uffd_unregister(int uffd, uint64_t address, uint64_t bytes)
{
	uint32_t count, first = range(address, bytes, &count);

	if (M.gone)
		return -ESRCH;
	(void)uffd;
	if (in_staging(address))
		return 0;
	model_enter();
	for (uint32_t p = first; p < first + count; p++)
		M.wp[p] = M.missing[p] = M.minor[p] = M.rwp[p] = M.protected[p] = M.rwp_protected[p] = M.marker[p] =
			false;
	wake(first, count);
	model_exit();
	return 0;
}

/* What may be answered though nothing is wrong with the page: an event that is not read yet, a mapping that changes just now, another
 * page of the range. */
static int answer_at(uint32_t thousandths)
{
	static const int answers[] = {-EAGAIN, -EEXIST, -EFAULT, -ENOENT, -EBUSY};

	for (size_t i = 0; i < sizeof(answers) / sizeof(answers[0]); i++)
		if (model_chance(thousandths))
			return answers[i];
	return 0;
}

static int answer_at_random(void)
{
	return answer_at(M.faults.resolve_fails / 4);
}

static int protect(uint64_t address, uint64_t bytes, bool on)
{
	uint32_t count, first = range(address, bytes, &count);
	int error;

	if (M.gone)
		return -ESRCH;
	model_enter();
	error = answer_at(M.faults.odd_answers);
	for (uint32_t p = first; p < first + count && !error; p++) {
		if (on && model_chance(M.faults.protect_fails)) /* a prefix may be held */
			error = model_chance(500) ? -ENOENT : -EAGAIN;
		else if (!M.wp[p])
			error = -ENOENT;
		else if (M.mapped_large[p] && on)
			unmap(p), M.marker[p] = true;
		else if (M.present[p])
			M.protected[p] = on;
		else if (!M.poisoned[p]) /* an access ends in an error anyway */
			M.marker[p] = on;
		if (p % 4 == 3)
			model_pause();
	}
	if (!on && !error)
		wake(first, count);
	model_exit();
	return error;
}

int sys_uffd_protect(int uffd, uint64_t address, uint64_t bytes)
{
	(void)uffd;
	return protect(address, bytes, true);
}

int sys_uffd_unprotect(int uffd, uint64_t address, uint64_t bytes)
{
	(void)uffd;
	return protect(address, bytes, false);
}

int sys_uffd_wake(int uffd, uint64_t address, uint64_t bytes)
{
	uint32_t count, first = range(address, bytes, &count);

	if (M.gone)
		return -ESRCH;
	(void)uffd;
	model_enter();
	wake(first, count);
	model_exit();
	return 0;
}

int sys_uffd_copy(int uffd, uint64_t address, const void *from, uint64_t bytes, bool protect, uint64_t *done)
{
	uint32_t count, first = range(address, bytes, &count), n = 0;
	int error = 0;

	*done = 0;
	if (M.gone)
		return -ESRCH;
	(void)uffd;
	model_enter();
	for (; n < count && !error; n += !error) {
		uint32_t p = first + n;

		if (!M.wp[p] && !M.missing[p] && !M.minor[p] && !M.rwp[p])
			error = -ENOENT;
		else if (protect && !M.wp[p])
			error = -EINVAL;
		else if (model_chance(M.faults.copy_nomem))
			error = M.huge ? -EEXIST : -ENOMEM; /* that is what hugetlbfs says when its pool is empty */
		else if (model_chance(M.faults.copy_again))
			error = -EAGAIN;
		else if (M.cached[p] || M.present[p])
			error = -EEXIST;
		if (error)
			continue;
		M.cached[p] = M.present[p] = true;
		M.rwp_protected[p] = M.marker[p] = M.poisoned[p] = false;
		M.protected[p] = protect;
		memcpy(M.bytes[p], (const char *)from + n * MODEL_PAGE_BYTES, MODEL_PAGE_BYTES);
		M.arrived[p] = M.bytes[p][0];
		model_pause();
	}
	*done = (uint64_t)n * MODEL_PAGE_BYTES;
	wake(first, n);
	model_exit();
	return n == count ? 0 : n ? -EAGAIN : error;
}

int sys_uffd_continue(int uffd, uint64_t address, uint64_t bytes)
{
	uint32_t count, first = range(address, bytes, &count);
	int error;

	if (M.gone)
		return -ESRCH;
	(void)uffd;
	model_enter();
	error = answer_at_random();
	for (uint32_t p = first; p < first + count && !error; p++) {
		if (!M.minor[p])
			error = -EINVAL;
		else if (M.present[p] || M.poisoned[p])
			error = -EEXIST;
		else if (!M.cached[p])
			error = -EFAULT;
		else
			M.present[p] = true;
		if (!error) {
			swap_in(p);
			M.protected[p] = M.marker[p] = false;
		}
	}
	if (!error)
		wake(first, count);
	model_exit();
	return error;
}

static int rwp_protect(uint64_t address, uint64_t bytes, bool on)
{
	uint32_t count, first = range(address, bytes, &count);
	int error = 0;

	if (M.gone)
		return -ESRCH;
	model_enter();
	for (uint32_t p = first; p < first + count && !error; p++)
		if (!M.rwp[p])
			error = -ENOENT;
	if (!error && on && model_chance(M.faults.protect_fails))
		error = model_chance(500) ? -EAGAIN : -ENOENT;
	if (!error && !on)
		error = answer_at_random();
	for (uint32_t p = first; p < first + count && !error; p++) {
		M.rwp_protected[p] = on && M.present[p];
		if (p % 4 == 3)
			model_pause();
	}
	if (!on && !error)
		wake(first, count);
	model_exit();
	return error;
}

int sys_rwp_protect(int uffd, uint64_t address, uint64_t bytes)
{
	(void)uffd;
	return rwp_protect(address, bytes, true);
}

int sys_rwp_unprotect(int uffd, uint64_t address, uint64_t bytes)
{
	(void)uffd;
	return rwp_protect(address, bytes, false);
}

int sys_rfc_deactivate(int uffd, uint64_t address, uint64_t bytes)
{
	uint32_t count, first = range(address, bytes, &count);
	int error = 0;

	if (M.gone)
		return -ESRCH;
	(void)uffd;
	model_enter();
	if (model_chance(M.faults.protect_fails))
		error = model_chance(500) ? -EAGAIN : -ENOENT;
	for (uint32_t p = first; p < first + count && !error; p++) {
		if (!M.minor[p])
			error = -ENOENT;
		else if (M.present[p] && M.anon)
			M.rwp_protected[p] = true; /* PROT_NONE, where it is */
		else if (M.present[p])
			unmap(p);
		model_pause();
	}
	model_exit();
	return error;
}

/* rwp waits for faults that have seen the old mode; rfc does not. */
int sys_rwp_set_async(int uffd, bool async)
{
	if (M.gone)
		return -ESRCH;
	if (model_chance(M.faults.mode_fails))
		return -EINTR;
	(void)uffd;
	model_enter();
	M.async = async;
	while (M.under_way)
		model_pause();
	if (async)
		wake(0, M.pages);
	model_exit();
	return 0;
}

int sys_rfc_set_async(int uffd, bool async)
{
	if (M.gone)
		return -ESRCH;
	if (model_chance(M.faults.mode_fails))
		return -EINTR;
	(void)uffd;
	model_enter();
	M.async = async;
	/* else what maps a large folio after the look at it is unmapped by a hold, and who was touched beside is not seen: known */
	while (M.large_entries && M.under_way)
		model_pause();
	if (async)
		wake(0, M.pages);
	model_exit();
	return 0;
}

int sys_uffd_poison(int uffd, uint64_t address, uint64_t bytes)
{
	uint32_t count, first = range(address, bytes, &count);
	int error;

	if (M.gone)
		return -ESRCH;
	(void)uffd;
	model_enter();
	error = answer_at(M.faults.odd_answers);
	for (uint32_t p = first; p < first + count && !error; p++) {
		if (M.present[p] || M.marker[p] || M.poisoned[p]) /* any entry of the page table */
			error = -EEXIST;
		else
			M.poisoned[p] = true;
	}
	if (!error)
		wake(first, count);
	model_exit();
	return error;
}

ssize_t sys_uffd_read(int uffd, struct uffd_msg *messages, size_t count)
{
	size_t n = 0;

	if (M.gone)
		return -EAGAIN;
	(void)uffd;
	model_enter();
	for (int i = 0; i < MODEL_THREADS_MAX && n < count; i++) {
		uint32_t page = M.waiter[i].page;

		if (!M.waiter[i].waiting || !M.waiter[i].unread)
			continue;
		M.waiter[i].unread = false;
		memset(&messages[n], 0, sizeof(messages[n]));
		messages[n].event = UFFD_EVENT_PAGEFAULT;
		messages[n].arg.pagefault.flags = M.waiter[i].flags;
		for (uint32_t r = 0; r < M.regions; r++)
			if (page - M.region[r].first_page < M.region[r].pages)
				messages[n].arg.pagefault.address =
					M.region[r].address + (page - M.region[r].first_page) * MODEL_PAGE_BYTES;
		n++;
	}
	model_exit();
	return n ? (ssize_t)n : -EAGAIN;
}

/* --- page tables -------------------------------------------------------------------------------------------------------- */

ssize_t sys_pagemap_scan(int pagemap, uint64_t start, uint64_t end, struct sys_scan wanted,
			 struct sys_page_region *regions, size_t count, uint64_t *walk_end)
{
	uint32_t pages, first = range(start, end - start, &pages);
	size_t n = 0;

	*walk_end = start;
	if (M.gone)
		return 0;
	(void)pagemap;
	model_enter();
	for (uint32_t i = 0; i < pages; i++) {
		uint64_t at = start + i * MODEL_PAGE_BYTES;
		bool swapped = M.marker[first + i] || M.poisoned[first + i], matches;
		uint64_t is = M.present[first + i] ? SYS_PAGE_PRESENT : swapped ? SYS_PAGE_SWAPPED : 0;

		/* of a hole, too, in anonymous memory; with rwp only where writes are what is looked for */
		if ((is || M.anon) && !M.marker[first + i] && !M.protected[first + i] &&
		    (M.wp[first + i] || M.generation != TIERD_ENGINE_RWP))
			is |= SYS_PAGE_WRITTEN;
		if (is && M.rwp[first + i] && !M.rwp_protected[first + i])
			is |= SYS_RWP_ACCESSED;
		if (M.generation == TIERD_ENGINE_RFC && M.anon && M.rwp_protected[first + i])
			is |= SYS_RFC_DEACTIVATED;
		/* whether a large entry maps it is asked of one page by itself: whatever is answered, no byte is lost */
		if (M.anon && M.present[first + i] && wanted.all_of & SYS_PAGE_HUGE && model_chance(400))
			is |= SYS_PAGE_HUGE;
		if (!M.anon && M.present[first + i])
			is |= SYS_PAGE_FILE;
		if (in_staging(start))
			is = M.staged[first + i] ? SYS_PAGE_PRESENT | SYS_PAGE_WRITTEN : 0;
		matches = ((is ^ wanted.inverted) & wanted.all_of) == wanted.all_of &&
			  (is ^ wanted.inverted) & wanted.any_of;
		*walk_end = at;
		if (n == count && matches)
			break;
		if (matches)
			regions[n++] = (struct sys_page_region){
				at, at + MODEL_PAGE_BYTES,
				(is & wanted.any_of) | (M.mapped_large[first + i] ? SYS_PAGE_HUGE : 0)};
		*walk_end = at + MODEL_PAGE_BYTES;
		/* of one large entry, or of the table in its place, the walk has the lock */
		if (M.large_entries ? (first + i) % MODEL_LARGE_PAGES == MODEL_LARGE_PAGES - 1 : i % 4 == 3)
			model_pause();
	}
	model_exit();
	return (ssize_t)n;
}

int sys_idle_get(int idle, uint64_t entry)
{
	uint64_t frame = entry & ((1ull << 55) - 1);
	bool is;

	if (idle != FD_IDLE || !(entry >> 63) || !frame)
		return -EINVAL;
	model_enter();
	is = M.idle[frame - 1] && !model_chance(50); /* it may be another page's frame by now */
	model_pause();
	model_exit();
	return is;
}

int sys_idle_set(int idle, uint64_t entry)
{
	uint64_t frame = entry & ((1ull << 55) - 1);

	if (idle != FD_IDLE || !(entry >> 63) || !frame)
		return -EINVAL;
	model_enter();
	M.idle[frame - 1] = true;
	model_pause();
	model_exit();
	return 0;
}

ssize_t sys_pagemap_read(int pagemap, uint64_t *entries, size_t count, uint64_t address)
{
	uint32_t base = (uint32_t)sys_page_bytes(), per_page = MODEL_PAGE_BYTES / base, pages, first;
	uint32_t skip = (uint32_t)(address % MODEL_PAGE_BYTES / base);

	if (M.gone)
		return 0;
	(void)pagemap;
	/* an entry a page of the system; those of a huge page are alike */
	first = range(address - skip * base, (skip + count + per_page - 1) / per_page * MODEL_PAGE_BYTES, &pages);
	model_enter();
	for (uint32_t n = 0; n < count; n++) {
		uint32_t i = (skip + n) / per_page;

		entries[n] = M.present[first + i]
				     ? 1ull << 63 | (M.anon ? 0 : 1ull << 61) | (first + i + 1) |
					       (uint64_t)(M.protected[first + i] || M.rwp_protected[first + i]) << 57
			     : M.marker[first + i]   ? 1ull << 62 | 1ull << 57
			     : M.poisoned[first + i] ? 1ull << 62
						     : 0;
		if (n % 4 == 3)
			model_pause();
	}
	model_exit();
	return (ssize_t)(count * sizeof(*entries));
}

ssize_t sys_pageout(int pidfd, const struct iovec *ranges, size_t count)
{
	ssize_t done = 0;

	if (M.gone)
		return -ESRCH;
	if (M.huge && pidfd == FD_PIDFD)
		return -EINVAL;
	if (model_chance(M.faults.odd_answers))
		return model_chance(500) ? -EINTR : -EAGAIN;
	model_enter();
	for (size_t i = 0; i < count; i++) {
		uint32_t pages, first = range((uintptr_t)ranges[i].iov_base, ranges[i].iov_len, &pages);

		for (uint32_t p = first; p < first + pages; p++) {
			if (M.huge || !model_chance(10)) /* a page that cannot be isolated stays mapped */
				unmap(p);
			model_pause();
		}
		done += (ssize_t)ranges[i].iov_len;
	}
	model_exit();
	return done;
}

int sys_zap_inside(int tid, uint64_t address, uint64_t bytes, uint64_t *stopped_ns)
{
	struct iovec v = {(void *)(uintptr_t)address, bytes};

	*stopped_ns = 0;
	return sys_pageout(tid, &v, 1) < 0 ? -EIO : 0;
}

/* --- private anonymous memory -------------------------------------------------------------------------------------------- */

ssize_t sys_vmm_read(int mem, void *to, size_t bytes, uint64_t address)
{
	uint32_t count, first = range(address, bytes, &count);

	if (M.gone)
		return 0;
	if (mem != FD_VMM || !in_staging(address))
		model_fail("read of the VMM's memory at %#lx", address);
	model_enter();
	for (uint32_t i = 0; i < count; i++) {
		if (!M.staged[first + i]) {
			model_exit();
			return i ? (ssize_t)(i * MODEL_PAGE_BYTES) : -EIO;
		}
		memcpy((char *)to + i * MODEL_PAGE_BYTES, M.staged_bytes[first + i], MODEL_PAGE_BYTES);
		model_pause();
	}
	model_exit();
	return (ssize_t)bytes;
}

/* A page that is missing is answered with an error by the fault thread. */
ssize_t sys_vmm_copy(int32_t pid, void *to, size_t bytes, uint64_t address)
{
	(void)pid;
	return model_chance(20) ? -EFAULT : sys_vmm_read(FD_VMM, to, bytes, address);
}

static uint32_t below_miscount(uint32_t n)
{
	while (n && model_chance(600))
		n--;
	return n;
}

/* Page by page, each at once; stops at the first that cannot be moved. */
static int64_t move(const struct sys_inside_call *c)
{
	uint32_t count, first = range(c->from, c->bytes, &count), n = 0;

	if (in_staging(c->from) || c->to != c->from + MODEL_STAGING)
		model_fail("a move from %#lx to %#lx", c->from, c->to);
	if (M.border > first && M.border < first + count)
		return -EINVAL;
	for (; n < count; n++) {
		uint32_t p = first + n;

		model_pause();
		if (M.gone || model_chance(M.faults.move_busy))
			break;
		if (M.marker[p] || M.poisoned[p])
			break;
		if (!M.present[p])
			break; /* a hole: ENOENT */
		if (M.staged[p])
			break; /* EEXIST */
		memcpy(M.staged_bytes[p], M.bytes[p], MODEL_PAGE_BYTES);
		M.staged[p] = true;
		M.cached[p] = M.present[p] = M.protected[p] = M.rwp_protected[p] = false;
	}
	if (model_chance(M.faults.miscounts)) /* it has moved what it does not count */
		n = below_miscount(n);
	return n ? (int64_t)n * MODEL_PAGE_BYTES : -EEXIST;
}

static int64_t drop(const struct sys_inside_call *c)
{
	uint32_t count, first = range(c->from, c->bytes, &count);

	if (!in_staging(c->from))
		model_fail("a drop at %#lx, which is the guest's", c->from);
	if (model_chance(M.faults.move_busy))
		return -EAGAIN;
	for (uint32_t p = first; p < first + count; p++) {
		M.staged[p] = false;
		memset(M.staged_bytes[p], 0xdd, MODEL_PAGE_BYTES);
		model_pause();
	}
	return 0;
}

static int64_t make_call(const struct sys_inside_call *c)
{
	uint32_t count, first = range(c->from, c->bytes, &count);
	int64_t result;

	if (c->what == SYS_INSIDE_REGISTER) {
		bool anew = false;

		for (uint32_t p = first; p < first + count; p++)
			anew |= !M.missing[p];
		if (anew && model_chance(M.faults.register_fails))
			return -ENOMEM; /* a mapping more */
		set_modes(first, count, c->mode);
		M.no_remap = true;
		return 0;
	}
	if (c->what == SYS_INSIDE_DROP)
		return drop(c);
	M.no_remap = true; /* it holds the lock of the mappings */
	result = move(c);
	M.no_remap = false;
	return result;
}

void model_inside(void)
{
	while (!M.calls_cancelled && M.calls_done < M.calls_count && !M.gone) {
		struct sys_inside_call *c = &M.calls[M.calls_done];

		for (uint32_t i = 0; i < 20 && model_chance(800); i++) /* it is not scheduled at once */
			model_pause();
		if (M.calls_cancelled)
			break;
		c->result = make_call(c);
		M.calls_done++;
	}
	M.no_remap = false;
	M.calls_run = false;
}

int sys_inside_create(int32_t tid, uint64_t *area)
{
	(void)tid;
	if (M.gone)
		return -ESRCH;
	*area = 1;
	return 0;
}

int sys_inside_run(const struct sys_inside *in, struct sys_inside_call *calls, uint32_t count, uint32_t *done,
		   uint64_t *stopped_ns)
{
	bool lost_sight = false;

	*done = 0;
	*stopped_ns = 1000;
	if (in->area != 1)
		model_fail("a batch without an area");
	if (M.gone)
		return -ESRCH;
	if (M.calls_run)
		return -EBUSY;
	if (model_chance(M.faults.enter_fails))
		return -EBUSY; /* a debugger has the thread */
	model_enter();
	memcpy(M.calls, calls, count * sizeof(*calls));
	M.calls_count = count;
	M.calls_done = 0;
	M.calls_cancelled = false;
	M.calls_run = true;
	while (M.calls_run && !model_dying() && !lost_sight) {
		model_pause();
		if (model_chance(M.faults.cut_short)) {
			M.calls_cancelled = true;
			lost_sight = model_chance(300);
		}
	}
	*done = M.calls_done;
	memcpy(calls, M.calls, *done * sizeof(*calls));
	lost_sight = M.calls_run;
	model_exit();
	return lost_sight ? -EINPROGRESS : 0;
}

int64_t sys_filters(int32_t tid)
{
	(void)tid;
	return 0;
}

int sys_inside_settle(const struct sys_inside *in)
{
	(void)in;
	model_enter();
	M.calls_cancelled = true;
	for (int i = 0; i < 20 && M.calls_run && model_chance(900); i++)
		model_pause();
	model_exit();
	if (M.gone)
		return -ESRCH;
	return !M.calls_run ? 0 : model_chance(500) ? -ETIMEDOUT : -EPERM; /* it may not be looked at just now */
}

/* --- memory files ------------------------------------------------------------------------------------------------------- */

ssize_t sys_mem_read(int memfd, void *to, size_t bytes, uint64_t offset)
{
	uint32_t page = file_page(memfd, offset);

	model_enter();
	for (size_t done = 0; done < bytes; done += MODEL_PAGE_BYTES, page++) {
		swap_in(page);
		if (M.cached[page])
			memcpy((char *)to + done, M.bytes[page], MODEL_PAGE_BYTES);
		else
			memset((char *)to + done, 0, MODEL_PAGE_BYTES);
		model_pause();
	}
	model_exit();
	return (ssize_t)bytes;
}

ssize_t sys_mem_write(int memfd, const void *from, size_t bytes, uint64_t offset)
{
	uint32_t page = file_page(memfd, offset);

	if (M.huge)
		return -EINVAL;
	model_enter();
	for (size_t done = 0; done < bytes; done += MODEL_PAGE_BYTES, page++) {
		if (!M.cached[page]) { /* the page of zeros that a mapping is given first: a process that dies leaves it so */
			memset(M.bytes[page], 0, MODEL_PAGE_BYTES);
			M.cached[page] = true;
			model_pause();
			if (model_dying()) {
				model_exit();
				return -EFAULT;
			}
		}
		M.zeroed[page] = M.swapped[page] = false;
		memcpy(M.bytes[page], (const char *)from + done, MODEL_PAGE_BYTES);
	}
	model_exit();
	return (ssize_t)bytes;
}

int sys_mem_place(int memfd, const void *from, size_t bytes, uint64_t offset)
{
	uint32_t page = file_page(memfd, offset);
	int error;

	if (M.huge || bytes != MODEL_PAGE_BYTES)
		return -EINVAL;
	model_enter();
	error = M.cached[page] ? -EEXIST : 0;
	if (!error) {
		M.cached[page] = true;
		memcpy(M.bytes[page], from, MODEL_PAGE_BYTES);
	}
	model_exit();
	return error;
}

/* Page by page, as the truncation of shmem goes; markers survive, nobody is woken. hugetlbfs unmaps all of it first. */
static void punch(uint32_t first, uint32_t count, uint32_t stays)
{
	model_enter();
	for (uint32_t p = first; M.huge && p < first + count; p++) {
		unmap(p);
		model_pause();
	}
	for (uint32_t p = first; p < first + count; p++) {
		if (M.cached[p] && model_chance(stays)) {
			memset(M.bytes[p], 0, MODEL_PAGE_BYTES); /* part of a large folio with a reference */
			M.zeroed[p] = true;
		} else {
			M.cached[p] = M.zeroed[p] = false;
		}
		M.swapped[p] = false;
		unmap(p);
		model_pause();
	}
	model_exit();
}

int sys_mem_punch(int memfd, uint64_t offset, uint64_t bytes)
{
	uint32_t page = file_page(memfd, offset), count = (uint32_t)(bytes / MODEL_PAGE_BYTES);

	if (M.huge && model_chance(M.faults.punch_stays)) /* sealed, say: nothing of it */
		return -EPERM;
	punch(page, count, M.huge ? 0 : M.faults.punch_stays);
	return 0;
}

void model_give_back(uint32_t page)
{
	punch(page, 1, 0);
}

static int64_t seek(int memfd, uint64_t offset, bool data)
{
	uint32_t page = file_page(memfd, offset);
	struct model_region *r = &M.region[memfd - FD_MEM];
	int64_t found = data ? -ENXIO : (int64_t)(r->offset + r->pages * MODEL_PAGE_BYTES);

	if (M.huge) /* all of it is data, up to the end of the file */
		return data ? (int64_t)offset : found;
	model_enter();
	for (; page < r->first_page + r->pages; page++) {
		if (M.cached[page] == data) {
			found = (int64_t)(r->offset + (page - r->first_page) * MODEL_PAGE_BYTES);
			break;
		}
	}
	model_exit();
	return found;
}

int64_t sys_mem_seek_data(int memfd, uint64_t offset)
{
	return seek(memfd, offset, true);
}

int64_t sys_mem_seek_hole(int memfd, uint64_t offset)
{
	return seek(memfd, offset, false);
}

int sys_huge_open(struct sys_huge *h, int memfd, uint64_t offset, uint64_t bytes, uint64_t page_bytes)
{
	uint32_t page = file_page(memfd, offset);

	if (!M.huge || page_bytes != MODEL_PAGE_BYTES || bytes % MODEL_PAGE_BYTES)
		model_fail("memory file %d is mapped by pages of %lu", memfd, page_bytes);
	*h = (struct sys_huge){(uint8_t *)M.bytes[page], bytes, page_bytes, (int)page};
	return 0;
}

void sys_huge_close(struct sys_huge *h)
{
	h->memory = NULL;
}

int sys_huge_cached(struct sys_huge *h, uint64_t at)
{
	bool cached, failed;

	if (at % MODEL_PAGE_BYTES || at >= h->bytes)
		model_fail("look at %#lx of a memory file of %#lx", at, h->bytes);
	model_enter();
	cached = M.cached[h->uffd + at / MODEL_PAGE_BYTES];
	failed = M.missing[h->uffd + at / MODEL_PAGE_BYTES] && model_chance(M.faults.copy_nomem); /* of a page table */
	model_exit();
	return failed ? -ENOMEM : cached;
}

int sys_huge_place(struct sys_huge *h, uint64_t at, const void *from)
{
	uint32_t page = (uint32_t)(h->uffd + at / MODEL_PAGE_BYTES);
	bool cached;

	model_enter();
	cached = M.cached[page] || model_chance(M.faults.copy_nomem);
	if (!cached) {
		M.cached[page] = true;
		memcpy(M.bytes[page], from, MODEL_PAGE_BYTES);
	}
	model_exit();
	return cached ? -EEXIST : 0;
}

/* --- the store ---------------------------------------------------------------------------------------------------------- */

static struct model_store *store_of(int fd)
{
	if (fd < FD_STORE || fd >= FD_STORE + MODEL_FILES)
		model_fail("%d is no file of a store", fd);
	return &M.store[fd - FD_STORE];
}

uint64_t *model_stored(uint32_t store, uint32_t page)
{
	if (store != MODEL_POOL)
		return M.store[store].bytes[page];
	return M.pool_index[page] ? M.pool_object[M.pool_index[page] - 1] : NULL;
}

ssize_t sys_store_read(int fd, void *to, size_t bytes, uint64_t offset)
{
	struct model_store *s = store_of(fd);
	ssize_t n;

	model_enter();
	for (uint32_t i = 0; i < M.read_pauses; i++)
		model_pause();
	if (model_chance(M.faults.read_short))
		bytes = MODEL_PAGE_BYTES;
	n = (ssize_t)bytes;
	for (size_t done = 0; done < bytes; done += MODEL_PAGE_BYTES) {
		uint64_t page = (offset + done) / MODEL_PAGE_BYTES;

		memcpy((char *)to + done, s->bytes[page], MODEL_PAGE_BYTES);
		if (s->unreadable[page])
			n = -EIO;
		model_pause();
	}
	if (model_chance(M.faults.read_flip))
		((char *)to)[bytes / 2] ^= 4;
	if (model_chance(M.faults.read_eio))
		n = -EIO;
	model_exit();
	return n;
}

/* What was destroyed is whole again: by a write or a discard of it. */
static void made_anew(struct model_store *s, uint64_t page)
{
	bool destroyed = s->destroyed[page];

	s->destroyed[page] = s->unreadable[page] = false;
	M.may_fail[page] &= !destroyed || destroyed_anywhere((uint32_t)page);
}

void model_destroy(uint32_t store, uint32_t page)
{
	struct model_store *s = &M.store[store];
	uint64_t *bytes = model_stored(store, page);

	if (s->destroyed[page] || !bytes || (store == MODEL_POOL && M.pool_changes))
		return;
	s->destroyed[page] = M.may_fail[page] = true;
	memcpy(s->intact[page], bytes, MODEL_PAGE_BYTES);
	if (model_chance(300)) {
		s->unreadable[page] = true;
		return;
	}
	if (model_chance(500))
		memset(bytes, 0, MODEL_PAGE_BYTES);
	bytes[3] ^= 0x10;
	memcpy(s->device[page], bytes, MODEL_PAGE_BYTES);
}

void model_repair(uint32_t page)
{
	for (uint32_t i = 0; i < MODEL_STORES; i++) {
		struct model_store *s = &M.store[i];

		if (!s->destroyed[page] ||
		    (i == MODEL_POOL && M.pool_changes)) /* what is being copied does not change */
			continue;
		s->destroyed[page] = s->unreadable[page] =
			false; /* the guest is told no more errors once it has read the page */
		memcpy(model_stored(i, page), s->intact[page], MODEL_PAGE_BYTES);
		memcpy(s->device[page], s->intact[page], MODEL_PAGE_BYTES);
	}
}

/* A killed thread's request for `page`, when it goes on without it: true. */
static bool outlives(int fd, uint64_t page, const void *bytes)
{
	if (!M.late_io || !model_dying())
		return false;
	if (M.late_count == MODEL_LATE_MAX)
		model_late_lands();
	M.late[M.late_count].discard = !bytes;
	M.late[M.late_count].file = (uint32_t)(fd - FD_STORE);
	M.late[M.late_count].page = page;
	if (bytes)
		memcpy(M.late[M.late_count].bytes, bytes, MODEL_PAGE_BYTES);
	M.late_count++;
	return true;
}

void model_late_lands(void)
{
	struct model_store *s;
	uint32_t i = 0;
	uint64_t page;

	if (!M.late_count)
		return;
	while (i + 1 < M.late_count && model_chance(700))
		i++;
	page = M.late[i].page;
	s = &M.store[M.late[i].file];
	memset(s->bytes[page], 0, MODEL_PAGE_BYTES);
	if (!M.late[i].discard)
		memcpy(s->bytes[page], M.late[i].bytes, MODEL_PAGE_BYTES);
	memcpy(s->device[page], s->bytes[page], MODEL_PAGE_BYTES);
	s->dirty[page] = false;
	M.late[i] = M.late[--M.late_count];
}

ssize_t sys_store_write(int fd, const struct iovec *from, int count, uint64_t offset)
{
	struct model_store *s = store_of(fd);
	ssize_t n = (ssize_t)from[0].iov_len;

	(void)count;
	model_enter();
	for (uint32_t i = 0; i < M.write_pauses; i++)
		model_pause();
	if (model_chance(M.faults.store_eio)) {
		n = model_chance(500) ? -EIO : -ENOSPC;
	} else if (s->sync_error && model_chance(500)) {
		s->sync_error = false; /* NFS tells it to a write, and to no sync any more */
		n = -EIO;
	} else {
		if (model_chance(M.faults.store_short))
			n = MODEL_PAGE_BYTES;
		for (ssize_t done = 0; done < n; done += MODEL_PAGE_BYTES) {
			uint64_t page = (offset + (uint64_t)done) / MODEL_PAGE_BYTES;
			char *bytes = (char *)from[0].iov_base + done;

			if (outlives(fd, page, bytes))
				continue;
			made_anew(s, page);
			memcpy(s->bytes[page], bytes, MODEL_PAGE_BYTES);
			s->dirty[page] = !M.direct;
			if (M.direct)
				memcpy(s->device[page], s->bytes[page], MODEL_PAGE_BYTES);
			model_pause();
		}
	}
	model_exit();
	return n;
}

static void clean(struct model_store *s, uint64_t page, bool lose)
{
	if (!s->dirty[page])
		return;
	s->dirty[page] = false;
	if (lose) {
		memcpy(s->bytes[page], s->device[page],
		       MODEL_PAGE_BYTES); /* the page is dropped; a read gives what was there */
		s->sync_error = true;
	} else {
		memcpy(s->device[page], s->bytes[page], MODEL_PAGE_BYTES);
	}
}

void model_write_back(void)
{
	for (uint32_t i = 0; i < MODEL_FILES; i++)
		for (uint64_t page = 0; page < M.pages; page++)
			if (M.store[i].dirty[page] && model_chance(300))
				clean(&M.store[i], page, model_chance(M.faults.sync_loses));
}

int sys_store_sync(int fd)
{
	struct model_store *s = store_of(fd);
	bool failed;

	model_enter();
	for (uint64_t page = 0; page < M.pages; page++)
		clean(s, page, model_chance(M.faults.sync_loses));
	failed = s->sync_error;
	s->sync_error = false;
	model_exit();
	return failed ? -EIO : 0;
}

int sys_store_discard(int fd, uint64_t offset, uint64_t bytes)
{
	struct model_store *s = store_of(fd);
	uint64_t first = offset / MODEL_PAGE_BYTES, end = first + bytes / MODEL_PAGE_BYTES;
	bool fails = M.faults.discard_fails && !(++s->discards % M.faults.discard_fails);

	model_enter();
	if (fails) /* after a part of it was done */
		end = first + (end - first) / 2;
	for (uint64_t page = first; page < end; page++) {
		if (outlives(fd, page, NULL))
			continue;
		made_anew(s, page);
		memset(s->bytes[page], 0, MODEL_PAGE_BYTES);
		memset(s->device[page], 0, MODEL_PAGE_BYTES);
		s->dirty[page] = false;
		model_pause();
	}
	model_exit();
	return fails ? -EIO : 0;
}

int sys_store_drop_cache(int fd, uint64_t offset, uint64_t bytes)
{
	(void)fd;
	(void)offset;
	(void)bytes;
	return 0;
}
