/* SPDX-License-Identifier: Apache-2.0 */
/* table.c: the state file: header, page words, checksums; the legal moves of a page. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __aarch64__
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

#include "internal.h"

/* as much as x86-64 has addresses for: sums of 32 regions cannot overflow */
static const uint64_t REGION_BYTES_MAX = 1ull << 57;
/* buffers hold whole pages, several of them, and are locked */
static const uint64_t PAGE_BYTES_MAX = 1 << 30;
static const char MAGIC[8] = "tierd\0\0";

#define TO(state) (1u << (state))

/* The one place that knows which moves exist. A move to the same state changes tier, copy bit or epoch only. */
static const uint16_t LEGAL[PAGE_STATES] = {
	[RESIDENT] = TO(RESIDENT) | TO(RESOLVING) | TO(LEAVING) | TO(STAGING),
	[RESOLVING] = TO(RESIDENT),
	[LEAVING] = TO(LEAVING) | TO(DROPPING) | TO(RESIDENT) | TO(RESOLVING),
	[DROPPING] = TO(STORED) | TO(RESIDENT),
	[STORED] = TO(STORED) | TO(ARRIVING) | TO(MOVING),
	[MOVING] = TO(STORED) | TO(ARRIVING) | TO(DROPPING),
	[ARRIVING] = TO(RESIDENT) | TO(STORED) | TO(MOVING) | TO(LOST),
	[LOST] = TO(ARRIVING),
	[STAGING] = TO(STORED) | TO(RESIDENT),
};

/* Clean is a page only from its fetch on, and never after a state in which its protection is lifted. */
static bool may_be_clean(page_word from, page_word to)
{
	if (word_state(to) == RESIDENT)
		return word_state(from) == ARRIVING || (word_state(from) == RESIDENT && word_clean(from));
	return word_state(to) == LEAVING && word_clean(from);
}

bool page_move(struct tierd_guest *g, uint64_t page, page_word from, page_word to)
{
	if (word_state(from) >= PAGE_STATES || !(LEGAL[word_state(from)] & TO(word_state(to))))
		abort();
	if (word_clean(to) && !may_be_clean(from, to))
		abort();
	TIERD_YIELD();
	return atomic_compare_exchange_strong_explicit(&g->words[page], &from, to, memory_order_acq_rel,
						       memory_order_acquire);
}

uint16_t epoch_now(const struct tierd_guest *g)
{
	return (uint16_t)((sys_now_ns() - g->epoch_zero_ns) / g->epoch_ns);
}

uint16_t epoch_next(const struct tierd_guest *g)
{
	return (uint16_t)(epoch_now(g) + 1);
}

/* The epoch wraps after 65,536 steps; the worker's pass keeps ages below 0xf800 (scan.c), and a stamp may lie a step ahead. */
uint32_t epoch_age(uint16_t now, uint16_t epoch)
{
	uint16_t age = (uint16_t)(now - epoch);

	return age >= 0xfff0 ? 0 : age;
}

uint32_t page_age(const struct tierd_guest *g, uint64_t page, uint16_t now, page_word w)
{
	uint16_t together = atomic_load_explicit(&g->groups[page / GROUP_PAGES], memory_order_relaxed);
	uint32_t age = epoch_age(now, word_epoch(w)), group = epoch_age(now, together);

	return group < age ? group : age;
}

static uint64_t round_up(uint64_t bytes, uint64_t unit)
{
	return (bytes + unit - 1) / unit * unit;
}

static uint64_t words_bytes(uint64_t pages)
{
	return round_up(pages * sizeof(page_word), sizeof(uint64_t));
}

/* words, sums, epochs of groups */
uint64_t table_bytes(uint64_t pages)
{
	uint64_t groups = pages / GROUP_PAGES + 1;

	return TABLE_HEADER_BYTES +
	       round_up(words_bytes(pages) + pages * sizeof(uint64_t) + groups * sizeof(uint16_t), TABLE_HEADER_BYTES);
}

static uint32_t header_checksum(const struct table_header *h)
{
	uint32_t sum = 2166136261u; /* FNV-1a: guards against a broken file, not against an attacker */
	const uint8_t *bytes = (const uint8_t *)h;

	for (size_t i = sizeof(h->magic); i < offsetof(struct table_header, checksum); i++)
		sum = (sum ^ bytes[i]) * 16777619u;
	return sum;
}

static bool page_size_sane(uint64_t page_bytes)
{
	return page_bytes >= sys_page_bytes() && page_bytes <= PAGE_BYTES_MAX && !(page_bytes & (page_bytes - 1));
}

