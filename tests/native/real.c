/* SPDX-License-Identifier: Apache-2.0 */
/*
 * real.c: the data plane on the real kernel, under the same script as in the model (script.h).
 *
 *   real [--engine stock|rwp|rfc] [--hugetlb] [--large] [--asked] [--slowness N] [--seeds N] [--from S] [--store DIRECTORY] [-v]
 *
 * This process is the guest: its threads read, write and give back pages of memfds, and check what they read. The daemon is
 * another process (this program again, with --daemon), with the real sys.c, a real userfaultfd and a store file. It is killed
 * with SIGKILL at moments that the seed draws and started again to adopt; stored copies are destroyed while none runs. A seed
 * says what everybody wants to do and when; who comes first is the kernel's to say, so a failing seed fails again only with
 * some luck. --large: every region is a part of a large folio (shmem_enabled must be `always`), which often cannot be split,
 * because a pipe refers to it; for the engines that have a sync mode. --asked: the store is one that Python asks; a thread of the
 * daemon plays its part.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "content.h"
#include "internal.h"
#include "script.h"

enum { REGIONS_MAX = 3, THREADS_MAX = 5, SEED_S_MAX = 60, LIVES_MAX = 6 };

#define WORD_STEP 0x9e3779b97f4a7c15ull /* between the words of a page */

enum phase { STARTING, ADOPTING, SERVING, LEAVING_IT, LEFT };

/* What both processes see. The daemon reads what the guest set up, and says how far it is. */
struct shared {
	uint64_t seed;
	uint32_t life, pages, region_count;
	uint32_t engine, page_bytes;
	bool failures, losses, anon, asked, direct, use_pagemap, inside;
	int uffd, table_fd, store_fd, memfd[REGIONS_MAX], inject_tid;
	_Atomic bool guests_stop, finish, repaired, all_read;
	_Atomic uint32_t phase;
	_Atomic uint64_t evicted, faults, lost, rewritten; /* of all lives */
};

static struct shared *shared;
static int shared_fd;
static bool is_daemon, hugetlb;
static uint32_t slowness = 1; /* of the machine: lives last so much longer */

_Noreturn void script_fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	printf("seed %lu, life %u%s: ", shared->seed, shared->life, is_daemon ? ", daemon" : "");
	vprintf(format, arguments);
	printf("\n");
	va_end(arguments);
	fflush(stdout);
	_exit(1);
}

static void seed_thread(uint64_t number)
{
	script_random = (shared->seed * 1024 + number + 1) * 0x9e3779b97f4a7c15ull;
	below(2);
}

static int must(int result, const char *what)
{
	if (result < 0)
		script_fail("%s: %s", what, strerror(errno));
	return result;
}

/* --- the guest: its memory ---------------------------------------------------------------------------------------------- */

static size_t page_bytes, stride = 1;     /* words are written and read one in so many */
static uint8_t *memory[SCRIPT_PAGES_MAX]; /* by page */
static struct tierd_region regions[REGIONS_MAX];
static pthread_mutex_t locks[SCRIPT_PAGES_MAX];
static _Atomic bool destroyed[SCRIPT_PAGES_MAX], may_fail[SCRIPT_PAGES_MAX];
static bool torn[SCRIPT_PAGES_MAX];
static uint64_t flipped_at[SCRIPT_PAGES_MAX];
static _Atomic page_word *words; /* of the state file */
static _Atomic uint32_t kills_of_seed;

static _Thread_local sigjmp_buf memory_error;
static _Thread_local volatile sig_atomic_t touching;

static void on_sigbus(int signal)
{
	if (!touching)
		abort();
	(void)signal;
	siglongjmp(memory_error, 1);
}

static uint64_t word_of(uint64_t value, size_t i)
{
	return is_one_word(value) ? value : value + i * WORD_STEP;
}

static void write_words(volatile uint64_t *to, uint64_t value)
{
	for (size_t i = 0; i < page_bytes / 8; i += stride)
		to[i] = word_of(value, i);
}

/* The first word, when the others are those that were written with it. */
static bool read_words(const volatile uint64_t *from, uint64_t *value)
{
	bool whole = true;

	*value = from[0];
	for (size_t i = stride; i < page_bytes / 8; i += stride)
		whole &= from[i] == word_of(*value, i);
	return whole;
}

enum outcome world_access(uint32_t thread, uint32_t page, bool write, uint64_t *value)
{
	volatile uint64_t *at = (volatile uint64_t *)memory[page];
	bool whole = true;

