/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bare.c: the limits. Nothing but the system calls that the job takes; no table, no ages, no checksum, no promise.
 *
 *   bare fault STYLE PAGES COUNT LOAD-CPU HANDLER-CPU STORE   STYLE: spin, sleep -> p50 p99 in ns
 *   bare fault-lz4 STYLE PAGES COUNT LOAD-CPU HANDLER-CPU     from a compressed copy in the handler's memory -> p50 p99 in ns
 *   bare deactivate PID ADDRESS BYTES                         PAGEMAP_SCAN and MADV_PAGEOUT of another process -> ns
 *   bare evict BYTES STORE                                    read, write with O_DIRECT, punch in 2 MiB pieces -> ns
 *   bare anonymous BYTES STORE                                move, read, write with O_DIRECT, drop in 2 MiB pieces -> ns
 *   bare compress-out BYTES          the same out of a memfd, whose pages are dropped -> ns of CPU
 *   bare compress BYTES              LZ4, the results one behind the other in fresh memory -> ns of CPU, their bytes, what zsmalloc would take
 *   bare get PORT KEYS COUNT         of a Redis on loopback, values of a page, one connection -> p50 in ns of a round trip
 *   bare objects BYTES DIRECTORY     out of a memfd, Zstandard and AES-256-GCM by page, a file a piece, four threads -> ns
 *   bare swap BYTES STATISTICS CPU   memory out to swap and back; mm_stat of zram -> bytes, what it takes, ns in order, p50 at random
 */
#include "load.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "codec.h"
#include "sys.h"
#include "tierd.h"
#include "zsmalloc.h"

enum { PIECE_BYTES = 2 << 20, STRETCH_BYTES = 64 << 20, RANGES = 256 };

_Noreturn static void die(const char *what)
{
	printf("error %s: %s\n", what, strerror(errno));
	exit(1);
}

/* --- faults ------------------------------------------------------------------------------------------------------------- */

struct source {
	int store; /* a file; or, when `packed` is there */
	struct packed {
		const uint8_t *from;
		uint32_t bytes;
	} *packed; /* of each page, compressed */
	struct decompressor *decompressor;
};

static bool get(const struct source *s, uint64_t offset, uint8_t *page, uint64_t page_bytes)
{
	const struct packed *packed = s->packed ? &s->packed[offset / page_bytes] : NULL;

	if (!packed)
		return pread(s->store, page, page_bytes, (off_t)offset) == (ssize_t)page_bytes;
	return !decompress(s->decompressor, packed->from, packed->bytes, page, (uint32_t)page_bytes);
}

/* In a process of its own, as tierd is: a fault costs a switch of address space. */
_Noreturn static void handle(int uffd, const struct source *from, uint64_t base, uint64_t page_bytes, int spin)
{
	uint8_t *page = aligned_alloc(page_bytes, page_bytes);
	struct pollfd fd = {.fd = uffd, .events = POLLIN};

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		struct uffd_msg message;
		struct uffdio_copy copy = {.len = page_bytes, .src = (uint64_t)page};

		if (read(uffd, &message, sizeof(message)) != sizeof(message)) {
			if (!spin)
				poll(&fd, 1, -1);
			continue;
		}
		copy.dst = message.arg.pagefault.address & ~(page_bytes - 1);
		if (!get(from, copy.dst - base, page, page_bytes) || ioctl(uffd, UFFDIO_COPY, &copy))
			_exit(1);
	}
}

static uint8_t *map(int flags, int fd, uint64_t bytes)
{
	uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (memory == MAP_FAILED)
		die("memory");
	return memory;
}

static uint8_t *map_anonymous(uint64_t bytes)
{
	return map(MAP_PRIVATE | MAP_ANONYMOUS, -1, bytes);
}

static uint8_t *map_shared(int *memfd, uint64_t bytes)
{
	*memfd = memfd_create("bare", MFD_CLOEXEC);
	if (*memfd < 0 || ftruncate(*memfd, (off_t)bytes))
		die("files");
	return map(MAP_SHARED, *memfd, bytes);
}

static void compressor_open(struct compressor **compressor, struct decompressor **decompressor, uint64_t page_bytes)
{
	struct codec *codec;

	errno = -codec_open(CODEC_LZ4, 0, &codec);
	if (!errno)
		errno = -compressor_create(codec, (uint32_t)page_bytes, compressor);
	if (!errno)
		errno = -decompressor_create(codec, decompressor);
	if (errno)
		die("LZ4");
}

