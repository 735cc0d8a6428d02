/* SPDX-License-Identifier: Apache-2.0 */
/* guest.c: a guest's descriptors, regions and registrations; attach, adoption, teardown, counters. */
#include <string.h>

#include "internal.h"

enum { CHUNK_BYTES = 64 << 20 };

struct region *region_of_page(struct tierd_guest *g, uint64_t page)
{
	for (uint32_t i = 0; i < g->region_count; i++)
		if (page - g->regions[i].first_page < g->regions[i].pages)
			return &g->regions[i];
	return NULL;
}

int64_t page_of_address(struct tierd_guest *g, uint64_t address)
{
	for (uint32_t i = 0; i < g->region_count; i++) {
		struct region *r = &g->regions[i];

		if (address - r->address < r->bytes)
			return (int64_t)(r->first_page + (address - r->address) / g->page_bytes);
	}
	return -EFAULT;
}

uint64_t address_of(struct tierd_guest *g, uint64_t page)
{
	struct region *r = region_of_page(g, page);

	return r->address + (page - r->first_page) * g->page_bytes;
}

uint64_t large_head(struct tierd_guest *g, uint64_t page)
{
	struct region *r = region_of_page(g, page);
	uint64_t bytes = large_pages(g) * g->page_bytes;
	uint64_t address = (r->address + (page - r->first_page) * g->page_bytes) / bytes * bytes;

	return address < r->address ? NO_PAGE : r->first_page + (address - r->address) / g->page_bytes;
}

bool was_mapped_large(struct tierd_guest *g, uint64_t page)
{
	uint64_t head = large_head(g, page);

	return head != NO_PAGE && bit_get(g->large, head);
}

void date_large(struct tierd_guest *g, uint64_t page)
{
	uint64_t first = g->huge ? NO_PAGE : large_head(g, page);

	for (uint64_t p = first; first != NO_PAGE && p < first + large_pages(g) && p < g->pages;
	     p += GROUP_PAGES - p % GROUP_PAGES)
		atomic_store_explicit(&g->groups[p / GROUP_PAGES], epoch_next(g), memory_order_relaxed);
}

uint64_t mem_offset_of(const struct region *r, uint64_t page)
{
	return r->offset + (page - r->first_page) * (r->bytes / r->pages);
}

int64_t mem_next_data(struct tierd_guest *g, struct region *r, uint64_t page)
{
	uint64_t offset = mem_offset_of(r, page);
	int64_t data;

	if (r->memfd < 0)
		return INT64_MAX;
	if (g->huge) {
		data = sys_huge_cached(&r->huge, offset - r->offset);
		return data < 0 ? data : (int64_t)offset + !data;
	}
	data = sys_mem_seek_data(r->memfd, offset);
	return data == -ENXIO ? INT64_MAX : data;
}

int mem_exists(struct tierd_guest *g, uint64_t page)
{
	struct region *r = region_of_page(g, page);
	int64_t data;

	if (!g->huge)
		return 0;
	data = mem_next_data(g, r, page);
	return data < 0 ? (int)data : data == (int64_t)mem_offset_of(r, page) ? 0 : -ENOMEM;
}

int mem_put(struct tierd_guest *g, struct region *r, uint64_t page, const void *bytes)
{
	uint64_t offset = mem_offset_of(r, page);
	int64_t data = mem_next_data(g, r, page);
	int error;

	if (data < 0 || data == (int64_t)offset || r->memfd < 0)
		return data < 0 ? (int)data : 0;
	error = g->huge ? sys_huge_place(&r->huge, offset - r->offset, bytes)
			: sys_mem_place(r->memfd, bytes, g->page_bytes, offset);
	return error == -EEXIST ? mem_exists(g, page) : error;
}

uint32_t run_length(struct tierd_guest *g, const uint64_t *pages, uint32_t count)
{
	struct region *r = region_of_page(g, pages[0]);
	uint32_t n = 1;

	while (n < count && pages[n] == pages[0] + n && pages[n] < r->first_page + r->pages)
		n++;
	return n;
}

int leave_sync(struct tierd_guest *g)
{
	int error = g->engine->set_async(g->uffd, true);

	if (!error)
		atomic_store(&g->in_window, false);
	return error;
}

int guest_enter(struct tierd_guest *g)
{
	if (atomic_exchange(&g->worker_busy, true))
		return -EBUSY;
	if (atomic_load(&g->in_window)) /* a window is over, and the kernel refused to leave sync mode */
		leave_sync(g);
	return 0;
}

void guest_leave(struct tierd_guest *g)
{
	atomic_store(&g->worker_busy, false);
}

void count_error(struct tierd_guest *g, _Atomic uint64_t *which, int error)
{
	count_add(which, 1);
	atomic_store_explicit(&g->count.last_errno, (uint64_t)-error, memory_order_relaxed);
}

static int regions_take(struct tierd_guest *g, const struct tierd_guest_args *args)
{
	for (uint32_t i = 0; i < args->region_count; i++) {
		struct region *r = &g->regions[i];

		r->address = args->regions[i].address;
		r->bytes = args->regions[i].bytes;
		r->offset = args->regions[i].offset;
		r->staging = args->regions[i].staging;
		if (!r->bytes || (r->address | r->bytes | r->offset | r->staging) % g->page_bytes ||
		    (r->staging != 0) != g->anon)
			return -EINVAL;
		r->pages = r->bytes / g->page_bytes;
		r->first_page = g->pages;
		g->pages += r->pages;
		r->memfd = args->regions[i].memfd < 0 ? -1 : sys_dup(args->regions[i].memfd);
		g->mapped[g->mapped_count++] = (struct tierd_range){r->address, r->bytes};
		g->region_count++;
		if (r->memfd < 0 && args->regions[i].memfd >= 0)
			return r->memfd;
		if (g->huge && r->memfd >= 0) {
			int error = sys_huge_open(&r->huge, r->memfd, r->offset, r->bytes, g->page_bytes);

			if (error)
				return error;
		}
	}
	return 0;
}