	(void)thread;
	if (sigsetjmp(memory_error, 1)) {
		touching = false;
		torn[page] |= write;
		return MEMORY_ERROR;
	}
	touching = true;
	if (write)
		write_words(at, *value);
	else
		whole = read_words(at, value);
	touching = false;
	may_fail[page] = destroyed[page];
	if (torn[page] && !write)
		return UNKNOWN;
	torn[page] = false;
	if (!whole)
		script_fail("page %u is torn: it begins with %#lx, the guest last wrote %#lx", page, *value,
			    S.last[page]);
	return MADE;
}

/* Without the page's lock: several threads wait for one page, and nobody learns anything from it. */
__attribute__((no_sanitize("thread"))) static void touch(uint32_t page)
{
	if (!sigsetjmp(memory_error, 1)) {
		touching = true;
		(void)*(volatile uint8_t *)memory[page];
	}
	touching = false;
}

bool world_may_fail(uint32_t page)
{
	return may_fail[page];
}

bool world_may_be_older(uint32_t page, uint64_t value)
{
	return kills_of_seed && script_may_have_written(page, value);
}

bool world_zeroed(uint32_t page)
{
	(void)page;
	return false;
}

void world_settled(uint32_t page)
{
	(void)page;
}

void world_give_back(uint32_t page)
{
	must(madvise(memory[page], page_bytes, S.anon ? MADV_DONTNEED : MADV_REMOVE), "to give a page back");
}

void world_zap(uint32_t page)
{
	must(madvise(memory[page], page_bytes, MADV_DONTNEED), "MADV_DONTNEED");
}

void world_lock(uint32_t page)
{
	pthread_mutex_lock(&locks[page]);
}

void world_unlock(uint32_t page)
{
	pthread_mutex_unlock(&locks[page]);
}

void world_rest(uint32_t steps)
{
	if (!is_daemon && steps % 4 == 1)
		touch(below(S.pages));
	if (steps % 4 == 2)
		sched_yield();
	else if (steps)
		usleep(steps * (is_daemon ? 10 : hugetlb ? 300 * slowness : 30));
}

bool world_stopped(void)
{
	return atomic_load(&shared->guests_stop);
}

static pthread_t beside;
static int (*beside_run)(struct tierd_batch *);

static void *run_beside(void *b)
{
	return (void *)(intptr_t)beside_run(b);
}

void world_begin_beside(int (*run)(struct tierd_batch *), struct tierd_batch *b)
{
	beside_run = run;
	if (pthread_create(&beside, NULL, run_beside, b))
		script_fail("no thread");
}

int world_end_beside(void)
{
	void *error;

	pthread_join(beside, &error);
	return (int)(intptr_t)error;
}

void world_before_select(void)
{
}

void world_selected(double min_idle_s, bool sinks)
{
	(void)min_idle_s;
	(void)sinks;
}

/* --- the daemon --------------------------------------------------------------------------------------------------------- */

static bool fails(uint32_t thousandths)
{
	return S.failures && below(1000) < thousandths;
}

int world_store_write(uint32_t tier, uint64_t page, uint32_t count, const uint8_t *bytes)
{
	size_t size = count * page_bytes;

	(void)tier;
	if (fails(60) || pwrite(shared->store_fd, bytes, size, (off_t)(page * page_bytes)) != (ssize_t)size)
		return -EIO;
	return fdatasync(shared->store_fd) ? -errno : 0;
}

int world_store_read(uint32_t tier, uint64_t page, uint32_t count, uint8_t *bytes)
{
	size_t size = count * page_bytes;

	(void)tier;
	if (fails(50))
		usleep(below(2000));
	if (!S.losses && fails(100))
		return -EIO;
	return pread(shared->store_fd, bytes, size, (off_t)(page * page_bytes)) == (ssize_t)size ? 0 : -EIO;
}

int world_store_discard(uint32_t tier, uint64_t page, uint64_t count)
{
	(void)tier;
	return fallocate(shared->store_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * page_bytes),
			 (off_t)(count * page_bytes))
		       ? -errno
		       : 0;
}

static _Atomic bool served_out;

static void *run_asker(void *guest)
{
	struct script_requests held = {0};

	seed_thread(200);
	while (!atomic_load(&served_out))
		if (!script_answer(guest, &held))
			usleep(20);
	return NULL;
}