/* Every page, one behind the other, into memory that the system gives meanwhile. Returns their bytes. */
static uint64_t pack(struct compressor *compressor, const uint8_t *memory, uint64_t pages, uint64_t page_bytes,
		     struct packed *packed)
{
	uint8_t *begin = map_anonymous(2 * pages * page_bytes), *to = begin;

	for (uint64_t i = 0; i < pages; i++) {
		const void *out;
		int bytes = compress(compressor, memory + i * page_bytes, page_bytes, &out);

		if (bytes < 0)
			die("compression");
		memcpy(to, out, (size_t)bytes);
		packed[i] = (struct packed){.from = to, .bytes = (uint32_t)bytes};
		to += bytes;
	}
	return (uint64_t)(to - begin);
}

/* Touches pages of `memory`, all of which are gone, while another process brings them back. */
static void fault_from(const struct source *from, int memfd, uint8_t *memory, uint64_t pages, char **a)
{
	uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), bytes = pages * page_bytes, p50, p99;
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM};
	struct uffdio_register range = {.range = {(uint64_t)memory, bytes}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	pid_t child;

	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
		die("userfaultfd");
	if (fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes))
		die("punch");
	child = fork();
	if (!child) {
		pin(atoi(a[4]));
		handle(uffd, from, (uint64_t)memory, page_bytes, !strcmp(a[0], "spin"));
	}
	pin(atoi(a[3]));
	touch_randomly(memory, pages, page_bytes, strtoull(a[2], NULL, 10), &p50, &p99);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	printf("ok %lu %lu\n", (unsigned long)p50, (unsigned long)p99);
}

static void fault(char **a)
{
	uint64_t pages = strtoull(a[1], NULL, 10), bytes = pages * (uint64_t)sysconf(_SC_PAGESIZE);
	struct source from = {.store = open(a[5], O_RDWR | O_CREAT | O_TRUNC, 0600)};
	int memfd;
	uint8_t *memory = map_shared(&memfd, bytes);

	fill(memory, bytes);
	if (from.store < 0 || pwrite(from.store, memory, bytes, 0) != (ssize_t)bytes)
		die("store");
	fault_from(&from, memfd, memory, pages, a);
}

static void fault_lz4(char **a)
{
	uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), pages = strtoull(a[1], NULL, 10);
	struct source from = {.store = -1, .packed = calloc(pages, sizeof(*from.packed))};
	struct compressor *compressor;
	int memfd;
	uint8_t *memory = map_shared(&memfd, pages * page_bytes);

	if (!from.packed)
		die("memory");
	compressor_open(&compressor, &from.decompressor, page_bytes);
	fill_half(memory, pages * page_bytes, page_bytes);
	pack(compressor, memory, pages, page_bytes, from.packed);
	fault_from(&from, memfd, memory, pages, a);
}

/* --- deactivation ------------------------------------------------------------------------------------------------------- */

static void deactivate(char **a)
{
	uint64_t start = strtoull(a[1], NULL, 10), end = start + strtoull(a[2], NULL, 10), began;
	char path[64];
	int pagemap, pidfd = (int)syscall(SYS_pidfd_open, atoi(a[0]), 0);

	snprintf(path, sizeof(path), "/proc/%s/pagemap", a[0]);
	pagemap = open(path, O_RDONLY);
	if (pagemap < 0 || pidfd < 0)
		die("process");
	began = now_ns();
	for (uint64_t at = start; at < end; at += STRETCH_BYTES) {
		uint64_t stop = at + STRETCH_BYTES < end ? at + STRETCH_BYTES : end, from = at;

		while (from < stop) {
			const struct sys_scan wanted = {.any_of = SYS_PAGE_PRESENT};
			struct sys_page_region found[RANGES];
			struct iovec ranges[RANGES];
			ssize_t n = sys_pagemap_scan(pagemap, from, stop, wanted, found, RANGES, &from);

			for (ssize_t i = 0; i < n; i++)
				ranges[i] = (struct iovec){(void *)found[i].start, found[i].end - found[i].start};
			if (n < 0 || (n && sys_pageout(pidfd, ranges, (size_t)n) < 0))
				die("deactivation");
		}
	}
	printf("ok %lu\n", (unsigned long)(now_ns() - began));
}

/* --- eviction ----------------------------------------------------------------------------------------------------------- */