static int descriptors_take(struct tierd_guest *g, const struct tierd_guest_args *args)
{
	g->uffd = sys_dup(args->uffd);
	g->pidfd = sys_dup(args->pidfd);
	g->pagemap = sys_dup(args->pagemap_fd);
	g->mem = g->anon ? sys_dup(args->mem_fd) : -1;
	/* not a seam: the state file is a real one in the model too */
	g->table_fd = args->table_fd;
	if (args->idle_fd >= 0 && g->anon)
		g->idle_fd = sys_dup(args->idle_fd);
	if (g->uffd < 0 || g->pidfd < 0 || g->pagemap < 0 || (g->anon && g->mem < 0))
		return -EBADF;
	for (int i = 0; i < TIERD_TIERS; i++) {
		g->tiers[i] = args->tiers[i];
		if (g->tiers[i].fd < 0)
			continue;
		g->tiers[i].fd = sys_dup(args->tiers[i].fd);
		if (g->tiers[i].fd < 0)
			return g->tiers[i].fd;
	}
	return 0;
}

/* A damaged one keeps nobody from the pages that are elsewhere. */
static int open_pool(struct tierd_guest *g, uint32_t tier)
{
	struct tierd_tier *t = &g->tiers[tier];
	int error;

	if (g->pool_tier)
		return -EINVAL;
	g->pool_tier = tier;
	error = t->flags & TIERD_SPACE_NEW
			? pool_create(t->fd, g->page_bytes, g->pages, (enum codec_kind)t->codec, 0, &g->pool)
			: pool_open(t->fd, g->page_bytes, g->pages, 0, &g->pool);
	if (error == -EBADMSG || error == -ESTALE || error == -EPROTONOSUPPORT) {
		count_error(g, &g->count.store_read_errors, error);
		return 0;
	}
	if (error)
		return error;
	pool_set_capacity(g->pool, t->capacity_bytes);
	return pool_reader_create(g->pool, &g->reader);
}

static int asked_open(struct tierd_guest *g, uint32_t tier, int asked_fd)
{
	int error = g->asking ? 0 : asking_create(g);

	if (error)
		return error;
	if (asked_fd >= 0 && g->asked_fd < 0 && (g->asked_fd = sys_dup(asked_fd)) < 0)
		return g->asked_fd;
	g->garbage[tier] = sys_alloc(bitmap_bytes(g->pages));
	return g->garbage[tier] ? 0 : -ENOMEM;
}

/* The key is the cipher's from then on. A page is one data unit of XTS, which has at most 2^20 blocks (IEEE 1619). */
static int open_file(struct tierd_guest *g, uint32_t tier)
{
	enum { XTS_UNIT_BYTES_MAX = 16 << 20 };
	struct tierd_tier *t = &g->tiers[tier];
	int error;

	if (!(t->flags & TIERD_SPACE_SEALED))
		return 0;
	if (g->page_bytes > XTS_UNIT_BYTES_MAX)
		return -EINVAL;
	error = page_cipher_create(t->key, &g->ciphers[tier]);
	explicit_bzero(t->key, sizeof(t->key));
	return error;
}

/* Only the last tier may be one where a killed process's writes and discards may still land: what sinks from it would be given back
 * there, and nothing says so of a page that has sunk. */
static int tiers_open(struct tierd_guest *g, int asked_fd)
{
	uint32_t late = 0;

	for (uint32_t i = 1; i <= TIERD_LADDER_MAX; i++) {
		struct tierd_tier *t = &g->tiers[i];
		int error;

		atomic_store(&g->capacity_bytes[i], t->capacity_bytes);
		if (!tier_exists(g, i))
			continue;
		if (late)
			return -EINVAL;
		late = t->flags & TIERD_SPACE_LATE;
		error = t->kind == TIERD_KIND_MEMORY  ? open_pool(g, i)
			: t->kind == TIERD_KIND_ASKED ? asked_open(g, i, asked_fd)
						      : open_file(g, i);
		if (error)
			return error;
	}
	if (!late)
		return 0;
	g->quarantine = sys_alloc(bitmap_bytes(g->pages));
	return g->quarantine ? 0 : -ENOMEM;
}

static void copies_count(struct tierd_guest *g)
{
	uint64_t copies[TIERD_TIERS] = {0};

	for (uint64_t page = 0; page < g->pages; page++) {
		page_word w = atomic_load_explicit(&g->words[page], memory_order_relaxed);

		copies[word_tier(w)] += word_takes_space(w);
	}
	for (int tier = 0; tier < TIERD_TIERS; tier++)
		atomic_store(&g->copies[tier], copies[tier]);
}

void use_thread(struct tierd_guest *g, int32_t tid)
{
	g->inject_tid = tid;
	g->filters = tid ? sys_filters(tid) : 0;
}

/* Its memory, descriptors and table. */
static int guest_take(struct tierd_guest *g, const struct tierd_guest_args *args)
{
	uint64_t chunk_bytes = args->chunk_bytes ? args->chunk_bytes : CHUNK_BYTES;
	int error;

	g->huge = args->page_bytes > sys_page_bytes();
	g->page_bytes = g->huge ? args->page_bytes : (uint32_t)sys_page_bytes();
	g->chunk_pages = chunk_bytes > g->page_bytes ? (uint32_t)(chunk_bytes / g->page_bytes) : 1;
	g->anon = args->region_count && args->regions[0].staging;
	g->engine = engine_of(args->engine, g->anon);
	if (!g->engine || (g->anon && g->huge))
		return -EPROTONOSUPPORT;
	g->zap = g->engine->set_async ? 0 : args->zap;
	use_thread(g, args->inject_tid);
	g->use_pagemap = args->use_pagemap && !g->engine->set_async;
	g->spin_us_max = args->spin_us_max;
	g->follow = args->follow;
	g->readahead_max = args->readahead_pages && !g->huge ? args->readahead_pages : 1;
	atomic_store(&g->readahead_pages, g->readahead_max);
	if (!g->chunk_pages || args->region_count > TIERD_REGIONS_MAX)
		return -EINVAL;
	error = regions_take(g, args);
	if (error)
		return error;
	error = descriptors_take(g, args);
	if (error)
		return error;
	return table_map(g);
}