static void take_page_bytes(size_t bytes)
{
	size_t base = (size_t)sysconf(_SC_PAGESIZE);

	page_bytes = bytes;
	hugetlb = bytes > base;
	stride = hugetlb ? base / 8 : 1;
}

/* A new page waits in a batch of the CPU that made it, and MADV_PAGEOUT passes over it unless called there. */
void world_before_pass(void)
{
	cpu_set_t one, now;
	uint32_t n;

	if (!is_daemon || sched_getaffinity(getppid(), sizeof(now), &now))
		return;
	n = below((uint32_t)CPU_COUNT(&now));
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &now) || n--)
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		sched_setaffinity(0, sizeof(one), &one);
		return;
	}
}

/* Its own open file: the lock goes with the last one who shares it, and the guest's must not keep it. */
static int open_again(int fd, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return must(open(path, flags | O_CLOEXEC), "open again");
}

static int locked_table(void)
{
	int fd = open_again(shared->table_fd, O_RDWR), error;

	while ((error = tierd_table_lock(fd)) == -EWOULDBLOCK)
		usleep(200);
	if (error)
		script_fail("lock: error %d", -error);
	return fd;
}

/* A successor's first step, which knows of no store. */
static void leave_window(struct tierd_guest_args args)
{
	int error;

	for (int i = 0; i < TIERD_TIERS; i++)
		args.tiers[i] = (struct tierd_tier){.fd = -1};
	error = tierd_leave_window(&args);
	if (error)
		script_fail("the window was not left: error %d", -error);
}

static struct tierd_guest *create_guest(int table_fd)
{
	char path[64];
	struct tierd_identity identity;
	struct tierd_serving serving;
	struct tierd_guest *g;
	struct tierd_guest_args args = {
		.table_fd = table_fd,
		.idle_fd = -1,
		.uffd = shared->uffd,
		.pidfd = must((int)syscall(SYS_pidfd_open, getppid(), 0), "pidfd_open"),
		.engine = shared->engine,
		.page_bytes = hugetlb ? (uint32_t)page_bytes : 0,
		.zap = shared->inside ? TIERD_ZAP_INJECT : TIERD_ZAP_PAGEOUT,
		.inject_tid = shared->inject_tid,
		.use_pagemap = shared->use_pagemap,
		.chunk_bytes = 8 * (uint32_t)page_bytes,
		.readahead_pages = 1u << below(4),
		.spin_us_max = below(2) ? 50 : 0,
	};

	snprintf(path, sizeof(path), "/proc/%d/pagemap", getppid());
	args.pagemap_fd = must(open(path, O_RDONLY | O_CLOEXEC), path);
	snprintf(path, sizeof(path), "/proc/%d/mem", getppid());
	args.mem_fd = must(open(path, O_RDWR | O_CLOEXEC), path);
	if (tierd_table_read(table_fd, &identity, args.regions, &args.region_count, &serving))
		script_fail("the state file cannot be read");
	for (uint32_t i = 0; i < args.region_count; i++)
		args.regions[i].memfd = S.anon ? -1 : shared->memfd[i];
	for (int i = 0; i < TIERD_TIERS; i++)
		args.tiers[i].fd = -1;
	args.tiers[1] = (struct tierd_tier){
		.fd = shared->store_fd, .kind = TIERD_KIND_FILE, .capacity_bytes = (S.pages - below(4)) * page_bytes};
	if (shared->direct)
		args.tiers[1].flags = TIERD_SPACE_DIRECT;
	if (S.asked) {
		args.tiers[1].kind = TIERD_KIND_ASKED;
		args.tiers[1].fd = -1;
	}
	args.asked_fd = -1;
	if (shared->life)
		leave_window(args);
	if (tierd_guest_create(&args, &g))
		script_fail("no guest");
	return g;
}

static void make_store_misbehave(struct tierd_guest *g)
{
	struct tierd_store_faults faults = {.slow_us = 500, .hang_us = 20000, .seed = 1 + below(1 << 30)};

	if (!S.failures || !below(3))
		return;
	faults.write_error = below(100);
	faults.write_short = below(200);
	faults.write_slow = below(100);
	faults.write_hang = below(10);
	faults.read_short = below(200);
	faults.read_slow = below(100);
	faults.read_hang = below(10);
	if (!S.losses) {
		faults.read_error = below(200);
		faults.read_flip = below(200);
	}
	tierd_guest_set_store_faults(g, &faults);
}