static void evict(char **a)
{
	uint64_t bytes = strtoull(a[0], NULL, 10), began;
	int memfd, store = open(a[1], O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
	uint8_t *memory = map_shared(&memfd, bytes), *piece = aligned_alloc(4096, PIECE_BYTES);

	if (store < 0 || ftruncate(store, (off_t)bytes))
		die("files");
	fill(memory, bytes);
	began = now_ns();
	for (uint64_t at = 0; at < bytes; at += PIECE_BYTES)
		if (pread(memfd, piece, PIECE_BYTES, (off_t)at) != PIECE_BYTES ||
		    pwrite(store, piece, PIECE_BYTES, (off_t)at) != PIECE_BYTES ||
		    fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, PIECE_BYTES))
			die("eviction");
	printf("ok %lu\n", (unsigned long)(now_ns() - began));
}

static void anonymous(char **a)
{
	uint64_t bytes = strtoull(a[0], NULL, 10), began;
	int store = open(a[1], O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = {.api = UFFD_API, .features = 1 << 16 /* MOVE */};
	uint8_t *memory = map_anonymous(bytes), *staging = map_anonymous(bytes),
		*piece = aligned_alloc(4096, PIECE_BYTES);

	if (store < 0 || uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ftruncate(store, (off_t)bytes))
		die("files");
	fill(memory, bytes);
	if (sys_uffd_register(uffd, (uint64_t)memory, bytes, UFFDIO_REGISTER_MODE_MISSING) ||
	    sys_uffd_register(uffd, (uint64_t)staging, bytes, UFFDIO_REGISTER_MODE_MISSING))
		die("registration");
	began = now_ns();
	for (uint64_t at = 0; at < bytes; at += PIECE_BYTES) {
		if (sys_uffd_move(uffd, (uint64_t)staging + at, (uint64_t)memory + at, PIECE_BYTES) != PIECE_BYTES)
			die("move");
		memcpy(piece, staging + at, PIECE_BYTES);
		if (pwrite(store, piece, PIECE_BYTES, (off_t)at) != PIECE_BYTES ||
		    madvise(staging + at, PIECE_BYTES, MADV_DONTNEED))
			die("eviction");
	}
	printf("ok %lu\n", (unsigned long)(now_ns() - began));
}

/* --- compressed memory -------------------------------------------------------------------------------------------------- */

static void compress_all(char **a)
{
	uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), bytes = strtoull(a[0], NULL, 10), began, took,
		 packed_bytes, pages = bytes / page_bytes;
	struct packed *packed = calloc(pages, sizeof(*packed));
	struct compressor *compressor;
	struct decompressor *decompressor;
	struct zsmalloc z = {0};
	int memfd;
	uint8_t *memory = map_shared(&memfd, bytes);

	if (!packed)
		die("memory");
	compressor_open(&compressor, &decompressor, page_bytes);
	fill_half(memory, bytes, page_bytes);
	memset(packed, 0xff, pages * sizeof(*packed)); /* it is the results' memory that is fresh */
	began = clock_ns(CLOCK_THREAD_CPUTIME_ID);
	packed_bytes = pack(compressor, memory, pages, page_bytes, packed);
	took = clock_ns(CLOCK_THREAD_CPUTIME_ID) - began;
	for (uint64_t i = 0; i < pages; i++)
		zs_add(&z, packed[i].bytes);
	printf("ok %lu %lu %lu\n", (unsigned long)took, (unsigned long)packed_bytes, (unsigned long)zs_bytes(&z));
}

/* As much of it as tierd has to do at least: read out, compressed, kept, dropped. */
static void compress_out(char **a)
{
	uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), bytes = strtoull(a[0], NULL, 10), began, at,
		 piece_pages = PIECE_BYTES / page_bytes;
	struct packed *packed = calloc(piece_pages, sizeof(*packed));
	struct compressor *compressor;
	struct decompressor *decompressor;
	int memfd;
	uint8_t *memory = map_shared(&memfd, bytes), *piece = aligned_alloc(4096, PIECE_BYTES);

	if (!packed || !piece)
		die("memory");
	compressor_open(&compressor, &decompressor, page_bytes);
	fill_half(memory, bytes, page_bytes);
	memset(piece, 0xff, PIECE_BYTES);
	began = clock_ns(CLOCK_THREAD_CPUTIME_ID);
	for (at = 0; at < bytes; at += PIECE_BYTES) {
		if (pread(memfd, piece, PIECE_BYTES, (off_t)at) != PIECE_BYTES)
			die("read");
		pack(compressor, piece, piece_pages, page_bytes, packed);
		if (fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, PIECE_BYTES))
			die("punch");
	}
	printf("ok %lu\n", (unsigned long)(clock_ns(CLOCK_THREAD_CPUTIME_ID) - began));
}