static int guest_fill(struct tierd_guest *g, const struct tierd_guest_args *args)
{
	int error = guest_take(g, args);

	if (error)
		return error;
	error = table_pin(g);
	if (error)
		return error;
	g->header->serving.engine = args->engine;
	g->header->serving.readahead_pages = g->readahead_max;
	error = tiers_open(g, args->asked_fd);
	if (error)
		return error;
	copies_count(g);
	g->chunks = g->pages / g->chunk_pages + 1;
	error = parking_create(g);
	if (error)
		return error;
	g->missing = sys_alloc(g->chunks);
	g->touched = sys_alloc(bitmap_bytes(g->chunk_pages));
	g->other = sys_alloc(bitmap_bytes(g->chunk_pages));
	g->aged = sys_alloc(g->chunks * sizeof(*g->aged));
	g->large = sys_alloc(bitmap_bytes(g->pages));
	if (g->anon) {
		g->heat = sys_alloc(g->pages / GROUP_PAGES + 1);
		g->refaults = sys_alloc(g->pages / GROUP_PAGES + 1);
	}
	if (g->idle_fd >= 0)
		g->idle_asked = sys_alloc(g->pages);
	g->idle_round = 1;
	if (g->huge)
		g->zeros = sys_alloc(g->page_bytes);
	if (!g->missing || !g->touched || !g->other || !g->aged || !g->large || (g->huge && !g->zeros) ||
	    (g->anon && (!g->heat || !g->refaults)) || (g->idle_fd >= 0 && !g->idle_asked))
		return -ENOMEM;
	return tierd_worker_create(g, &g->restorer);
}

static struct tierd_guest *guest_alloc(void)
{
	struct tierd_guest *g = sys_alloc(sizeof(*g));

	if (!g)
		return NULL;
	g->bytes = sizeof(*g);
	pthread_mutex_init(&g->threads_lock, NULL);
	g->uffd = g->pidfd = g->pagemap = g->mem = g->idle_fd = g->stop_fd = g->asked_fd = g->answer_fd = -1;
	for (int i = 0; i < TIERD_TIERS; i++)
		g->tiers[i].fd = -1;
	return g;
}

int tierd_guest_create(const struct tierd_guest_args *args, struct tierd_guest **ret)
{
	struct tierd_guest *g = guest_alloc();
	int error;

	if (!g)
		return -ENOMEM;
	error = guest_fill(g, args);
	if (error) {
		tierd_guest_destroy(g);
		return error;
	}
	*ret = g;
	return 0;
}

void tierd_guest_destroy(struct tierd_guest *g)
{
	int fds[] = {g ? g->uffd : -1, g ? g->pidfd : -1, g ? g->pagemap : -1, g ? g->mem : -1, g ? g->idle_fd : -1};

	if (!g)
		return;
	threads_stop(g);
	if (g->restorer)
		tierd_worker_destroy(g->restorer);
	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			sys_close(fds[i]);
	for (uint32_t i = 0; i < g->region_count; i++) {
		if (g->regions[i].huge.memory)
			sys_huge_close(&g->regions[i].huge);
		if (g->regions[i].memfd >= 0)
			sys_close(g->regions[i].memfd);
	}
	if (g->reader)
		pool_reader_destroy(g->reader);
	if (g->pool)
		pool_close(g->pool);
	for (int i = 0; i < TIERD_TIERS; i++)
		if (g->tiers[i].fd >= 0)
			sys_close(g->tiers[i].fd);
	if (g->missing)
		sys_free(g->missing, g->chunks);
	if (g->zeros)
		sys_free(g->zeros, g->page_bytes);
	if (g->touched)
		sys_free(g->touched, bitmap_bytes(g->chunk_pages));
	if (g->other)
		sys_free(g->other, bitmap_bytes(g->chunk_pages));
	if (g->aged)
		sys_free(g->aged, g->chunks * sizeof(*g->aged));
	if (g->heat)
		sys_free(g->heat, g->pages / GROUP_PAGES + 1);
	if (g->refaults)
		sys_free(g->refaults, g->pages / GROUP_PAGES + 1);
	if (g->large)
		sys_free(g->large, bitmap_bytes(g->pages));
	if (g->idle_asked)
		sys_free(g->idle_asked, g->pages);
	if (g->quarantine)
		sys_free(g->quarantine, bitmap_bytes(g->pages));
	parking_destroy(g);
	for (int tier = 0; tier < TIERD_TIERS; tier++)
		page_cipher_destroy(g->ciphers[tier]);
	asking_destroy(g);
	if (g->asked_fd >= 0)
		sys_close(g->asked_fd);
	table_unmap(g);
	pthread_mutex_destroy(&g->threads_lock);
	sys_free(g, g->bytes);
}

void tierd_guest_set_readahead(struct tierd_guest *g, uint32_t readahead_pages)
{
	g->header->serving.readahead_pages = readahead_pages; /* a successor's buffers may be larger */
	if (readahead_pages > g->readahead_max)
		readahead_pages = g->readahead_max;
	atomic_store(&g->readahead_pages, readahead_pages ? readahead_pages : 1);
}

void tierd_guest_set_capacity(struct tierd_guest *g, uint32_t tier, uint64_t bytes)
{
	if (tier > TIERD_LADDER_MAX)
		return;
	atomic_store(&g->capacity_bytes[tier], bytes);
	if (tier_is_pool(g, tier) && g->pool)
		pool_set_capacity(g->pool, bytes);
}

void tierd_guest_set_uffd_in_vmm(struct tierd_guest *g, int32_t uffd_in_vmm)
{
	g->header->serving.uffd_moved = uffd_in_vmm + 1;
}

void tierd_guest_set_handshake(struct tierd_guest *g)
{
	g->header->serving.handshake = 1;
}

int tierd_guest_lost(struct tierd_guest *g, uint64_t *next_page, uint64_t *addresses, uint32_t max, uint32_t *count)
{
	uint64_t page = *next_page;

	for (*count = 0; page < g->pages && *count < max; page++)
		if (word_state(page_load(g, page)) == LOST)
			addresses[(*count)++] = address_of(g, page);
	*next_page = page;
	return 0;
}

