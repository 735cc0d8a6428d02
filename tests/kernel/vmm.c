/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm.c: a child that plays the VMM. Guest RAM as QEMU makes it (a memfd per region), threads that read and write random
 * pages, and a private shadow that says what every word must be.
 *
 *   vmm [bytes=N] [regions=N] [threads=N] [kind=memfd|private|anonymous|huge|gigantic|file:PATH] [name=MEMFD] [close]
 *       [survive] [handshake=SOCKET] [device=FD] [ARGUMENT...]
 *
 * `bytes` is the size of each region; a page is the system's or, of `kind=huge`, 2 MiB, of `kind=gigantic`, 1 GiB; pages are numbered
 * through all regions.
 * `kind=anonymous` is private anonymous memory, known by its size: "-m BYTESB" among the arguments. A page is either zeros
 * (sequence 0) or words that follow from its number and its sequence, which no write uses twice: older bytes are never right. Thread i owns the
 * pages p with p % threads == i, so that every read can be checked without a lock. A page where a memory error
 * was seen ends the child or, with `survive`, is left alone from then on and told by `failed`. Arguments without a meaning here are
 * left alone: a test gives the command line of a QEMU.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "child.h"
#include "vmm.h"

enum { THREADS_MAX = 16, STOP_MS_MAX = 20000, HUGE_BYTES = 2 << 20, GIGANTIC_BYTES = 1 << 30 };

#ifndef MFD_HUGETLB
#define MFD_HUGETLB 4U
#endif
#ifndef MFD_HUGE_SHIFT
#define MFD_HUGE_SHIFT 26
#endif

uint64_t page_bytes, pages;
uint32_t *sequence;
int memfd[REGIONS_MAX];

static uint64_t part_bytes; /* what the kernel copies at once */
static uint64_t *took, reads;
static uint32_t *writes; /* by page; does not start again when a page becomes zeros */
static uint64_t region_bytes = 64 << 20, region_count = 1, thread_count = 2;
bool anonymous;
static const char *kind = "memfd", *memfd_name = "memory-backend-memfd", *handshake_path;
static int userfaultfd_device = -1;
static bool close_memfd, survive, compressible;
static uint8_t *region[REGIONS_MAX];

/* what the threads do; changed only while they rest */
static uint64_t hot_first, hot_count, writes_percent, pause_between_ns;
static _Atomic bool running;
static _Atomic uint64_t resting, operations, verified_bytes, max_ns;

/* memory errors */
static bool *failed; /* by page */
static _Thread_local sigjmp_buf memory_error;
static _Thread_local volatile sig_atomic_t may_fail;

/* --- pages -------------------------------------------------------------------------------------------------------------- */

uint64_t *page_at(uint64_t page)
{
	uint64_t each = region_bytes / page_bytes;

	return (uint64_t *)(region[page / each] + page % each * page_bytes);
}

static uint64_t key_of(uint64_t page)
{
	return sequence[page] ? mix(page << 32 | sequence[page]) : 0;
}

/* With `compressible`: a page in four is one word again and again, and two have each word twice or eight times. */
static uint64_t word_of(uint64_t key, uint64_t i)
{
	static const uint64_t same[] = {1, 2, 8, UINT64_MAX};

	return !key ? 0 : key + i / (compressible ? same[key >> 62] : 1) * 0x9e3779b97f4a7c15u;
}

static void check_word(uint64_t page, uint64_t key, uint64_t i, uint64_t got)
{
	if (got != word_of(key, i))
		wrong(page, i, got, word_of(key, i));
}

/* Stops at the first wrong word of a page: the others are wrong, too. */
void check_page(uint64_t page, const uint64_t *words)
{
	uint64_t key = key_of(page), before = atomic_load(&wrong_values);

	for (uint64_t i = 0; i < page_bytes / 8 && atomic_load(&wrong_values) == before; i++)
		check_word(page, key, i, words[i]);
	atomic_fetch_add(&verified_bytes, page_bytes);
}

static void on_sigbus(int number)
{
	if (may_fail)
		siglongjmp(memory_error, 1);
	signal(number, SIG_DFL); /* not one that we looked for: the access is made again, and ends us */
}

/* Does something that touches the page; a page that had a memory error is left alone. */
static void at_page(uint64_t page, void (*touch)(uint64_t page, void *argument), void *argument)
{
	if (failed[page])
		return;
	if (sigsetjmp(memory_error, 1)) {
		failed[page] = true;
	} else {
		may_fail = survive;
		touch(page, argument);
	}
	may_fail = false;
}

void write_page(uint64_t page, uint64_t *to)
{
	uint64_t key;

	sequence[page] = ++writes[page];
	key = key_of(page);
	for (uint64_t i = 0; i < page_bytes / 8; i++)
		to[i] = word_of(key, i);
}

