/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool_test.c: the compressed pool against a plain table of what is stored in it.
 *
 *   pool_test seeds FIRST COUNT     writes, frees, reads, compacts, reopens and adopts at random, with a file system that fails
 *   pool_test flips FIRST COUNT     bits of the file turn round meanwhile: nothing crashes, and what is not damaged is right
 *   pool_test kills SEED COUNT      a child is killed COUNT times; the next one finds every page that was stored
 *   pool_test deaths SEED COUNT     the same, but it dies at a place of its own choice (built with TIERD_MODEL)
 *   pool_test threads SEED COUNT    readers beside a worker that writes, frees and compacts, COUNT times
 *   pool_test full SEED COUNT FILE  on a small tmpfs that others fill, too
 *   pool_test headers FIRST COUNT   files that are not a pool of ours are refused and left alone
 *   pool_test codecs                what opening each codec says
 *   pool_test waste SEED COUNT      what COUNT pages of several mixes of sizes take, also after most of them were freed
 *
 * Linked with --wrap for sys_pool_reserve and sys_pool_punch.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "internal.h"
#include "pool.h"
#include "zsmalloc.h"

enum { PAGES_MAX = 1024, PAGE_BYTES_MOST = 65536, READERS = 3 };

static uint64_t seed;
static _Thread_local uint64_t random_state;
static _Thread_local uint8_t *made, *got; /* pages; behind `got` nothing is mapped */