static int register_mapped(struct tierd_guest *g, uint64_t address, uint64_t bytes, uint64_t mode)
{
	for (uint32_t i = 0; i < g->mapped_count; i++) {
		struct tierd_range *m = &g->mapped[i];
		uint64_t from = address > m->address ? address : m->address;
		uint64_t to = address + bytes < m->address + m->bytes ? address + bytes : m->address + m->bytes;
		int error = from < to ? sys_uffd_register(g->uffd, from, to - from, mode) : 0;

		if (error)
			return error;
	}
	return 0;
}

/* The VMM may have executed another program meanwhile; and a seccomp filter that it has installed may kill it for a call of ours:
 * whether it is one of QEMU's, which does not, Python finds out (serve.py), and chooses the thread anew. Of a filter that comes
 * between this look and the call, for all of its threads at once, nobody can know: that is a moment of microseconds. */
int may_enter(struct tierd_guest *g)
{
	int32_t gone = 0;
	int error = tierd_guest_gone(g, &gone);
	int64_t filters;

	if (error || gone)
		return error ? error : -ESRCH;
	filters = sys_filters(g->inject_tid);
	return filters < 0 ? (int)filters : filters == g->filters ? 0 : -EPERM;
}

/* MISSING for the chunk of `page`, before its first page may leave: a chunk nobody evicted from costs nothing on first
 * touch. Always all modes: REGISTER replaces those that it knows. */
int missing_register(struct tierd_guest *g, uint64_t page)
{
	uint64_t chunk = page / g->chunk_pages, first = chunk * g->chunk_pages, end = first + g->chunk_pages;

	if (g->missing[chunk])
		return 0;
	for (uint32_t i = 0; i < g->region_count; i++) {
		struct region *r = &g->regions[i];
		uint64_t from = first > r->first_page ? first : r->first_page;
		uint64_t to = end < r->first_page + r->pages ? end : r->first_page + r->pages;
		int error;

		if (from >= to)
			continue;
		error = register_mapped(g, r->address + (from - r->first_page) * g->page_bytes,
					(to - from) * g->page_bytes, g->engine->mode_missing);
		if (error)
			return error;
	}
	g->missing[chunk] = 1;
	atomic_fetch_add(&g->missing_chunks, 1);
	return 0;
}

static int register_all(struct tierd_guest *g)
{
	int error = register_mapped(g, 0, UINT64_MAX, g->engine->mode);

	return error || !g->anon ? error : staged_register(g);
}

static void mark_page(struct tierd_guest *g, uint64_t page, uint16_t epoch)
{
	page_word w = page_load(g, page);

	if (word_untouched(w))
		page_move(g, page, w, word_with_tier(word_with_epoch(w, epoch), TIER_ZERO));
}

static int mark_huge(struct tierd_guest *g, struct region *r)
{
	for (uint64_t page = r->first_page; page < r->first_page + r->pages; page++) {
		int cached = sys_huge_cached(&r->huge, mem_offset_of(r, page) - r->offset);

		if (cached < 0)
			return cached;
		if (cached)
			mark_page(g, page, epoch_next(g));
	}
	return 0;
}

/* The pages of r in pieces of at most a chunk: `page` is moved on, its length is returned; 0 at the end. */
static uint64_t next_piece(struct tierd_guest *g, struct region *r, uint64_t *page)
{
	uint64_t end = r->first_page + r->pages, n = end - *page < g->chunk_pages ? end - *page : g->chunk_pages;

	*page += n;
	return n;
}

static int mark_anon(struct tierd_guest *g, struct region *r)
{
	uint64_t n, page = r->first_page;

	while ((n = next_piece(g, r, &page))) {
		int error = scan_there(g, address_of(g, page - n), n, g->touched);

		if (error)
			return error;
		for (uint64_t i = 0; i < n; i++)
			if (bit_get(g->touched, i))
				mark_page(g, page - n + i, epoch_next(g));
	}
	return 0;
}

/* What the file already holds counts as touched now; the rest was never touched and needs no eviction. */
static int mark_data(struct tierd_guest *g, struct region *r)
{
	int64_t data = (int64_t)r->offset, hole;
	uint64_t end = r->offset + r->bytes;

	if (g->huge)
		return mark_huge(g, r);
	if (g->anon)
		return mark_anon(g, r);
	while ((data = sys_mem_seek_data(r->memfd, (uint64_t)data)) >= 0 && (uint64_t)data < end) {
		uint16_t epoch = epoch_next(g);

		hole = sys_mem_seek_hole(r->memfd, (uint64_t)data);
		if (hole < 0)
			return (int)hole;
		for (uint64_t at = (uint64_t)data; at < (uint64_t)hole && at < end; at += g->page_bytes)
			mark_page(g, r->first_page + (at - r->offset) / g->page_bytes, epoch);
		data = hole;
	}
	return data < 0 && data != -ENXIO ? (int)data : 0;
}

int tierd_guest_arm(struct tierd_guest *g)
{
	int error = guest_enter(g);

	if (error)
		return error;
	error = register_all(g);
	for (uint32_t i = 0; !error && i < g->region_count; i++)
		error = mark_data(g, &g->regions[i]);
	if (!error && g->anon)
		error = sys_inside_create(g->inject_tid, &g->header->serving.calls);
	guest_leave(g);
	return error;
}

int tierd_guest_gone(struct tierd_guest *g, int32_t *ret)
{
	uint64_t entry;

	/* the descriptor is bound to the address space: of one that is no more there is nothing to read */
	*ret = sys_pagemap_read(g->pagemap, &entry, 1, g->regions[0].address) == 0;
	return 0;
}

/* The VMM may have unmapped it: there is nothing to unregister then. */
static bool not_mapped(int error)
{
	return error == -EINVAL || error == -ENOMEM || error == -ENOENT;
}

/*
 * A region, or its staging area from `address` on, chunk by chunk: the kernel has the VMM's mmap_lock while it walks what was registered.
 * The same chunks as elsewhere, by numbers of pages: where a kill leaves off there is a border of mappings, and kernels before 6.4 lift
 * holds of one mapping at a time. The first error; the rest is tried in spite of it.
 */