/* --- threads ------------------------------------------------------------------------------------------------------------ */

struct worker {
	uint64_t number, random, choice;
	int pipe[2];
	uint64_t *buffer;
};

static uint64_t roll(struct worker *w)
{
	return mix(w->random++);
}

/* Of a call that copies from or to the guest's page. */
static bool copied(uint64_t page, ssize_t n)
{
	if (n == (ssize_t)part_bytes)
		return true;
	if (!survive || n >= 0 || (errno != EFAULT && errno != EHWPOISON))
		die("pipe");
	failed[page] = true;
	return false;
}

/* As a device would: the kernel copies from and to the guest's page, and takes the fault itself. */
static void through_kernel(struct worker *w, uint64_t page, bool write_it)
{
	uint8_t *buffer = (uint8_t *)w->buffer, *guest = (uint8_t *)page_at(page);
	bool good = true;

	if (write_it)
		write_page(page, w->buffer);
	for (uint64_t at = 0; good && at < page_bytes; at += part_bytes) {
		if (!write_it && !(good = copied(page, write(w->pipe[1], guest + at, part_bytes))))
			break;
		if (write_it && write(w->pipe[1], buffer + at, part_bytes) != (ssize_t)part_bytes)
			die("pipe");
		if (write_it)
			good = copied(page, read(w->pipe[0], guest + at, part_bytes));
		if ((!write_it || !good) && read(w->pipe[0], buffer + at, part_bytes) != (ssize_t)part_bytes)
			die("pipe");
	}
	if (good && !write_it)
		check_page(page, w->buffer);
}

static void operate_at(uint64_t page, void *argument)
{
	struct worker *w = argument;
	bool write_it = w->choice % 100 < writes_percent;

	if ((w->choice >> 32) % 8 == 0) {
		through_kernel(w, page, write_it);
	} else if (write_it) {
		write_page(page, page_at(page));
	} else if ((w->choice >> 35) % 4 == 0) {
		check_page(page, page_at(page));
	} else {
		check_word(page, key_of(page), w->choice >> 40 & 63,
			   ((volatile uint64_t *)page_at(page))[w->choice >> 40 & 63]);
		atomic_fetch_add(&verified_bytes, 8);
	}
}

static void operate(struct worker *w)
{
	uint64_t page = hot_first + roll(w) % hot_count;

	w->choice = roll(w);
	page -= (page % thread_count + thread_count - w->number) % thread_count; /* one of ours */
	if (page >= hot_first && page < pages)
		at_page(page, operate_at, w);
}

static void *work(void *argument)
{
	struct worker *w = argument;

	for (;;) {
		uint64_t began, took, longest;

		if (!atomic_load(&running)) {
			atomic_fetch_add(&resting, 1);
			while (!atomic_load(&running))
				pause_ns(200000);
			atomic_fetch_sub(&resting, 1);
		}
		began = now_ns();
		operate(w);
		took = now_ns() - began;
		longest = atomic_load(&max_ns);
		while (took > longest && !atomic_compare_exchange_weak(&max_ns, &longest, took))
			;
		atomic_fetch_add(&operations, 1);
		if (pause_between_ns)
			pause_ns(pause_between_ns);
	}
	return NULL;
}

static void start_threads(void)
{
	for (uint64_t i = 0; i < thread_count; i++) {
		struct worker *w = calloc(1, sizeof(*w));
		pthread_t thread;

		if (!w || pipe(w->pipe) || !(w->buffer = malloc(page_bytes)))
			die("memory for a thread");
		w->number = i;
		w->random = i << 48;
		if (pthread_create(&thread, NULL, work, w))
			die("thread");
	}
}

/* --- commands: work ----------------------------------------------------------------------------------------------------- */

uint64_t end_of(const uint64_t *a)
{
	return a[1] && a[0] + a[1] < pages ? a[0] + a[1] : pages;
}

/* The threads check what they read; what a command checks or changes at the same time would be wrong. */
static bool busy(void)
{
	if (atomic_load(&running) || atomic_load(&resting) < thread_count)
		say("error the threads run; stop first");
	return atomic_load(&running) || atomic_load(&resting) < thread_count;
}

static void fill(const uint64_t *a, int count)
{
	(void)count;
	if (busy())
		return;
	for (uint64_t page = a[0]; page < end_of(a); page++)
		write_page(page, page_at(page));
	say("ok %lu", end_of(a) - a[0]);
}

static void zero(const uint64_t *a, int count)
{
	(void)count;
	if (busy())
		return;
	for (uint64_t page = a[0]; page < end_of(a); page++) {
		sequence[page] = 0;
		memset(page_at(page), 0, page_bytes);
	}
	say("ok %lu", end_of(a) - a[0]);
}