int tierd_table_create(int fd, const struct tierd_identity *identity, const struct tierd_region *regions,
		       uint32_t count)
{
	struct table_header *h;
	page_word fresh = word_with_tier(RESIDENT, TIER_UNTOUCHED);
	_Atomic page_word *words;
	uint64_t page_bytes = identity->page_bytes ? identity->page_bytes : sys_page_bytes(), pages = 0;
	int error;

	if (!count || count > TIERD_REGIONS_MAX || !identity->epoch_ns || !page_size_sane(page_bytes))
		return -EINVAL;
	for (uint32_t i = 0; i < count; i++) {
		if (!regions[i].bytes ||
		    (regions[i].bytes | regions[i].address | regions[i].offset | regions[i].staging) % page_bytes)
			return -EINVAL;
		pages += regions[i].bytes / page_bytes;
	}
	/* the space is taken now: a full file system must not kill us by SIGBUS later */
	error = posix_fallocate(fd, 0, (off_t)table_bytes(pages));
	if (error)
		return -error;
	h = mmap(NULL, table_bytes(pages), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (h == MAP_FAILED)
		return -errno;
	h->version = TIERD_TABLE_VERSION;
	h->region_count = count;
	h->pages = pages;
	h->identity = *identity;
	h->identity.page_bytes = page_bytes;
	h->identity.created_ns = sys_now_ns();
	memcpy(h->regions, regions, count * sizeof(*regions));
	for (uint32_t i = 0; i < count; i++)
		h->regions[i].memfd = -1;
	words = (_Atomic page_word *)((char *)h + TABLE_HEADER_BYTES);
	for (uint64_t i = 0; i < pages; i++)
		atomic_store_explicit(&words[i], fresh, memory_order_relaxed);
	h->checksum = header_checksum(h);
	atomic_thread_fence(memory_order_release);
	memcpy(h->magic, MAGIC, sizeof(MAGIC)); /* last: a file without it was never finished, so no page ever left */
	munmap(h, table_bytes(pages));
	return 0;
}

static bool ends(const char *text, size_t bytes)
{
	return memchr(text, 0, bytes);
}

static bool places_sane(const struct tierd_place *places)
{
	for (int i = 0; i < TIERD_LADDER_MAX; i++)
		if (places[i].kind > TIERD_KIND_ASKED || !ends(places[i].name, sizeof(places[i].name)) ||
		    !ends(places[i].path, sizeof(places[i].path)))
			return false;
	return true;
}

/* A checksum that is right says who wrote the file, perhaps, and not that all of it can be used. */
static bool identity_sane(const struct tierd_identity *identity)
{
	return identity->pid > 0 && identity->uffd_in_vmm >= 0 && identity->epoch_ns &&
	       page_size_sane(identity->page_bytes) && ends(identity->boot_id, sizeof(identity->boot_id)) &&
	       ends(identity->name, sizeof(identity->name)) && places_sane(identity->places);
}

static bool regions_sane(const struct table_header *h)
{
	uint64_t page_bytes = h->identity.page_bytes, pages = 0;
	bool anon = h->regions[0].staging;

	if (!h->region_count || h->region_count > TIERD_REGIONS_MAX)
		return false;
	for (uint32_t i = 0; i < h->region_count; i++) {
		const struct tierd_region *r = &h->regions[i];

		if (!r->bytes || (r->bytes | r->address | r->offset | r->staging) % page_bytes ||
		    r->bytes > REGION_BYTES_MAX || r->address > UINT64_MAX - r->bytes ||
		    r->staging > UINT64_MAX - r->bytes || r->offset > INT64_MAX - r->bytes)
			return false;
		if ((r->staging != 0) != anon || (anon && page_bytes != sys_page_bytes()))
			return false;
		pages += r->bytes / page_bytes;
	}
	return pages == h->pages;
}

static int header_check(int fd, const struct table_header *h)
{
	struct stat st;

	if (memcmp(h->magic, MAGIC, sizeof(MAGIC)))
		return -EBADMSG;
	if (h->version != TIERD_TABLE_VERSION)
		return -EPROTONOSUPPORT;
	if (h->checksum != header_checksum(h))
		return -EBADMSG;
	if (!identity_sane(&h->identity) || !regions_sane(h))
		return -EBADMSG;
	if (fstat(fd, &st))
		return -errno;
	return (uint64_t)st.st_size == table_bytes(h->pages) ? 0 : -EBADMSG;
}

int tierd_table_read(int fd, struct tierd_identity *identity, struct tierd_region *regions, uint32_t *count,
		     struct tierd_serving *serving)
{
	struct table_header h;
	ssize_t n = pread(fd, &h, sizeof(h), 0);
	int error;

	if (n < 0)
		return -errno;
	if (n != sizeof(h))
		return -EBADMSG;
	error = header_check(fd, &h);
	if (error)
		return error;
	*identity = h.identity;
	memcpy(regions, h.regions, sizeof(h.regions));
	*count = h.region_count;
	*serving = h.serving;
	return 0;
}

int tierd_table_away(int fd, uint64_t *pages)
{
	const uint32_t states = ~(uint32_t)(TO(RESIDENT) | TO(RESOLVING) | TO(LEAVING));
	struct table_header *h;
	const page_word *words;
	struct stat st;

	*pages = 0;
	if (fstat(fd, &st))
		return -errno;
	h = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (h == MAP_FAILED)
		return -errno;
	words = (const page_word *)((const char *)h + TABLE_HEADER_BYTES);
	for (uint64_t i = 0; i < h->pages; i++)
		*pages += states >> word_state(words[i]) & 1;
	munmap(h, (size_t)st.st_size);
	return 0;
}

int tierd_table_lock(int fd)
{
	return flock(fd, LOCK_EX | LOCK_NB) ? -errno : 0;
}

int table_map(struct tierd_guest *g)
{
	struct table_header h;
	uint64_t pages = 0;
	int error;

	if (pread(g->table_fd, &h, sizeof(h), 0) != sizeof(h))
		return -EBADMSG;
	error = header_check(g->table_fd, &h);
	if (error)
		return error;
	if (h.identity.page_bytes != g->page_bytes)
		return -ESTALE;
	for (uint32_t i = 0; i < g->region_count; i++) {
		struct region *r = &g->regions[i];

		if (i >= h.region_count || h.regions[i].address != r->address || h.regions[i].bytes != r->bytes ||
		    h.regions[i].offset != r->offset || h.regions[i].staging != r->staging)
			return -ESTALE;
		pages += r->pages;
	}
	if (pages != h.pages || g->region_count != h.region_count)
		return -ESTALE;
	g->table_bytes = table_bytes(pages);
	g->header = mmap(NULL, g->table_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, g->table_fd, 0);
	if (g->header == MAP_FAILED) {
		g->header = NULL;
		return -errno;
	}
	g->words = (_Atomic page_word *)((char *)g->header + TABLE_HEADER_BYTES);
	g->sums = (uint64_t *)((char *)g->words + words_bytes(pages));
	g->groups = (_Atomic uint16_t *)(g->sums + pages);
	g->epoch_ns = h.identity.epoch_ns;
	g->epoch_zero_ns = h.identity.created_ns;
	return 0;
}

int table_pin(struct tierd_guest *g)
{
	return mlock(g->header, g->table_bytes) ? -errno : 0;
}

void table_unmap(struct tierd_guest *g)
{
	if (g->header)
		munmap(g->header, g->table_bytes);
}

/*
 * CRC-32C by the CPU's instruction, of a page in four independent lanes (the instruction has a latency of three cycles and a
 * throughput of one), folded by one more round; what is no multiple of 32 bytes has a rest. In page tables and in segments (records.c),
 * which nobody reads but tierds of this boot.
 */
#if defined(__x86_64__)
#define CRC_TARGET           __attribute__((target("sse4.2")))
#define CRC_STEP(crc, value) __builtin_ia32_crc32di(crc, value)
#elif defined(__aarch64__)
#define CRC_TARGET           __attribute__((target("+crc")))
#define CRC_STEP(crc, value) __crc32cd((uint32_t)(crc), value)
#else
#error "tierd runs on x86-64 and arm64"
#endif

CRC_TARGET uint32_t checksum(const void *page, size_t bytes)
{
	const uint64_t *word = page;
	size_t lane = bytes / 4 / sizeof(*word);
	uint64_t a = ~0u, b = 1, c = 2, d = 3;

	for (size_t i = 0; i < lane; i++) {
		a = CRC_STEP(a, word[i]);
		b = CRC_STEP(b, word[lane + i]);
		c = CRC_STEP(c, word[2 * lane + i]);
		d = CRC_STEP(d, word[3 * lane + i]);
	}
	for (size_t i = 4 * lane; i < bytes / sizeof(*word); i++)
		d = CRC_STEP(d, word[i]);
	if (bytes % sizeof(*word)) {
		uint64_t last = 0;

		memcpy(&last, word + bytes / sizeof(*word), bytes % sizeof(*word));
		d = CRC_STEP(d, last);
	}
	a = CRC_STEP(a, b << 32 | c);
	return (uint32_t)CRC_STEP(a, d);
}