static int unregister(struct tierd_guest *g, const struct region *r, uint64_t address)
{
	int first = 0;

	for (uint64_t n, at = 0; at < r->pages; at += n) {
		uint64_t from = address + at * g->page_bytes;
		int error;

		n = g->chunk_pages - (r->first_page + at) % g->chunk_pages;
		if (n > r->pages - at)
			n = r->pages - at;
		error = sys_uffd_unregister(g->uffd, from, n * g->page_bytes);
		/* the kernel wakes before it unregisters, so a fault under way (it holds its VMA only) may have missed that */
		if (!error)
			sys_uffd_wake(g->uffd, from, n * g->page_bytes);
		if (error && !not_mapped(error) && !first)
			first = error;
	}
	return first;
}

int tierd_guest_disarm(struct tierd_guest *g)
{
	int error = guest_enter(g), first = 0;

	if (error)
		return error;
	for (uint64_t page = 0; page < g->pages && !first; page++)
		if (word_state(page_load(g, page)) != RESIDENT)
			first = -EBUSY;
	for (uint32_t i = 0; i < g->region_count && first != -EBUSY; i++) {
		error = unregister(g, &g->regions[i], g->regions[i].address);
		if (!first)
			first = error;
	}
	/* whoever dies before it is unmapped leaves nothing that is registered: it looks like RAM to the next attach */
	for (uint32_t i = 0; i < g->region_count && !first && g->anon; i++)
		first = unregister(g, &g->regions[i], g->regions[i].staging);
	guest_leave(g);
	return first;
}

/*
 * Adoption. The predecessor's last thread is gone (the caller holds the lock), so nobody moves a page but us. The kernel is
 * believed before the table: a page that is in the page cache is RESIDENT, whatever was being done to it.
 */
static page_word adopted_word(page_word w, bool cached)
{
	switch (word_state(w)) {
	case RESIDENT:
	case LOST:
		return w;
	case RESOLVING: /* it was being given zeros or un-held: not in the cache, it is a hole, as before */
	case LEAVING:   /* not in the cache, the VMM gave it back itself */
	case STAGING:   /* not in the staging area */
		return word_with_state(w, RESIDENT);
	default: /* DROPPING, STORED, MOVING, ARRIVING: each carries its tier */
		return word_with_state(w, cached ? RESIDENT : STORED);
	}
}

/* Whether the predecessor may have had a write or a discard of the page's space in flight: a write marks the word before it
 * begins, a discard only after it has ended. A page that stays quarantined keeps its mark, for the successor's successor. Of a page
 * that is on its way to the next tier, or taken back from there, the word speaks of where it was. */
static bool in_flight(struct tierd_guest *g, page_word w)
{
	bool last = g->tiers[word_tier(w)].flags & TIERD_SPACE_LATE; /* nothing sinks from there */

	if (word_tier(w) == TIER_STAGING)
		return word_copy(w) && word_state(w) != STORED;
	if (word_copy(w) && !last && (word_state(w) == MOVING || word_state(w) == ARRIVING || word_state(w) == LOST))
		return true;
	return word_copy(w) && (word_state(w) == RESIDENT || word_state(w) == RESOLVING || word_state(w) == LEAVING);
}

static bool all_zero(const uint8_t *page, size_t bytes)
{
	return !*page && !memcmp(page, page + 1, bytes - 1);
}

static int punch_again(struct tierd_guest *g, uint64_t page)
{
	struct region *r = region_of_page(g, page);
	uint64_t offset = mem_offset_of(r, page);
	int error = sys_mem_punch(r->memfd, offset, g->page_bytes);
	int64_t data = error ? error : mem_next_data(g, r, page);

	return data < 0 ? (int)data : data == (int64_t)offset ? -EBUSY : 0;
}

/* Bytes of a page that its tier has, back into the memory file. -EBUSY: the tier does not give them. */
static int write_back(struct tierd_guest *g, uint64_t page, page_word w, void *bytes)
{
	struct region *r = region_of_page(g, page);
	bool filled = word_tier(w) == TIER_ZERO;
	int error = filled ? 0 : tier_read(g, g->reader, word_tier(w), page, 1, bytes);

	if (filled)
		fill_with(bytes, g->page_bytes, g->sums[page]);
	else if (error)
		count_error(g, &g->count.store_read_errors, error);
	else if (checksum(bytes, g->page_bytes) != g->sums[page])
		count_error(g, &g->count.checksum_errors, error = -EBADMSG);
	if (error)
		return -EBUSY;
	return sys_mem_write(r->memfd, bytes, g->page_bytes, mem_offset_of(r, page)) == (ssize_t)g->page_bytes ? 0
													       : -EIO;
}

/*
 * A page that is DROPPING and still in the page cache was not punched yet, or in vain (evict.c, settle_dropped): then it holds
 * zeros, and its bytes are in the store or, where one word fills it, in the table. It is punched again, and waits for them there:
 * so no store need answer. Only where that is in vain, too, are they written back. Anything else is the kernel's truth: so always
 * with hugetlbfs, which punches a page as a whole or not at all. `bytes` is room for a page.
 */
static int repair_unpunched(struct tierd_guest *g, uint64_t page, page_word w, void *bytes, page_word *to)
{
	struct region *r = region_of_page(g, page);

	if (sys_mem_read(r->memfd, bytes, g->page_bytes, mem_offset_of(r, page)) != (ssize_t)g->page_bytes)
		return -EIO;
	if (!all_zero(bytes, g->page_bytes))
		return 0;
	if (punch_again(g, page))
		return write_back(g, page, w, bytes);
	*to = word_with_state(w, STORED);
	return 0;
}

static int adopt_unpunched(struct tierd_guest *g, uint64_t page, page_word w, page_word *to)
{
	void *bytes = g->huge ? NULL : sys_alloc(g->page_bytes);
	int error = g->huge ? 0 : bytes ? repair_unpunched(g, page, w, bytes, to) : -ENOMEM;

	if (bytes)
		sys_free(bytes, g->page_bytes);
	return error;
}