static void verify_at(uint64_t page, void *unused)
{
	(void)unused;
	check_page(page, page_at(page));
}

static void verify(const uint64_t *a, int count)
{
	uint64_t before = atomic_load(&wrong_values);

	(void)count;
	if (busy())
		return;
	for (uint64_t page = a[0]; page < end_of(a); page++)
		at_page(page, verify_at, NULL);
	say("ok %lu %lu", end_of(a) - a[0], atomic_load(&wrong_values) - before);
}

/* Reads one word of each page. */
static void touch(const uint64_t *a, int count)
{
	uint64_t began = now_ns();

	(void)count;
	if (busy())
		return;
	for (uint64_t page = a[0]; page < end_of(a); page++)
		check_word(page, key_of(page), 0, *(volatile uint64_t *)page_at(page));
	say("ok %lu", now_ns() - began);
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

/* FIRST COUNT PAUSE-US: as touch, with a pause after each page. Median, p99 and the longest of these reads, in ns. */
static void stalls(const uint64_t *a, int count)
{
	uint64_t n = end_of(a) - a[0];

	(void)count;
	if (busy())
		return;
	free(took);
	took = n ? malloc(n * sizeof(*took)) : NULL;
	if (!took)
		die("memory for the reads");
	reads = n;
	for (uint64_t i = 0; i < n; i++) {
		uint64_t began = now_ns(), word = *(volatile uint64_t *)page_at(a[0] + i);

		took[i] = now_ns() - began;
		check_word(a[0] + i, key_of(a[0] + i), 0, word);
		pause_ns(a[2] * 1000);
	}
	qsort(took, n, sizeof(*took), compare);
	say("ok %lu %lu %lu", took[n / 2], took[n * 99 / 100], took[n - 1]);
}

/* COUNT: so many of these reads, the longest: their median and p99, in ns. */
static void longest(const uint64_t *a, int count)
{
	uint64_t n = a[0] < reads ? a[0] : reads, *from = took + reads - n;

	(void)count;
	say("ok %lu %lu", n ? from[n / 2] : 0, n ? from[n * 99 / 100] : 0);
}

/* FIRST COUNT: what the threads work on. */
static void hot(const uint64_t *a, int count)
{
	(void)count;
	if (busy())
		return;
	hot_first = a[0];
	hot_count = end_of(a) - a[0];
	say("ok %lu", hot_count);
}

/* OPERATIONS-PER-SECOND-OF-A-THREAD (0: as fast as they can) PERCENT-OF-WRITES */
static void run(const uint64_t *a, int count)
{
	pause_between_ns = a[0] ? 1000000000u / a[0] : 0;
	writes_percent = count > 1 ? a[1] : 50;
	atomic_store(&running, true);
	say("ok");
}

static void stop(const uint64_t *a, int count)
{
	uint64_t began = now_ns();

	(void)a, (void)count;
	atomic_store(&running, false);
	while (atomic_load(&resting) < thread_count) {
		if (now_ns() - began > STOP_MS_MAX * 1000000u) {
			say("error %lu of %lu threads do not come back from a page",
			    thread_count - atomic_load(&resting), thread_count);
			return;
		}
		pause_ns(100000);
	}
	say("ok %lu %lu", atomic_load(&operations), atomic_load(&wrong_values));
}

static void stats(const uint64_t *a, int count)
{
	(void)a, (void)count;
	say("ok operations=%lu wrong=%lu verified=%lu max_ns=%lu running=%d", atomic_load(&operations),
	    atomic_load(&wrong_values), atomic_load(&verified_bytes), atomic_exchange(&max_ns, 0),
	    atomic_load(&running));
}

/* From FIRST on: the first page that had a memory error; the number of pages when there is none. */
static void first_failed(const uint64_t *a, int count)
{
	uint64_t page = a[0];

	(void)count;
	while (page < pages && !failed[page])
		page++;
	say("ok %lu", page);
}

static void quit(const uint64_t *a, int count)
{
	(void)a, (void)count;
	say("ok");
	exit(atomic_load(&wrong_values) ? 2 : 0);
}

static const struct command commands[] = {
	{"fill", fill},
	{"zero", zero},
	{"verify", verify},
	{"touch", touch},
	{"stalls", stalls},
	{"longest", longest},
	{"hot", hot},
	{"run", run},
	{"stop", stop},
	{"stats", stats},
	{"failed", first_failed},
	{"quit", quit},
	{"map-second", map_second},
	{"unmap-second", unmap_second},
	{"lock", lock},
	{"unlock", unlock},
	{"pin", pin},
	{"unpin", unpin},
	{"splice", splice_page},
	{"unsplice", unsplice},
	{"fork", fork_child},
	{"end-child", end_child},
	{"register", register_own},
	{"unregister", unregister_own},
	{"filter", filter},
	{"collapse", collapse},
	{"large", large},
	{"mergeable", mergeable},
	{"twin", twin},
	{"give-back", give_back},
	{"zap", zap},
	{"page-out", page_out},
	{"balloon", balloon},
	{"replace", replace_mapping},
	{"unmap", unmap_region},
	{"map-again", map_again},
	{"map-other", map_other},
	{"exec", execute},
	{"add", add_memory},
	{"handshake", handshake},
	{"close-userfaultfd", close_userfaultfd},
	{NULL, NULL},
};

/* --- start -------------------------------------------------------------------------------------------------------------- */

static void parse(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		unsigned long n;

		if (sscanf(argv[i], "bytes=%lu", &n) == 1)
			region_bytes = n;
		else if (sscanf(argv[i], "regions=%lu", &n) == 1 && n <= REGIONS_MAX)
			region_count = n;
		else if (sscanf(argv[i], "threads=%lu", &n) == 1 && n <= THREADS_MAX)
			thread_count = n;
		else if (!strncmp(argv[i], "kind=", 5))
			kind = argv[i] + 5;
		else if (!strncmp(argv[i], "name=", 5))
			memfd_name = argv[i] + 5;
		else if (!strncmp(argv[i], "handshake=", 10))
			handshake_path = argv[i] + 10;
		else if (sscanf(argv[i], "device=%lu", &n) == 1)
			userfaultfd_device = (int)n;
		else if (!strcmp(argv[i], "close"))
			close_memfd = true;
		else if (!strcmp(argv[i], "survive"))
			survive = true;
		else if (!strcmp(argv[i], "compressible"))
			compressible = true;
	}
}