static void report(struct tierd_guest *g, struct tierd_counters *before)
{
	struct tierd_counters c;

	tierd_guest_counters(g, &c);
	if (c.pages_lost && !S.losses)
		script_fail("%lu pages lost, and nothing destroyed their stored copy", c.pages_lost);
	atomic_fetch_add(&shared->evicted, c.pages_evicted - before->pages_evicted);
	atomic_fetch_add(&shared->rewritten, c.pages_repaired - before->pages_repaired);
	atomic_fetch_add(&shared->lost, c.pages_lost - before->pages_lost);
	atomic_fetch_add(&shared->faults, c.latency_count - before->latency_count);
	*before = c;
}

static int daemon_main(void)
{
	struct tierd_counters counted = {0};
	struct tierd_adoption adoption;
	struct tierd_guest *g;
	int table_fd, error;
	pthread_t asker;
	bool repaired;

	is_daemon = true;
	take_page_bytes(shared->page_bytes);
	S.pages = shared->pages;
	S.tiers = 1;
	S.failures = shared->failures;
	S.losses = shared->losses;
	S.anon = shared->anon;
	S.asked = shared->asked ? 1 << 1 : 0;
	seed_thread(100 + shared->life);
	table_fd = locked_table();
	g = create_guest(table_fd);
	script_set_reads(g);
	atomic_store(&shared->phase, ADOPTING);
	if (!shared->life)
		error = tierd_guest_start(g);
	do
		error = shared->life ? tierd_guest_adopt(g, g->mapped, g->mapped_count, &adoption) : tierd_guest_arm(g);
	while (error == -ETIMEDOUT && S.anon); /* the predecessor's batch is under way still */
	for (uint32_t i = shared->life ? 0 : 1; !error && i < 1 + shared->seed % 2; i++)
		error = tierd_guest_start(g);
	if (error)
		script_fail("%s: error %d", shared->life ? "adoption" : "arm", -error);
	make_store_misbehave(g);
	if (S.asked && pthread_create(&asker, NULL, run_asker, g))
		script_fail("no thread");
	atomic_store(&shared->phase, SERVING);
	while (!atomic_load(&shared->guests_stop)) {
		script_cycle(g);
		report(g, &counted);
	}
	tierd_guest_set_reads(g, S.losses ? 0 : UINT64_MAX, TIERD_LOST_POISON);
	tierd_guest_set_store_faults(g, &(struct tierd_store_faults){0});
	while (!atomic_load(&shared->finish))
		usleep(100);
	repaired = atomic_load(&shared->repaired);
	atomic_store(&shared->phase, LEAVING_IT);
	while (script_bring_back(g, repaired))
		usleep(500);
	report(g, &counted);
	if (!repaired && counted.state_pages[LOST])
		while (!atomic_load(&shared->all_read)) /* it cannot be left: holes are still to be served */
			usleep(100);
	else
		while ((error = tierd_guest_disarm(g)) == -EBUSY) /* a fault is in service */
			usleep(100);
	if (error)
		script_fail("disarm: error %d", -error);
	atomic_store(&served_out, true);
	if (S.asked)
		pthread_join(asker, NULL);
	tierd_guest_destroy(g);
	atomic_store(&shared->phase, LEFT);
	return 0;
}

/* --- the guest: its life ------------------------------------------------------------------------------------------------ */

static bool verbose;
static const char *store_directory = "/var/tmp";
static uint32_t engine; /* TIERD_ENGINE_* */
static bool large, anon, asked;
static int references[2] = {-1, -1}; /* a pipe that refers to a page of each large folio */
static pid_t daemon_pid;
static uint64_t kills[LEFT + 1], accesses, faults, evicted, errors_seen, lost_pages;
static _Atomic bool over;