/* Whether the entry of a page that is not in the cache is poison. A hold's marker has bit 57; of a huge page /proc/PID/pagemap
 * shows no markers, and PAGEMAP_SCAN says of those that are no hold's that they are written. An engine that holds what is mapped
 * has no markers, and kernels that have it say of nothing there that it is written. */
static int look_for_poison(struct tierd_guest *g, uint64_t address, bool *ret)
{
	const uint64_t poison = SYS_PAGE_SWAPPED | (g->engine->holds_mapped ? 0 : SYS_PAGE_WRITTEN);
	const struct sys_scan wanted = {.any_of = poison};
	struct sys_page_region found = {0};
	uint64_t entry = 0, end;
	ssize_t n;

	do
		n = g->huge ? sys_pagemap_scan(g->pagemap, address, address + g->page_bytes, wanted, &found, 1, &end)
			    : sys_pagemap_read(g->pagemap, &entry, 1, address);
	while (n == -EINTR);
	*ret = g->huge ? n == 1 && (found.categories & poison) == poison
		       : (entry >> 62 & 1) && !(entry >> 63) && !(entry >> 57 & 1);
	return n < 0 ? (int)n : n || g->huge ? 0 : -ESRCH;
}

/* An operator's retry of a LOST page that did not come to its end: its poison is there still, and nobody would wait at it. */
static int still_lost(struct tierd_guest *g, uint64_t page, page_word w, bool *ret)
{
	*ret = false;
	return word_state(w) == ARRIVING ? look_for_poison(g, address_of(g, page), ret) : 0;
}

/* `to` is what the page would be else: one that is STORED is MOVING still, so that the next successor knows. */
static page_word adopt_in_flight(struct tierd_guest *g, uint64_t page, page_word to, struct tierd_adoption *ret)
{
	if (!g->quarantine)
		return to;
	bit_set(g->quarantine, page);
	atomic_fetch_add(&g->quarantined_pages, 1);
	ret->quarantined_pages++;
	return word_state(to) == STORED ? word_with_state(to, MOVING) : to;
}

/* The page is `to` from now on. */
static void adopt_as(struct tierd_guest *g, uint64_t page, page_word w, page_word to, struct tierd_adoption *ret)
{
	if (to != w) {
		if (word_state(to) == RESIDENT ||
		    word_state(w) == STAGING) /* it was with the guest until a moment ago */
			to = word_with_epoch(to, epoch_next(g));
		atomic_store_explicit(&g->words[page], to, memory_order_release);
		ret->corrected_pages++;
	}
	if (word_spent(to))
		atomic_fetch_add(&g->spent_pages, 1);
	ret->resident_pages += word_state(to) == RESIDENT;
	ret->stored_pages += word_state(to) == STORED || word_state(to) == MOVING;
	ret->lost_pages += word_state(to) == LOST;
}

/* Those that the predecessor registered are so still, but we do not know which. */
static int register_away(struct tierd_guest *g, uint64_t page)
{
	return word_state(page_load(g, page)) == RESIDENT ? 0 : missing_register(g, page);
}

static int adopt_page(struct tierd_guest *g, uint64_t page, bool cached, struct tierd_adoption *ret)
{
	page_word w = page_load(g, page), to = word_with_clean(adopted_word(w, cached), false); /* protections go */
	bool lost = false;
	int error = cached ? 0 : still_lost(g, page, w, &lost);

	if (error)
		return error;
	if (lost)
		to = word_with_state(w, LOST);

	if (in_flight(g, w))
		to = adopt_in_flight(g, page, to, ret);
	if (word_state(w) == DROPPING && cached && (word_tier(w) != TIER_ZERO || g->sums[page]))
		error = adopt_unpunched(g, page, w, &to);
	if (!error)
		adopt_as(g, page, w, to, ret);
	return error;
}

/*
 * Of anonymous memory: a page is where the kernel says. With the guest: RESIDENT, and what the staging area has of it is spent. Else
 * in the staging area, where nobody writes: STORED there, if it was on its way in or out. Else as the word says.
 */
static page_word adopted_anon_word(page_word w, bool with_guest, bool staged)
{
	enum page_state state = word_state(w);

	if (staged && (state == STAGING || state == DROPPING))
		return word_with_copy(word_with_tier(word_with_state(w, with_guest ? RESIDENT : STORED), TIER_STAGING),
				      true);
	return adopted_word(w, with_guest);
}

/* Not mapped, and something is there: swapped out, or poison (of a page that an operator's retry had in hand). Poison is an entry of
 * the last type of all, where /proc/PID/pagemap shows it (with CAP_SYS_ADMIN); else it is taken for that: a page that is LOST and
 * is there after all is RESIDENT with the next retry. */
static int anon_poisoned(struct tierd_guest *g, uint64_t page, bool *ret)
{
	enum { TYPE_BITS = 5, MARKER = 31 };
	uint64_t entry = 0;
	ssize_t n;

	do
		n = sys_pagemap_read(g->pagemap, &entry, 1, address_of(g, page));
	while (n == -EINTR);
	*ret = !(entry >> 63) && (entry >> 62 & 1) &&
	       (!(entry & ((1ull << 55) - 1)) || (entry & ((1 << TYPE_BITS) - 1)) == MARKER);
	return n < 0 ? (int)n : n ? 0 : -ESRCH;
}

static int adopt_anon_page(struct tierd_guest *g, uint64_t page, bool with_guest, bool staged,
			   struct tierd_adoption *ret)
{
	page_word w = page_load(g, page), to = adopted_anon_word(w, with_guest, staged);
	bool lost = false;
	int error = with_guest && word_state(w) == ARRIVING && word_tier(w) != TIER_ZERO /* which is never LOST */
			    ? anon_poisoned(g, page, &lost)
			    : 0;

	if (error)
		return error;
	if (lost)
		to = word_with_state(w, LOST);
	if (in_flight(g, w) || (word_state(w) == DROPPING && staged)) /* that may be a discard */
		to = adopt_in_flight(g, page, to, ret);
	adopt_as(g, page, w, to, ret);
	return 0;
}