static void make_region(uint64_t i)
{
	int flags = MAP_SHARED;
	uint64_t align = page_bytes > HUGE_BYTES ? page_bytes : HUGE_BYTES;
	int huge = page_bytes == GIGANTIC_BYTES ? MFD_HUGETLB | 30 << MFD_HUGE_SHIFT
		   : page_bytes == HUGE_BYTES   ? MFD_HUGETLB
						: 0;
	void *reserved;

	memfd[i] = -1;
	if (anonymous) {
		flags = MAP_PRIVATE | MAP_ANONYMOUS;
	} else if (!strncmp(kind, "file:", 5)) {
		memfd[i] = open(kind + 5, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	} else {
		if (!strcmp(kind, "private"))
			flags = MAP_PRIVATE;
		memfd[i] = memfd_create(memfd_name, (unsigned int)(MFD_CLOEXEC | MFD_ALLOW_SEALING | huge));
	}
	if (!(flags & MAP_ANONYMOUS) && (memfd[i] < 0 || ftruncate(memfd[i], (off_t)region_bytes)))
		die("memory file");
	/* aligned as QEMU's RAM is, so that large folios could be mapped; between guards, so that no other memory is one with it */
	reserved = mmap(NULL, region_bytes + 2 * align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (reserved == MAP_FAILED)
		die("address space");
	region[i] = mmap((void *)(((uint64_t)reserved + align) & ~(align - 1)), region_bytes, PROT_READ | PROT_WRITE,
			 flags | MAP_FIXED, memfd[i], 0);
	if (region[i] == MAP_FAILED)
		die("guest memory");
	if (close_memfd && memfd[i] >= 0)
		close(memfd[i]);
}

int main(int argc, char **argv)
{
	char addresses[REGIONS_MAX * 20] = "";

	parse(argc, argv);
	page_bytes = part_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
	anonymous = !strcmp(kind, "anonymous");
	if (!strcmp(kind, "huge"))
		page_bytes = HUGE_BYTES;
	else if (!strcmp(kind, "gigantic"))
		page_bytes = GIGANTIC_BYTES;
	pages = region_bytes / page_bytes * region_count;
	start_protocol();
	for (uint64_t i = 0; i < region_count; i++) {
		make_region(i);
		snprintf(addresses + strlen(addresses), 20, " %#lx", (uint64_t)region[i]);
	}
	sequence = calloc(pages, sizeof(*sequence));
	writes = calloc(pages, sizeof(*writes));
	failed = calloc(pages, sizeof(*failed));
	if (!sequence || !writes || !failed)
		die("shadow");
	hot_count = pages;
	signal(SIGBUS, on_sigbus);
	start_threads();
	while (atomic_load(&resting) < thread_count)
		pause_ns(100000);
	if (handshake_path)
		start_handshake(handshake_path, userfaultfd_device, region_count, region_bytes);
	say("ok %lu %lu%s", pages, page_bytes, addresses);
	obey(commands);
	return 0;
}