_Noreturn static void fail(const char *what, int64_t detail)
{
	fprintf(stderr, "seed %lu: %s (%ld)\n", seed, what, (long)detail);
	_exit(1);
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

static uint64_t roll(uint64_t below)
{
	return mix(random_state += 0x9e3779b97f4a7c15u) % below;
}

static bool chance(uint32_t thousandths)
{
	return roll(1000) < thousandths;
}

/* --- pages whose bytes follow from their number and version ------------------------------------------------------------- */

static uint64_t key_of(uint64_t page, uint32_t version)
{
	return mix(page << 32 | version);
}

static bool page_is_filled(uint64_t page, uint32_t version)
{
	return key_of(page, version) % 8 == 0;
}

/* Eighths of the page that are noise, so that there are many pages of few sizes: of 7 and 8 it does not compress enough. */
static uint32_t page_noise(uint64_t page, uint32_t version)
{
	return key_of(page, version) / 8 % 9;
}

static void page_make(uint8_t *to, uint32_t bytes, uint64_t page, uint32_t version)
{
	uint64_t key = key_of(page, version), *words = (uint64_t *)to;
	uint32_t noise = page_noise(page, version);

	for (uint32_t i = 0; i < bytes / sizeof(*words); i++) {
		if (page_is_filled(page, version))
			words[i] = key;
		else
			words[i] = i * 8 * sizeof(*words) < noise * bytes ? mix(key ^ ((uint64_t)i << 20)) : i / 16;
	}
	if (!page_is_filled(page, version))
		words[0] = key;
}

static void buffers_make(void)
{
	uint8_t *memory = mmap(NULL, 3 * PAGE_BYTES_MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED || mprotect(memory + 2 * PAGE_BYTES_MOST, PAGE_BYTES_MOST, PROT_NONE))
		fail("no memory", errno);
	made = memory;
	got = memory + PAGE_BYTES_MOST;
}

static uint8_t *place_for(uint32_t bytes)
{
	return got + PAGE_BYTES_MOST - bytes;
}

static bool reads_as(struct pool_reader *r, uint32_t bytes, uint64_t page, uint32_t version)
{
	int error = pool_read(r, page, place_for(bytes));

	if (error)
		fail("a page cannot be read", error);
	page_make(made, bytes, page, version);
	return !memcmp(made, place_for(bytes), bytes);
}

/* --- a file system that fails ------------------------------------------------------------------------------------------- */

static uint32_t reserve_fails, punch_fails; /* thousandths */
static bool adopting;                       /* what it reserves has space already */

static uint64_t death; /* after so many more places to die at; 0: never */

void tierd_model_yield(void);

void tierd_model_yield(void)
{
	if (death && !--death)
		kill(getpid(), SIGKILL);
}

int __real_sys_pool_reserve(int fd, void *at, uint64_t offset, uint64_t bytes);
int __wrap_sys_pool_reserve(int fd, void *at, uint64_t offset, uint64_t bytes);
int __real_sys_pool_punch(int fd, uint64_t offset, uint64_t bytes);
int __wrap_sys_pool_punch(int fd, uint64_t offset, uint64_t bytes);

int __wrap_sys_pool_reserve(int fd, void *at, uint64_t offset, uint64_t bytes)
{
	static const int errors[] = {-ENOMEM, -EINTR, -ENOSPC};
	int error;

	if (reserve_fails && chance(reserve_fails)) {
		if (chance(500)) /* it has the space, and cannot map it */
			__real_sys_pool_reserve(fd, at, offset, bytes);
		return errors[roll(adopting ? 2 : 3)];
	}
	tierd_model_yield();
	error = __real_sys_pool_reserve(fd, at, offset, bytes);
	tierd_model_yield();
	return error;
}

int __wrap_sys_pool_punch(int fd, uint64_t offset, uint64_t bytes)
{
	int error;

	tierd_model_yield();
	if (!punch_fails || !chance(punch_fails))
		return __real_sys_pool_punch(fd, offset, bytes);
	if (chance(500))
		return -EINTR;
	error = __real_sys_pool_punch(fd, offset, bytes / 2); /* it stops half-way */
	return error ? error : -EIO;
}

/* --- one pool and what should be in it ---------------------------------------------------------------------------------- */

static struct pool *pool;
static struct pool_reader *reader;
static int file = -1;
static uint32_t page_bytes;
static uint64_t pages, writes, refused, full, moves, adoptions, damaged_pages;
static uint32_t stored[PAGES_MAX]; /* versions; 0: not stored */
static uint32_t next_version;
static bool flipping; /* what is stored may be damaged */

static bool is_live(void *arg, uint64_t page)
{
	(void)arg;
	return stored[page];
}

static void is_damaged(void *arg, uint64_t page)
{
	(void)arg;
	if (!flipping || !stored[page])
		fail("a page is damaged", (int64_t)page);
	stored[page] = 0;
	damaged_pages++;
}

static bool own(void *arg, uint64_t page)
{
	(void)arg;
	if (!flipping && !stored[page])
		fail("a page that is not stored is moved", (int64_t)page);
	return !chance(100);
}

static void disown(void *arg, uint64_t page)
{
	(void)arg;
	(void)page;
}

static void check_page(uint64_t page)
{
	int error;

	if (!flipping) {
		if (pool_has(pool, page) != (stored[page] != 0))
			fail("pool_has is wrong", (int64_t)page);
		if (stored[page] ? !reads_as(reader, page_bytes, page, stored[page])
				 : pool_read(reader, page, place_for(page_bytes)) != -ENOENT)
			fail("a page is wrong", (int64_t)page);
		return;
	}
	error = pool_read(reader, page, place_for(page_bytes));
	if (error && error != -ENOENT && error != -EBADMSG)
		fail("another error", error);
	if (error == -ENOENT && stored[page])
		damaged_pages++;
}

static void write_page(uint64_t page)
{
	uint32_t version = ++next_version;
	int error;

	page_make(made, page_bytes, page, version);
	error = pool_write(pool, page, made);
	if (!error)
		stored[page] = version;
	writes++;
	refused += error == -E2BIG;
	full += error == -ENOSPC || error == -ENOMEM;
	if (error && error != -E2BIG && error != -ENOSPC && error != -ENOMEM)
		fail("a write failed", error);
	if (error == -E2BIG && (page_is_filled(page, version) || page_noise(page, version) < 5))
		fail("a page that compresses was refused", (int64_t)page_noise(page, version));
	if (!error && !page_is_filled(page, version) && page_noise(page, version) > 6)
		fail("a page that does not compress was taken", (int64_t)page_noise(page, version));
}

/* What is not reserved is never touched, what is given back is a hole: the kernel's count is ours. */
static void check_space(void)
{
	struct pool_counters c;
	struct stat st;

	pool_counters(pool, &c);
	if (fstat(file, &st))
		fail("fstat", errno);
	if ((uint64_t)st.st_blocks * 512 != c.used_bytes)
		fail("the file takes other space than the pool says", (int64_t)c.used_bytes - st.st_blocks * 512);
}

static void check_counters(void)
{
	struct pool_counters c;
	uint64_t count = 0;

	pool_counters(pool, &c);
	for (uint64_t page = 0; page < pages; page++)
		count += stored[page] != 0;
	if (flipping)
		return;
	if (c.pages != count || c.object_bytes < count)
		fail("counters", (int64_t)c.pages);
	if (!punch_fails)
		check_space();
}

static void compact(uint32_t pages_max)
{
	uint32_t moved;
	int error = pool_compact(pool, pages_max, own, disown, NULL, &moved);

	if (error && error != -EIO && error != -ENOSPC && error != -ENOMEM)
		fail("compaction failed", error);
	if (moved > pages_max)
		fail("more was moved than asked for", moved);
	moves += moved;
}

static void reader_make(void)
{
	int error = pool_reader_create(pool, &reader);

	if (error)
		fail("no reader", error);
}

static void adopt(void)
{
	int error;

	pool_reader_destroy(reader);
	pool_close(pool);
	error = pool_open(file, page_bytes, pages, 1, &pool);
	if (error)
		fail("pool_open", error);
	reader_make();
	adopting = true;
	while ((error = pool_adopt(pool, is_live, is_damaged, NULL)))
		if (error != -EIO && error != -ENOMEM)
			fail("pool_adopt", error);
	adopting = false;
	adoptions++;
	for (uint64_t page = 0; page < pages; page++) {
		check_page(page);
		if (flipping && !pool_has(pool, page))
			stored[page] = 0;
	}
}

static void flip(void)
{
	uint64_t start, end, at;
	uint8_t byte;

	if (sys_pool_data(file, roll((uint64_t)sys_pool_bytes(file)), &start, &end) &&
	    sys_pool_data(file, page_bytes, &start, &end))
		return;
	at = start + roll(end - start);
	if (chance(500) && at - start > page_bytes) /* where an object begins, perhaps */
		at = at / 16 * 16 + roll(8);
	if (at < page_bytes || pread(file, &byte, 1, (off_t)at) != 1)
		return;
	byte ^= (uint8_t)(1u << roll(8));
	if (pwrite(file, &byte, 1, (off_t)at) != 1)
		fail("pwrite", errno);
}

static void step(void)
{
	uint64_t page = roll(pages);

	switch (roll(16)) {
	case 0 ... 6:
		write_page(page);
		break;
	case 7 ... 9:
		for (uint64_t i = roll(8); i-- && page < pages; page++) {
			stored[page] = 0;
			pool_free(pool, page);
		}
		break;
	case 10:
		if (chance(100))
			pool_set_capacity(pool, chance(500) ? UINT64_MAX : roll(pages * page_bytes));
		break;
	case 11:
		compact(1 + (uint32_t)roll(64));
		break;
	case 12:
		if (chance(60))
			adopt();
		break;
	default:
		check_page(page);
	}
}

/* With nothing in it, the pool has given everything back: no space is forgotten. */
static void check_empty(void)
{
	uint64_t entries = page_bytes / sizeof(uint32_t), sparse = pages / entries + pages / page_bytes + 4;
	struct pool_counters c;

	punch_fails = 0;
	for (uint64_t page = 0; page < pages; page++) {
		stored[page] = 0;
		pool_free(pool, page);
	}
	compact(1);
	pool_counters(pool, &c);
	if (c.pages || c.used_bytes > sparse * page_bytes || (!flipping && c.object_bytes))
		fail("an empty pool takes space", (int64_t)c.used_bytes);
}

static void run_seed(bool flips)
{
	static const uint32_t sizes[] = {4096, 4096, 16384, 65536};
	int error;

	random_state = seed;
	flipping = false;
	reserve_fails = punch_fails = 0;
	next_version = 0;
	memset(stored, 0, sizeof(stored));
	page_bytes = sizes[roll(4)];
	pages = 1 + roll(PAGES_MAX >> roll(6));
	file = memfd_create("pool", MFD_CLOEXEC);
	error = pool_create(file, page_bytes, pages, roll(2) ? CODEC_LZ4 : CODEC_ZSTD, 1, &pool);
	if (error)
		fail("pool_create", error);
	reader_make();
	flipping = flips;
	if (chance(500)) {
		reserve_fails = (uint32_t)roll(100);
		punch_fails = chance(500) ? (uint32_t)roll(300) : 0;
	}
	for (uint64_t steps = roll(2000); steps; steps--) {
		step();
		if (flips && chance(100))
			flip();
		if (chance(20))
			check_counters();
	}
	for (uint64_t page = 0; page < pages; page++)
		check_page(page);
	if (!flips)
		check_empty();
	pool_reader_destroy(reader);
	pool_close(pool);
	reader = NULL;
	close(file);
}

static void seeds(uint64_t first, uint64_t count, bool flips)
{
	for (seed = first; seed < first + count; seed++)
		run_seed(flips);
	printf("%lu seeds: %lu writes, %lu refused, %lu full, %lu moves, %lu adoptions, %lu damaged\n", count, writes,
	       refused, full, moves, adoptions, damaged_pages);
}

/* --- killed ------------------------------------------------------------------------------------------------------------- */

enum { KILL_PAGES = 300, KILL_PAGE_BYTES = 4096 };

/* What outlives the children: the page table, in short. A page is stored if a version of it is; `pending` may be there instead. */
static struct {
	_Atomic uint32_t stored[KILL_PAGES], pending[KILL_PAGES], next_version;
	_Atomic uint64_t verified, writes, moves;
} *table;

static bool table_live(void *arg, uint64_t page)
{
	(void)arg;
	return table->stored[page];
}

static void table_verify(void)
{
	for (uint64_t page = 0; page < KILL_PAGES; page++) {
		uint32_t pending = table->pending[page];

		if (!table->stored[page] && pool_has(pool, page))
			fail("a page is there that was not stored", (int64_t)page);
		if (table->stored[page] && !reads_as(reader, KILL_PAGE_BYTES, page, table->stored[page])) {
			if (!pending || !reads_as(reader, KILL_PAGE_BYTES, page, pending))
				fail("a page is wrong", (int64_t)page);
			table->stored[page] = pending;
		}
		table->pending[page] = 0;
	}
	table->verified++;
}

static void table_write(uint64_t page)
{
	uint32_t version = ++table->next_version;

	page_make(made, KILL_PAGE_BYTES, page, version);
	table->pending[page] = version;
	if (!pool_write(pool, page, made)) {
		table->stored[page] = version;
		table->writes++;
	}
	table->pending[page] = 0;
}

static void table_step(void)
{
	uint64_t page = roll(KILL_PAGES);
	uint32_t moved;

	switch (roll(8)) {
	case 0 ... 3:
		table_write(page);
		break;
	case 4 ... 6:
		table->stored[page] = 0;
		pool_free(pool, page);
		break;
	default:
		if (pool_compact(pool, 16, own, disown, NULL, &moved))
			fail("compaction failed", 0);
		table->moves += moved;
	}
}

_Noreturn static void life(uint64_t number, bool by_itself)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	random_state = seed + number;
	page_bytes = KILL_PAGE_BYTES;
	pages = KILL_PAGES;
	flipping = true; /* of `own`: the table is another one */
	death = by_itself ? 1 + roll(8000) : 0;
	if (pool_open(file, page_bytes, KILL_PAGES, 1, &pool))
		fail("pool_open", 0);
	reader_make();
	if (pool_adopt(pool, table_live, is_damaged, NULL) || damaged_pages)
		fail("adoption", (int64_t)damaged_pages);
	table_verify();
	if (by_itself)
		check_space(); /* a kill between two system calls may leave a page of the index that is reserved and not known */
	if (chance(100)) {
		for (uint64_t page = 0; page < pages; page++)
			table->stored[page] = 0;
		check_empty();
	}
	for (;;)
		table_step();
}