/* --- files of compressed and encrypted pages ------------------------------------------------------------------------------ */

struct objects {
	const char *directory;
	int memfd;
	uint64_t bytes, page_bytes;
	_Atomic uint64_t next;
};

/* A piece becomes a file, which is on the disk when it has its name. */
static void put_object(const struct objects *o, uint64_t number, const uint8_t *sealed, uint32_t bytes)
{
	char made[256], path[256];
	int fd;

	snprintf(made, sizeof(made), "%s/%lu.new", o->directory, (unsigned long)number);
	snprintf(path, sizeof(path), "%s/%lu", o->directory, (unsigned long)number);
	fd = open(made, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || write(fd, sealed, bytes) != (ssize_t)bytes || fsync(fd) || close(fd) || rename(made, path))
		die("object");
}

static void *put_objects(void *of)
{
	enum { PAGES_MAX = PIECE_BYTES / 4096, ROOM = 2 * PIECE_BYTES };
	static const uint8_t key[32] = {1};
	struct objects *o = of;
	uint8_t *piece = aligned_alloc(4096, PIECE_BYTES), *packed = malloc(ROOM), *sealed = malloc(ROOM);
	uint32_t pages = PIECE_BYTES / (uint32_t)o->page_bytes, bounds[PAGES_MAX + 1], to[PAGES_MAX + 1];
	uint64_t nonces[PAGES_MAX], at;
	struct tierd_packer *packer;

	if (!piece || !packed || !sealed || tierd_packer_create((uint32_t)o->page_bytes, 1, &packer))
		die("Zstandard");
	while ((at = atomic_fetch_add(&o->next, PIECE_BYTES)) < o->bytes) {
		for (uint32_t i = 0; i <= pages; i++)
			bounds[i] = i * (uint32_t)o->page_bytes;
		for (uint32_t i = 0; i < pages; i++)
			nonces[i] = at / o->page_bytes + i + 1;
		if (pread(o->memfd, piece, PIECE_BYTES, (off_t)at) != PIECE_BYTES ||
		    tierd_pack(packer, piece, bounds, pages, packed, to) ||
		    tierd_seal(key, nonces, at / o->page_bytes, packed, to, pages, sealed, bounds))
			die("libraries");
		put_object(o, at / PIECE_BYTES, sealed, bounds[pages]);
		if (fallocate(o->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, PIECE_BYTES))
			die("punch");
	}
	return NULL;
}

/* What `objects` has to do at least. */
static void objects(char **a)
{
	struct objects o = {
		.directory = a[1], .bytes = strtoull(a[0], NULL, 10), .page_bytes = (uint64_t)sysconf(_SC_PAGESIZE)};
	uint8_t *memory = map_shared(&o.memfd, o.bytes);
	pthread_t threads[4];
	uint64_t began;

	fill(memory, o.bytes);
	began = now_ns();
	for (int i = 0; i < 4; i++)
		if (pthread_create(&threads[i], NULL, put_objects, &o))
			die("thread");
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	printf("ok %lu\n", (unsigned long)(now_ns() - began));
}

static void swap_out(uint8_t *memory, uint64_t bytes)
{
	for (uint64_t at = 0; at < bytes; at += PIECE_BYTES)
		if (madvise(memory + at, PIECE_BYTES, MADV_PAGEOUT))
			die("swap");
}

static uint64_t walk(const uint8_t *memory, uint64_t bytes, uint64_t page_bytes)
{
	uint64_t began = now_ns();

	for (uint64_t at = 0; at < bytes; at += page_bytes)
		(void)*(const volatile uint64_t *)(memory + at);
	return now_ns() - began;
}