/* Before 6.6 there is no poison: a page that is lost would leave its thread waiting, so none is, then. */
static int userfaultfd_create(void)
{
	const uint64_t poison = 1ull << 14;
	int uffd = must((int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), "userfaultfd");
	uint64_t features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_THREAD_ID |
			    1ull << 4 /* MISSING_HUGETLBFS */ | 1ull << 12 /* WP_HUGETLBFS_SHMEM, 5.19 */;
	struct uffdio_api api = {.api = UFFD_API};

	if (anon)
		features |= 1ull << 16 /* MOVE */;
	if (anon && engine == TIERD_ENGINE_STOCK)
		features |= 1ull << 15 /* WP_ASYNC */;
	if (engine != TIERD_ENGINE_STOCK)
		features |= 1ull << 10 | 1ull << 9 /* MINOR_SHMEM, MINOR_HUGETLBFS */ | 1ull << 17 |
			    1ull << 18 /* tracking, and its async mode */;
	api.features = features | poison;
	if (!ioctl(uffd, UFFDIO_API, &api))
		return uffd;
	api = (struct uffdio_api){.api = UFFD_API, .features = features};
	must(ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API");
	shared->losses = S.losses = false;
	shared->use_pagemap = true; /* PAGEMAP_SCAN is from 6.7 on */
	return uffd;
}

/* One folio for the whole file. Its last page is in no region, and is the one that the pipe refers to. */
static void make_large(int memfd)
{
	size_t bytes = page_bytes * page_bytes / 8;
	struct iovec last = {.iov_len = page_bytes};
	struct stat file;

	must(ftruncate(memfd, (off_t)bytes), "memory");
	must((int)pwrite(memfd, "", 1, 0), "memory");
	if (fstat(memfd, &file) || (size_t)file.st_blocks * 512 != bytes)
		script_fail("no large folio: is shmem_enabled `always`?");
	if (references[0] < 0)
		return;
	last.iov_base = mmap(NULL, page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, (off_t)(bytes - page_bytes));
	if (last.iov_base == MAP_FAILED || vmsplice(references[1], &last, 1, 0) < 0)
		must(-1, "a reference");
	munmap(last.iov_base, page_bytes);
}

static void drop_references(void)
{
	for (int i = 0; i < 2 && references[i] >= 0; i++) {
		close(references[i]);
		references[i] = -1;
	}
}

static uint8_t *map_anonymous(size_t bytes)
{
	uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		must(-1, "memory");
	must(madvise(at, bytes, MADV_DONTFORK), "MADV_DONTFORK"); /* what a child has, too, cannot be moved */
	return at;
}

/* A page between the two, so that they stay mappings of their own. */
static void make_anonymous_region(uint32_t i, uint32_t count)
{
	size_t bytes = count * page_bytes;
	uint8_t *at = map_anonymous(bytes), *staging = map_anonymous(bytes);

	regions[i] = (struct tierd_region){
		.address = (uintptr_t)at, .bytes = bytes, .staging = (uintptr_t)staging, .memfd = -1};
	for (uint32_t page = 0; page < count; page++)
		memory[S.pages + page] = at + page * page_bytes;
	S.pages += count;
}

static void make_region(uint32_t i, uint32_t count)
{
	size_t bytes = count * page_bytes, offset = below(3) * page_bytes;
	uint8_t *at;

	shared->memfd[i] = must(memfd_create("guest", MFD_CLOEXEC | (hugetlb ? MFD_HUGETLB : 0)), "memfd");
	if (large)
		make_large(shared->memfd[i]);
	else
		must(ftruncate(shared->memfd[i], (off_t)(offset + bytes)), "memory");
	at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, shared->memfd[i], (off_t)offset);
	if (at == MAP_FAILED)
		must(-1, "memory");
	must(madvise(at, bytes, MADV_DONTFORK), "MADV_DONTFORK"); /* the daemon must not map the guest's memory */
	regions[i] = (struct tierd_region){.address = (uintptr_t)at, .bytes = bytes, .offset = offset, .memfd = -1};
	for (uint32_t page = 0; page < count; page++)
		memory[S.pages + page] = at + page * page_bytes;
	S.pages += count;
}

static void make_state_and_store(void)
{
	struct tierd_identity identity = {
		.pid = getpid(), .uffd_in_vmm = shared->uffd, .epoch_ns = 1000000, .page_bytes = page_bytes};
	uint64_t bytes;
	uint8_t *table;

	shared->table_fd = must(memfd_create("state", MFD_CLOEXEC), "memfd");
	if (tierd_table_create(shared->table_fd, &identity, regions, shared->region_count))
		script_fail("no state file");
	bytes = table_bytes(S.pages);
	table = mmap(NULL, bytes, PROT_READ, MAP_SHARED, shared->table_fd, 0);
	if (table == MAP_FAILED)
		must(-1, "state file");
	words = (_Atomic page_word *)(table + TABLE_HEADER_BYTES);
	shared->store_fd = must(open(store_directory, O_RDWR | O_TMPFILE | O_CLOEXEC, 0600), store_directory);
	must(ftruncate(shared->store_fd, (off_t)(S.pages * page_bytes)), "store");
	if (shared->direct) {
		int plain = shared->store_fd;

		shared->store_fd = open_again(plain, O_RDWR | O_DIRECT);
		close(plain);
	}
}