static int adopt_anon(struct tierd_guest *g, struct region *r, struct tierd_adoption *ret)
{
	uint64_t n, page = r->first_page;

	while ((n = next_piece(g, r, &page))) {
		uint64_t first = page - n;
		int error = scan_there(g, address_of(g, first), n, g->touched);

		if (!error)
			error = scan_there(g, staging_of(r, first), n, g->other);
		for (uint64_t i = 0; !error && i < n; i++) {
			error = adopt_anon_page(g, first + i, bit_get(g->touched, i), bit_get(g->other, i), ret);
			if (!error)
				error = register_away(g, first + i);
		}
		if (error)
			return error;
	}
	return 0;
}

static bool in_pool(void *argument, uint64_t page)
{
	struct tierd_guest *g = argument;
	page_word w = page_load(g, page);

	return word_copy(w) && tier_is_pool(g, word_tier(w));
}

static void not_in_pool(void *argument, uint64_t page)
{
	struct tierd_guest *g = argument;

	(void)page; /* it is found out again when somebody wants it */
	count_error(g, &g->count.store_read_errors, -EBADMSG);
}

/* What no word speaks of is nobody's: a page that was written and not yet marked, one that sank. */
static int adopt_pool(struct tierd_guest *g)
{
	int error;

	if (!g->pool)
		return 0;
	do
		error = pool_adopt(g->pool, in_pool, not_in_pool, g);
	while (error == -EINTR);
	return error;
}

/* A tier that Python asks may have been given, or may not have been told to discard, what no word says that it has. */
static void adopt_asked(struct tierd_guest *g)
{
	for (uint32_t tier = 1; tier <= TIERD_LADDER_MAX; tier++)
		for (uint64_t page = 0; g->garbage[tier] && page < g->pages; page++) {
			page_word w = page_load(g, page);

			if (!word_copy(w) || word_tier(w) != tier)
				bit_set(g->garbage[tier], page);
		}
}

/* Killed in a batch of calls, the predecessor left the VMM to make them. */
static int settle_inside(struct tierd_guest *g)
{
	struct sys_inside in = inside_of(g);

	return in.area ? sys_inside_settle(&in) : 0;
}

static int adopt_region(struct tierd_guest *g, struct region *r, struct tierd_adoption *ret)
{
	uint64_t end = r->first_page + r->pages;
	int64_t data = -1; /* the first offset with data at or after the last one asked for */

	for (uint64_t page = r->first_page; page < end; page++) {
		uint64_t offset = mem_offset_of(r, page);
		bool cached = true; /* not asked for where the word says RESIDENT */
		int error;

		if (word_state(page_load(g, page)) != RESIDENT) {
			if (data < (int64_t)offset) {
				data = mem_next_data(g, r, page);
				if (data < 0)
					return (int)data;
			}
			cached = data == (int64_t)offset;
		}
		error = adopt_page(g, page, cached, ret);
		if (!error)
			error = register_away(g, page);
		if (error)
			return error;
	}
	return 0;
}

/*
 * First of all: killed in a window, the predecessor left the guest to wait at every page that it had not touched lately. But a
 * page that is DROPPING is decided while the guest waits still: what it writes to a page that is not punched yet would be
 * taken for a punch's doing if it wrote zeros, and what it reads of one that was punched in vain is zeros. These are a batch at most, and
 * nothing else must come between: a hole is MISSING to the kernel, who was told so before the punch.
 * -EBUSY: one of them cannot be decided without its store, and the guest waits still.
 */
static int leave_window(struct tierd_guest *g, struct tierd_adoption *ret)
{
	struct tierd_adoption early = {0};
	bool undecided = false;

	for (uint64_t page = 0; page < g->pages; page++) {
		struct region *r;
		int64_t data;
		int error;

		if (word_state(page_load(g, page)) != DROPPING)
			continue;
		r = region_of_page(g, page);
		data = mem_next_data(g, r, page);
		if (data < 0)
			return (int)data;
		error = adopt_page(g, page, data == (int64_t)mem_offset_of(r, page), &early);
		if (error && error != -EBUSY)
			return error;
		undecided |= error != 0;
	}
	ret->corrected_pages += early.corrected_pages;
	return undecided ? -EBUSY : g->engine->set_async(g->uffd, true);
}

int tierd_leave_window(const struct tierd_guest_args *args)
{
	struct tierd_adoption ignored = {0};
	struct tierd_guest *g = guest_alloc();
	int error = g ? guest_take(g, args) : -ENOMEM;

	if (!error && g->engine->set_async)
		error = leave_window(g, &ignored);
	tierd_guest_destroy(g);
	return error == -EBUSY ? 0 : error;
}

/* Before 6.4 WRITEPROTECT takes one mapping at a time, and chunks that are registered MISSING are mappings of their own. */
static int unprotect_by_chunk(struct tierd_guest *g, const struct tierd_range *mapped)
{
	uint64_t end = mapped->address + mapped->bytes, next;
	int error = 0;

	for (uint64_t at = mapped->address; !error && at < end; at = next) {
		uint64_t page = (uint64_t)page_of_address(g, at);

		next = at + (g->chunk_pages - page % g->chunk_pages) * g->page_bytes;
		if (next > end)
			next = end;
		error = sys_uffd_unprotect(g->uffd, at, next - at);
	}
	return error;
}

int tierd_guest_adopt(struct tierd_guest *g, const struct tierd_range *mapped, uint32_t count,
		      struct tierd_adoption *ret)
{
	uint64_t began_ns = sys_now_ns();
	int error = guest_enter(g);

	if (error)
		return error;
	memset(ret, 0, sizeof(*ret));
	if (count > TIERD_RANGES_MAX) {
		guest_leave(g);
		return -E2BIG;
	}
	memmove(g->mapped, mapped, count * sizeof(*mapped));
	g->mapped_count = count;
	if (g->anon)
		error = settle_inside(g);
	/* before any page is read from it, and before a word says less than it does now */
	if (!error)
		error = adopt_pool(g);
	if (!error && g->engine->set_async)
		error = leave_window(g, ret);
	if (!error)
		error = register_all(g);
	for (uint32_t i = 0; !error && i < g->region_count; i++)
		error = g->anon ? adopt_anon(g, &g->regions[i], ret) : adopt_region(g, &g->regions[i], ret);
	if (!error && g->anon && !g->header->serving.calls)
		error = sys_inside_create(g->inject_tid, &g->header->serving.calls);
	if (!g->engine->holds_mapped && !g->anon)
		for (uint32_t i = 0; !error && i < count; i++)
			error = unprotect_by_chunk(g, &mapped[i]);
	if (!error)
		adopt_asked(g);
	/* messages that the predecessor had read are not delivered again until a wake */
	for (uint32_t i = 0; !error && i < count; i++)
		error = sys_uffd_wake(g->uffd, mapped[i].address, mapped[i].bytes);
	ret->ns = sys_now_ns() - began_ns;
	guest_leave(g);
	return error;
}