/* Private anonymous memory: its way back from zram is the shortest that there is. */
static void swap(char **a)
{
	uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), bytes = strtoull(a[0], NULL, 10), stored, taken,
		 in_order, p50, p99;
	uint8_t *memory = map_anonymous(bytes);
	FILE *statistics = fopen(a[1], "r");

	pin(atoi(a[2]));
	fill_half(memory, bytes, page_bytes);
	swap_out(memory, bytes);
	if (!statistics || fscanf(statistics, "%lu %*u %lu", &stored, &taken) != 2)
		die("statistics");
	errno = EBUSY;
	if (stored < bytes) /* a page that is still mapped would be the quickest to come back */
		die("swap");
	in_order = walk(memory, bytes, page_bytes);
	swap_out(memory, bytes);
	touch_randomly(memory, bytes / page_bytes, page_bytes, bytes / page_bytes / 4, &p50, &p99);
	printf("ok %lu %lu %lu %lu\n", (unsigned long)stored, (unsigned long)taken, (unsigned long)in_order,
	       (unsigned long)p50);
}

/* --- Redis -------------------------------------------------------------------------------------------------------------- */

static void redis_send(int s, const char *bytes, size_t count)
{
	if (send(s, bytes, count, 0) != (ssize_t)count)
		die("send");
}

/* Exactly so many bytes, which is how long the answer is. */
static void redis_receive(int s, char *bytes, size_t count)
{
	if (recv(s, bytes, count, MSG_WAITALL) != (ssize_t)count)
		die("receive");
}

/* A key, an answer: nothing else is on the way. Before, the keys are set. */
static void get_keys(char **a)
{
	struct sockaddr_in to = {.sin_family = AF_INET,
				 .sin_port = htons((uint16_t)atoi(a[0])),
				 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), keys = strtoull(a[1], NULL, 10),
		 count = strtoull(a[2], NULL, 10), *took = malloc(count * sizeof(*took));
	int s = socket(AF_INET, SOCK_STREAM, 0), on = 1, n;
	size_t length = (size_t)snprintf(NULL, 0, "$%lu\r\n", (unsigned long)page_bytes) + page_bytes + 2;
	char line[128], *answer = malloc(length), *value = malloc(page_bytes + 2);

	if (s < 0 || !took || !answer || !value || setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) ||
	    connect(s, (struct sockaddr *)&to, sizeof(to)))
		die("connection");
	for (uint64_t i = 0; i < count; i++) { /* those only that will be asked for */
		n = snprintf(line, sizeof(line), "*3\r\n$3\r\nSET\r\n$12\r\nkey:%08lu\r\n$%lu\r\n",
			     (unsigned long)(mix(i) % keys), (unsigned long)page_bytes);
		fill((uint8_t *)value, page_bytes);
		memcpy(value + page_bytes, "\r\n", 2);
		redis_send(s, line, (size_t)n);
		redis_send(s, value, page_bytes + 2);
	}
	for (uint64_t i = 0; i < count; i++)
		redis_receive(s, answer, 5); /* +OK */
	for (uint64_t i = 0; i < count; i++) {
		uint64_t began = now_ns();

		n = snprintf(line, sizeof(line), "*2\r\n$3\r\nGET\r\n$12\r\nkey:%08lu\r\n",
			     (unsigned long)(mix(i) % keys));
		redis_send(s, line, (size_t)n);
		redis_receive(s, answer, length);
		took[i] = now_ns() - began;
	}
	qsort(took, count, sizeof(*took), compare);
	printf("ok %lu\n", (unsigned long)took[count / 2]);
}

int main(int argc, char **argv)
{
	if (argc == 8 && !strcmp(argv[1], "fault"))
		fault(argv + 2);
	else if (argc == 7 && !strcmp(argv[1], "fault-lz4"))
		fault_lz4(argv + 2);
	else if (argc == 5 && !strcmp(argv[1], "deactivate"))
		deactivate(argv + 2);
	else if (argc == 4 && !strcmp(argv[1], "evict"))
		evict(argv + 2);
	else if (argc == 4 && !strcmp(argv[1], "anonymous"))
		anonymous(argv + 2);
	else if (argc == 3 && !strcmp(argv[1], "compress-out"))
		compress_out(argv + 2);
	else if (argc == 3 && !strcmp(argv[1], "compress"))
		compress_all(argv + 2);
	else if (argc == 4 && !strcmp(argv[1], "objects"))
		objects(argv + 2);
	else if (argc == 5 && !strcmp(argv[1], "get"))
		get_keys(argv + 2);
	else if (argc == 5 && !strcmp(argv[1], "swap"))
		swap(argv + 2);
	else
		return 2;
	return 0;
}