/* Then MADV_PAGEOUT would write guest pages to it. */
static bool swap_is_on(void)
{
	struct sysinfo info;

	return !sysinfo(&info) && info.totalswap;
}

static void set_up(void)
{
	bool crowded = !below(3);

	memset(&S, 0, sizeof(S));
	for (uint32_t page = 0; page < SCRIPT_PAGES_MAX; page++)
		destroyed[page] = may_fail[page] = false;
	memset(torn, 0, sizeof(torn));
	atomic_store(&kills_of_seed, 0);
	shared->life = 0;
	if (large && below(3))
		must(pipe2(references, O_CLOEXEC), "pipe");
	shared->region_count = crowded ? 1 : 1 + below(REGIONS_MAX);
	for (uint32_t i = 0; i < shared->region_count; i++)
		(anon ? make_anonymous_region : make_region)(i, crowded ? 2 + below(4) : 4 + below(16));
	shared->pages = S.pages;
	shared->failures = S.failures = below(3);
	shared->losses = S.losses = !below(3);
	shared->direct = below(2) && !asked;
	shared->asked = asked;
	shared->use_pagemap = below(2) && engine == TIERD_ENGINE_STOCK && !hugetlb && !anon;
	shared->anon = S.anon = anon;
	shared->engine = engine;
	shared->inside = !below(4) || swap_is_on() || hugetlb;
	shared->uffd = userfaultfd_create();
	make_state_and_store();
	atomic_store(&shared->guests_stop, false);
	atomic_store(&shared->finish, false);
	atomic_store(&shared->repaired, false);
	atomic_store(&shared->all_read, false);
}

static void tear_down(void)
{
	close(shared->uffd);
	close(shared->table_fd);
	close(shared->store_fd);
	drop_references();
	munmap((char *)words - TABLE_HEADER_BYTES, table_bytes(S.pages));
	for (uint32_t i = 0; i < shared->region_count; i++) {
		if (!anon)
			close(shared->memfd[i]);
		munmap((void *)(uintptr_t)regions[i].address, regions[i].bytes);
		if (anon)
			munmap((void *)(uintptr_t)regions[i].staging, regions[i].bytes);
	}
	accesses += S.accesses;
	errors_seen += S.memory_errors;
}

static void daemon_spawn(void)
{
	char number[16];
	char *arguments[] = {"real", "--daemon", number, NULL};
	int keep[] = {shared_fd, shared->uffd, shared->table_fd, shared->store_fd};

	snprintf(number, sizeof(number), "%d", shared_fd);
	atomic_store(&shared->phase, STARTING);
	daemon_pid = must(fork(), "fork");
	if (daemon_pid)
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (size_t i = 0; i < sizeof(keep) / sizeof(keep[0]); i++)
		fcntl(keep[i], F_SETFD, 0);
	for (uint32_t i = 0; i < shared->region_count && !anon; i++)
		fcntl(shared->memfd[i], F_SETFD, 0);
	execv("/proc/self/exe", arguments);
	_exit(3);
}

/* True when it was killed; false when it had ended well before. */
static bool daemon_end(bool kill_it)
{
	int status;

	if (kill_it)
		kill(daemon_pid, SIGKILL);
	while (waitpid(daemon_pid, &status, 0) < 0)
		if (errno != EINTR)
			must(-1, "waitpid");
	daemon_pid = 0;
	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
		kills[atomic_load(&shared->phase)]++;
		atomic_fetch_add(&kills_of_seed, 1);
		return true;
	}
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		script_fail("the daemon ended by itself: status %#x", (unsigned int)status);
	return false;
}

static void wait_until_served(void)
{
	siginfo_t ended = {0};

	while (atomic_load(&shared->phase) < SERVING && !ended.si_pid) {
		usleep(50);
		waitid(P_PID, (id_t)daemon_pid, &ended, WEXITED | WNOHANG | WNOWAIT);
	}
}

static void flip(uint32_t page)
{
	int fd = open_again(shared->store_fd, O_RDWR);
	uint8_t byte;

	if (pread(fd, &byte, 1, (off_t)flipped_at[page]) != 1)
		must(-1, "read of the store");
	byte ^= 0x10;
	if (pwrite(fd, &byte, 1, (off_t)flipped_at[page]) != 1 || fdatasync(fd))
		must(-1, "write of the store");
	close(fd);
}