uint32_t stored_age(const struct tierd_guest *g, uint64_t page, uint16_t now, page_word w)
{
	return word_tier(w) == TIER_STAGING ? epoch_age(now, word_epoch(w)) : page_age(g, page, now, w);
}

int tierd_guest_idle(struct tierd_guest *g, uint32_t tier, const double *edges_s, uint32_t count, uint64_t *ret)
{
	uint16_t now = epoch_now(g);
	double epoch_s = (double)g->epoch_ns / 1e9;

	if (tier == TIER_GUEST && g->engine->reads_unseen)
		tier = TIER_STAGING; /* what may leave, and since when it is known that nobody reads it */
	memset(ret, 0, count * sizeof(*ret));
	for (uint64_t page = 0; page < g->pages; page++) {
		page_word w = atomic_load_explicit(&g->words[page], memory_order_relaxed);
		double idle_s = stored_age(g, page, now, w) * epoch_s;
		uint32_t i = count;

		bool here = word_state(w) == RESIDENT && !word_untouched(w);

		if (tier == TIER_GUEST && g->anon) /* what a batch has left there is still to leave */
			here |= word_state(w) == STORED && word_tier(w) == TIER_STAGING;
		else if (tier != TIER_GUEST)
			here = word_state(w) == STORED && word_tier(w) == tier;
		if (!here)
			continue;
		while (i && idle_s < edges_s[i - 1])
			i--;
		if (i)
			ret[i - 1]++;
	}
	return 0;
}

int tierd_guest_tier_counters(struct tierd_guest *g, uint32_t tier, struct tierd_tier_counters *ret)
{
	struct tier_count *c = &g->tier_counts[tier % TIERD_TIERS];

	memset(ret, 0, sizeof(*ret));
	if (tier >= TIERD_TIERS || !tier_exists(g, tier))
		return -ENODEV;
	ret->used_bytes = atomic_load(&g->copies[tier]) * g->page_bytes;
	if (tier_is_pool(g, tier) && g->pool) {
		struct pool_counters in_pool;

		pool_counters(g->pool, &in_pool);
		ret->used_bytes = in_pool.used_bytes;
		ret->metadata_bytes = in_pool.metadata_bytes;
		ret->compressed_bytes = in_pool.object_bytes;
	}
#define COPY(field) ret->field = atomic_load_explicit(&c->field, memory_order_relaxed)
	COPY(written_pages);
	COPY(read_pages);
	COPY(refused_pages);
	COPY(write_errors);
	COPY(read_errors);
	COPY(checksum_errors);
	COPY(read_sum_ns);
	for (int i = 0; i < TIERD_LATENCY_BUCKETS; i++)
		COPY(read_buckets[i]);
#undef COPY
	return 0;
}

/* Whether it is on its way to another tier or not. */
static bool stored(page_word w)
{
	return word_state(w) == STORED || word_state(w) == MOVING;
}

void tierd_guest_counters(struct tierd_guest *g, struct tierd_counters *ret)
{
	struct counters *c = &g->count;

	memset(ret, 0, sizeof(*ret));
	ret->pages = g->pages;
	for (uint64_t page = 0; page < g->pages; page++) {
		page_word w = atomic_load_explicit(&g->words[page], memory_order_relaxed);

		ret->state_pages[stored(w) ? STORED : word_state(w) % PAGE_STATES]++;
		ret->tier_pages[word_tier(w)] += stored(w);
		ret->untouched_pages += word_untouched(w);
		ret->stale_pages += word_state(w) == RESIDENT && word_takes_space(w);
		ret->spent_pages += word_spent(w);
	}
#define COPY(field) ret->field = atomic_load_explicit(&c->field, memory_order_relaxed)
	COPY(faults_fetch);
	COPY(faults_zero);
	COPY(faults_cancel);
	COPY(faults_resolve);
	COPY(faults_wait);
	COPY(faults_failed);
	COPY(pages_fetched);
	COPY(pages_readahead);
	COPY(pages_restored);
	COPY(pages_evicted);
	COPY(pages_evicted_zero);
	COPY(pages_cancelled);
	COPY(pages_lost);
	COPY(pages_repaired);
	COPY(pages_unwritten);
	COPY(pages_demoted);
	COPY(pages_refused);
	COPY(pages_staged);
	COPY(pages_unmovable);
	COPY(faults_staged);
	COPY(pages_refaulted);
	COPY(store_read_errors);
	COPY(store_write_errors);
	COPY(checksum_errors);
	COPY(kernel_errors);
	COPY(last_errno);
	COPY(inject_stops);
	COPY(inject_stopped_ns);
	COPY(large_folios_split);
	COPY(faults_window);
	COPY(windows);
	COPY(window_sum_ns);
	COPY(latency_count);
	COPY(latency_sum_ns);
	for (int i = 0; i < TIERD_LATENCY_BUCKETS; i++)
		COPY(latency_buckets[i]);
	for (int i = 0; i < TIERD_LATENCY_BUCKETS; i++)
		COPY(window_buckets[i]);
	for (int i = 0; i < TIERD_LATENCY_BUCKETS; i++)
		COPY(stop_buckets[i]);
#undef COPY
	ret->quarantined_pages = atomic_load(&g->quarantined_pages);
	ret->missing_chunks = atomic_load(&g->missing_chunks);
	ret->parked_pages = atomic_load(&g->parked_pages) + atomic_load(&g->asked_pages);
	ret->fault_threads = atomic_load(&g->thread_count);
}