/* Until the child has looked at every page, however slow the machine is, or has ended. `before`: it was born. */
static void wait_verified(pid_t child, uint64_t before)
{
	siginfo_t ended = {0};

	while (atomic_load(&table->verified) == before && !ended.si_pid) {
		usleep(100);
		if (waitid(P_PID, (id_t)child, &ended, WEXITED | WNOHANG | WNOWAIT))
			fail("waitid", errno);
	}
}

static void kills(uint64_t first, uint64_t count, bool by_itself)
{
	int status;

	seed = random_state = first;
	file = memfd_create("pool", MFD_CLOEXEC);
	table = mmap(NULL, sizeof(*table), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (table == MAP_FAILED || pool_create(file, KILL_PAGE_BYTES, KILL_PAGES, CODEC_LZ4, 1, &pool))
		fail("cannot make a pool", errno);
	pool_close(pool);
	for (uint64_t i = 0; i < count; i++) {
		uint64_t before = atomic_load(&table->verified);
		pid_t child = fork();

		if (!child)
			life(i * 1000003, by_itself);
		if (child > 0 && !by_itself) {
			if (i % 2)
				wait_verified(child, before);
			usleep((useconds_t)roll(4000));
			kill(child, SIGKILL);
		}
		if (child < 0 || waitpid(child, &status, 0) != child)
			fail("fork", errno);
		if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
			fail("a child ended by itself", status);
	}
	printf("%lu kills: %lu verified, %lu writes, %lu moves\n", count, table->verified, table->writes, table->moves);
}

/* --- threads ------------------------------------------------------------------------------------------------------------ */

enum { GONE = 0, THERE = 1, OWNED = 2 };
static _Atomic uint32_t words[PAGES_MAX]; /* state in the two low bits, version above */
static _Atomic bool over;
static _Atomic uint64_t reads;

static bool word_move(uint64_t page, uint32_t from, uint32_t to)
{
	return atomic_compare_exchange_strong_explicit(&words[page], &from, to, memory_order_acq_rel,
						       memory_order_acquire);
}

static bool word_own(void *arg, uint64_t page)
{
	uint32_t word = atomic_load(&words[page]);

	(void)arg;
	return word % 4 == THERE && word_move(page, word, word + 1);
}

static void word_disown(void *arg, uint64_t page)
{
	(void)arg;
	atomic_fetch_sub(&words[page], 1);
}

static void *reading(void *number)
{
	struct pool_reader *r;

	random_state = seed * 64 + (uintptr_t)number;
	buffers_make();
	if (pool_reader_create(pool, &r))
		fail("no reader", 0);
	while (!atomic_load(&over)) {
		uint64_t page = roll(pages);

		if (!word_own(NULL, page)) {
			sched_yield();
			continue;
		}
		if (!reads_as(r, page_bytes, page, atomic_load(&words[page]) / 4))
			fail("a page is wrong", (int64_t)page);
		word_disown(NULL, page);
		atomic_fetch_add(&reads, 1);
	}
	pool_reader_destroy(r);
	return NULL;
}

static void worker_step(void)
{
	uint64_t page = roll(pages);
	uint32_t word = atomic_load(&words[page]), version = ++next_version & 0xffffff, moved;

	switch (roll(4)) {
	case 0:
		if (pool_compact(pool, 32, word_own, word_disown, NULL, &moved))
			fail("compaction failed", 0);
		moves += moved;
		break;
	case 1:
		if (word % 4 == THERE && word_move(page, word, GONE))
			pool_free(pool, page);
		break;
	default:
		if (word % 4 == OWNED || !word_move(page, word, word / 4 * 4 + OWNED))
			break;
		page_make(made, page_bytes, page, version);
		if (!pool_write(pool, page, made))
			word = version * 4 + THERE;
		atomic_store_explicit(&words[page], word, memory_order_release);
		writes++;
	}
}

static void threads(uint64_t first, uint64_t count)
{
	pthread_t readers[READERS];
	struct pool_counters c;

	seed = random_state = first;
	page_bytes = 4096;
	pages = 256;
	file = memfd_create("pool", MFD_CLOEXEC);
	if (pool_create(file, page_bytes, pages, first % 2 ? CODEC_LZ4 : CODEC_ZSTD, 1, &pool))
		fail("pool_create", 0);
	for (uintptr_t i = 0; i < READERS; i++)
		if (pthread_create(&readers[i], NULL, reading, (void *)(i + 1)))
			fail("no thread", 0);
	for (uint64_t i = 0; i < count; i++) {
		worker_step();
		pool_counters(pool, &c);
	}
	atomic_store(&over, true);
	for (int i = 0; i < READERS; i++)
		pthread_join(readers[i], NULL);
	pool_close(pool);
	printf("%lu steps: %lu writes, %lu moves, %lu reads\n", count, writes, moves, reads);
}

/* --- a file system that is full ------------------------------------------------------------------------------------------ */

static void run_full(uint64_t first, uint64_t count, const char *path)
{
	char ballast_path[4096];
	int ballast;

	seed = random_state = first;
	page_bytes = 4096;
	pages = PAGES_MAX;
	file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	snprintf(ballast_path, sizeof(ballast_path), "%s.ballast", path);
	ballast = open(ballast_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (file < 0 || ballast < 0)
		fail("cannot make a file", errno);
	if (pool_create(file, page_bytes, pages, CODEC_LZ4, 1, &pool))
		fail("pool_create", 0);
	reader_make();
	for (uint64_t i = 0; i < count; i++) {
		if (i % 1000 == 500 && ftruncate(ballast, 0))
			fail("ftruncate", errno);
		if (i % 1000 == 0)
			(void)!posix_fallocate(ballast, 0, 128 << 10); /* all, or nothing when there is less */
		step();
		if (i % 64 == 0)
			check_counters();
	}
	for (uint64_t page = 0; page < pages; page++)
		check_page(page);
	printf("%lu steps: %lu writes, %lu full, %lu moves, %lu adoptions\n", count, writes, full, moves, adoptions);
}

/* --- what is not a pool of ours --------------------------------------------------------------------------------------------- */

static void header_damage(void)
{
	uint8_t byte;
	off_t at = (off_t)roll(36); /* struct pool_header */

	if (pread(file, &byte, 1, at) != 1)
		fail("pread", errno);
	byte ^= (uint8_t)(1u << roll(8));
	if (pwrite(file, &byte, 1, at) != 1)
		fail("pwrite", errno);
}

static void run_header(void)
{
	struct stat before, after;
	uint64_t asked_pages;
	uint32_t asked_bytes = 4096;
	int error, expected = -EBADMSG;

	random_state = seed;
	pages = asked_pages = 1 + roll(PAGES_MAX);
	file = memfd_create("pool", MFD_CLOEXEC);
	if (pool_create(file, 4096, pages, CODEC_LZ4, 1, &pool))
		fail("pool_create", 0);
	pool_close(pool);
	if (pool_create(file, 4096, pages, CODEC_LZ4, 1, &pool) != -EINVAL)
		fail("a file that is not empty was taken", 0);
	switch (roll(6)) {
	case 0:
		if (ftruncate(file, (off_t)roll((uint64_t)sys_pool_bytes(file))))
			fail("ftruncate", errno);
		break;
	case 1:
		if (ftruncate(file, sys_pool_bytes(file) + 4096))
			fail("ftruncate", errno);
		break;
	case 2:
		asked_pages++;
		expected = -ESTALE;
		break;
	case 3:
		asked_bytes = 8192;
		expected = -ESTALE;
		break;
	case 4:
		asked_bytes = 2 << 20;
		expected = -EINVAL;
		break;
	default:
		header_damage();
	}
	fstat(file, &before);
	error = pool_open(file, asked_bytes, asked_pages, 1, &pool);
	fstat(file, &after);
	if (error != expected && !(error == -EPROTONOSUPPORT && expected == -EBADMSG))
		fail("not refused as it should be", error);
	if (before.st_blocks != after.st_blocks || before.st_size != after.st_size)
		fail("the file was changed", 0);
	close(file);
}

static void headers(uint64_t first, uint64_t count)
{
	for (seed = first; seed < first + count; seed++)
		run_header();
	printf("%lu files refused\n", count);
}

static void codecs(void)
{
	struct codec *codec;

	for (int kind = 0; kind <= 3; kind++)
		for (int level = -1; level <= 1; level += 2) {
			int error = codec_open((enum codec_kind)kind, level, &codec);

			printf("codec %d level %d %s: %s\n", kind, level, codec_library((enum codec_kind)kind),
			       error ? strerrorname_np(-error) : "fine");
			if (!error)
				codec_close(codec);
		}
}

/* --- waste --------------------------------------------------------------------------------------------------------------- */

enum { HALF_MIX = 6 };

/* Bytes of noise in a page of 4 KiB, about what it compresses to. */
static uint32_t noise_bytes(uint32_t mix_number)
{
	switch (mix_number) {
	case 0: /* even */
		return (uint32_t)roll(3000);
	case 1: /* a hump at a third, as of a desktop's memory */
		return (uint32_t)(roll(900) + roll(900) + roll(900));
	case 2: /* two to one, nearly all of them */
		return 2000 + (uint32_t)roll(100);
	case 3: /* large ones, of which few fit into a slot */
		return 2600 + (uint32_t)roll(380);
	case 4: /* small ones */
		return (uint32_t)roll(200);
	default: /* text and heaps: a few sizes again and again */
		return (uint32_t[]){300, 777, 1111, 1359, 2040, 2731}[roll(6)];
	}
}

static void noise_make(uint8_t *to, uint32_t bytes)
{
	memset(to, 0, page_bytes);
	for (uint32_t i = 0; i < bytes; i++)
		to[i] = (uint8_t)roll(256);
}

static uint64_t object_bytes(void)
{
	struct pool_counters c;

	pool_counters(pool, &c);
	return c.object_bytes;
}

static void waste_figures(const char *when, uint32_t mix_number, const struct zsmalloc *z)
{
	struct pool_counters c;
	uint64_t payload, zs = z ? zs_bytes(z) : 0;

	pool_counters(pool, &c);
	payload = c.object_bytes + c.metadata_bytes;
	printf("%u %s %lu pages %lu payload %lu used %lu zsmalloc %.2f metadata\n", mix_number, when, c.pages, payload,
	       c.used_bytes, zs, (double)c.metadata_bytes / (double)c.pages);
}

static bool own_any(void *arg, uint64_t page)
{
	(void)arg;
	(void)page;
	return true;
}

static void waste_mix(uint32_t mix_number)
{
	struct zsmalloc z = {0};
	uint64_t before, page;
	uint32_t moved;

	file = memfd_create("pool", MFD_CLOEXEC);
	if (pool_create(file, page_bytes, pages, CODEC_LZ4, 1, &pool))
		fail("pool_create", 0);
	for (page = 0; page < pages; page++) {
		if (mix_number == HALF_MIX && chance(500))
			continue; /* an index half of which is empty */
		before = object_bytes();
		noise_make(made, noise_bytes(mix_number));
		if (!pool_write(pool, page, made))
			zs_add(&z, (uint32_t)(object_bytes() - before));
	}
	waste_figures("full", mix_number, &z);
	for (page = 0; page < pages; page++)
		if (chance(700))
			pool_free(pool, page);
	do
		if (pool_compact(pool, 1000, own_any, disown, NULL, &moved))
			fail("compaction failed", 0);
	while (moved);
	waste_figures("compacted", mix_number, NULL);
	pool_close(pool);
	close(file);
}

static void waste(uint64_t first, uint64_t count)
{
	seed = random_state = first;
	page_bytes = 4096;
	pages = count;
	for (uint32_t i = 0; i <= HALF_MIX; i++)
		waste_mix(i);
}

int main(int count, char **arguments)
{
	const char *what = count > 1 ? arguments[1] : "";
	uint64_t first = count > 2 ? strtoull(arguments[2], NULL, 10) : 1,
		 n = count > 3 ? strtoull(arguments[3], NULL, 10) : 1;

	buffers_make();
	if (!strcmp(what, "kills") || !strcmp(what, "deaths"))
		kills(first, n, what[0] == 'd');
	else if (!strcmp(what, "seeds") || !strcmp(what, "flips"))
		seeds(first, n, what[0] == 'f');
	else if (!strcmp(what, "threads"))
		threads(first, n);
	else if (!strcmp(what, "headers"))
		headers(first, n);
	else if (!strcmp(what, "codecs"))
		codecs();
	else if (!strcmp(what, "waste"))
		waste(first, n);
	else if (!strcmp(what, "full") && count > 4)
		run_full(first, n, arguments[4]);
	else
		return 2;
	return 0;
}