/* Nobody may wait for ever: neither the guest for the daemon, nor we for either. Says where everybody is: the daemon's phase, and
 * pages that are not with the guest: number, word. */
static void on_alarm(int signal)
{
	char line[2048];
	int n = snprintf(line, sizeof(line), "seed %lu, life %u: hang in phase %u;", shared->seed, shared->life,
			 (unsigned int)atomic_load(&shared->phase));

	(void)signal;
	for (uint32_t page = 0; words && page < S.pages && n < (int)sizeof(line) - 32; page++) {
		page_word word = atomic_load(&words[page]);

		if (word_state(word) != RESIDENT)
			n += snprintf(line + n, sizeof(line) - (size_t)n, " %u: %x", page, word);
	}
	line[n++] = '\n';
	if (write(STDOUT_FILENO, line, (size_t)n) < 0)
		_exit(2);
	if (daemon_pid > 0)
		kill(daemon_pid, SIGKILL);
	_exit(1);
}

/* Of some stored pages that nobody waits for, while no daemon runs: what the state file says is so, then. */
static void destroy_copies(void)
{
	for (uint32_t page = 0; page < S.pages; page++) {
		page_word word = atomic_load(&words[page]);

		if (destroyed[page] || word_state(word) != STORED || word_tier(word) == TIER_ZERO ||
		    word_staged(word) || below(2) || pthread_mutex_trylock(&locks[page]))
			continue;
		destroyed[page] = may_fail[page] = true;
		flipped_at[page] = page * page_bytes + below((uint32_t)page_bytes);
		flip(page);
		world_unlock(page);
	}
}

static void repair_copies(void)
{
	for (uint32_t page = 0; page < S.pages; page++) {
		if (destroyed[page])
			flip(page);
		destroyed[page] = false;
	}
}

static void next_life(void)
{
	if (S.losses) {
		close(locked_table()); /* only now is the predecessor's last thread gone */
		if (below(4))
			destroy_copies();
		else
			repair_copies();
	}
	shared->life++;
	daemon_spawn();
}

static void *run_guest(void *number)
{
	seed_thread((uintptr_t)number);
	script_guest((uint32_t)(uintptr_t)number);
	return NULL;
}

static void *run_final_read(void *number)
{
	seed_thread(20 + (uintptr_t)number);
	script_read_all((uint32_t)(uintptr_t)number);
	return NULL;
}

/* Runs the calls that the daemon makes inside the VMM. */
static void *run_idle(void *unused)
{
	(void)unused;
	atomic_store((_Atomic int *)&shared->inject_tid, gettid());
	while (!atomic_load(&over))
		usleep(1000);
	return NULL;
}

static void start(pthread_t *threads, uint32_t count, void *(*run)(void *))
{
	for (uintptr_t i = 0; i < count; i++)
		if (pthread_create(&threads[i], NULL, run, (void *)i))
			script_fail("no thread");
}

static void join(pthread_t *threads, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
}

/* Where everybody has come to an end and no daemon runs: every page is right, or is known to be lost. */
static void check_end(void)
{
	for (uint32_t page = 0; page < S.pages; page++) {
		enum page_state state = word_state(atomic_load(&words[page]));

		if (state == RESIDENT)
			script_read(0, page);
		else if (state != LOST || !may_fail[page])
			script_fail("page %u is in state %d at the end", page, state);
		lost_pages += state == LOST;
	}
}

static void run_seed(uint64_t seed)
{
	pthread_t guests[THREADS_MAX];
	uint32_t count, lives;

	shared->seed = seed;
	seed_thread(50);
	set_up();
	count = 1 + below(THREADS_MAX);
	lives = 1 + below(LIVES_MAX);
	alarm(SEED_S_MAX);
	start(guests, count, run_guest);
	daemon_spawn();
	while (--lives) {
		if (below(3)) /* else: before it serves, mostly */
			wait_until_served();
		usleep(slowness * below(below(3) ? 15000 : 2500));
		if (!daemon_end(true))
			script_fail("the daemon ended before it was asked to");
		if (large && !below(3))
			drop_references();
		next_life();
	}
	usleep(slowness * below(20000));
	atomic_store(&shared->guests_stop, true);
	join(guests, count);
	atomic_store(&shared->repaired, below(2));
	if (atomic_load(&shared->repaired))
		repair_copies();
	atomic_store(&shared->finish, true);
	start(guests, 2, run_final_read);
	for (lives = below(3); lives; lives--) { /* killed while it brings everything back and leaves */
		usleep(slowness * below(1500));
		if (!daemon_end(true))
			break;
		shared->life++;
		daemon_spawn();
	}
	join(guests, 2);
	if (S.losses && shared->life) {
		/* killed in a retry of a page whose reader had zapped the poison: STORED again, and nobody to find out */
		wait_until_served();
		start(guests, 1, run_final_read);
		join(guests, 1);
	}
	atomic_store(&shared->all_read, true);
	if (daemon_pid)
		daemon_end(false);
	check_end();
	alarm(0);
	tear_down();
}

static void *map_shared(int fd)
{
	void *at = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (at == MAP_FAILED)
		abort();
	return at;
}

static void guest_main(uint64_t from, uint64_t seeds)
{
	struct sigaction bus = {.sa_handler = on_sigbus, .sa_flags = SA_NODEFER}, hang = {.sa_handler = on_alarm};
	pthread_t idle;

	shared_fd = memfd_create("shared", MFD_CLOEXEC);
	if (shared_fd < 0 || ftruncate(shared_fd, sizeof(*shared)))
		abort();
	shared = map_shared(shared_fd);
	shared->page_bytes = (uint32_t)page_bytes;
	sigaction(SIGBUS, &bus, NULL);
	sigaction(SIGALRM, &hang, NULL);
	for (uint32_t page = 0; page < SCRIPT_PAGES_MAX; page++)
		pthread_mutex_init(&locks[page], NULL);
	start(&idle, 1, run_idle);
	while (!atomic_load(
		(_Atomic int *)&shared->inject_tid)) /* or the first daemon has no thread to make its calls */
		usleep(100);
	for (uint64_t seed = from; seed < from + seeds; seed++) {
		if (verbose)
			printf("seed %lu\n", seed);
		run_seed(seed);
	}
	evicted = atomic_load(&shared->evicted);
	faults = atomic_load(&shared->faults);
	atomic_store(&over, true);
	pthread_join(idle, NULL);
	printf("%lu seeds from %lu: %lu accesses, %lu faults, %lu pages evicted, %lu rewritten, %lu lost, %lu memory "
	       "errors, "
	       "%lu kills at the start, %lu kills in adoption, %lu kills in service, %lu kills while leaving; "
	       "every byte right\n",
	       seeds, from, accesses, faults, evicted, atomic_load(&shared->rewritten), lost_pages, errors_seen,
	       kills[STARTING], kills[ADOPTING], kills[SERVING], kills[LEAVING_IT]);
}

int main(int count, char **arguments)
{
	uint64_t seeds = 10, from = 1;

	take_page_bytes((size_t)sysconf(_SC_PAGESIZE));
	for (int i = 1; i < count; i++) {
		if (!strcmp(arguments[i], "-v")) {
			verbose = true;
			setvbuf(stdout, NULL, _IOLBF, 0);
		} else if (!strcmp(arguments[i], "--hugetlb")) {
			take_page_bytes(2 << 20);
		} else if (!strcmp(arguments[i], "--large")) {
			large = true;
		} else if (!strcmp(arguments[i], "--anon")) {
			anon = true;
		} else if (!strcmp(arguments[i], "--asked")) {
			asked = true;
		} else if (i + 1 < count && !strcmp(arguments[i], "--daemon")) {
			shared = map_shared(atoi(arguments[i + 1]));
			return daemon_main();
		} else if (i + 1 < count && !strcmp(arguments[i], "--engine") &&
			   script_engine(arguments[i + 1], &engine)) {
			i++;
		} else if (i + 1 < count && !strcmp(arguments[i], "--slowness")) {
			slowness = (uint32_t)atoi(arguments[++i]);
		} else if (i + 1 < count && !strcmp(arguments[i], "--seeds")) {
			seeds = strtoull(arguments[++i], NULL, 10);
		} else if (i + 1 < count && !strcmp(arguments[i], "--from")) {
			from = strtoull(arguments[++i], NULL, 10);
		} else if (i + 1 < count && !strcmp(arguments[i], "--store")) {
			store_directory = arguments[++i];
		} else {
			return fprintf(stderr,
				       "usage: real [--engine stock|rwp|rfc] [--hugetlb] [--large] [--anon] [--asked] "
				       "[--slowness N] "
				       "[--seeds N] [--from S] [--store DIRECTORY] [-v]\n"),
			       2;
		}
	}
	guest_main(from, seeds);
	return 0;
}
