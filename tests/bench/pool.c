/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.c: what the compressed pool costs beside the bare codec, on the same pages, in turns of a few hundred pages.
 *
 *   pool CODEC PAGES ROUNDS    CODEC: lz4, zstd -> one line a figure: name, ours, bare; times in ns a page
 *
 * write: compression and a place for the result; bare puts one behind the other into a file on tmpfs, whose space costs what it costs.
 * write-only: bare throws the result away. rewrite: again, in place of what is there. read: in the order of writing, and at random; bare
 * has the compressed pages one behind the other. pool: bytes of the file per byte that was saved; bare is what zsmalloc would take.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pages.h"
#include "pool.h"
#include "sys.h"
#include "zsmalloc.h"

enum { PAGE = 4096, TURN = 256, KEPT_PIECE = 8 * PAGE };

struct packed {
	uint64_t offset;
	uint32_t bytes;
};

static uint64_t pages, random_state = 1;
static uint8_t *memory, *packed_memory;
static struct packed *packed;
static uint32_t *order;
static uint8_t *kept;
static uint64_t kept_bytes, kept_reserved;
static int kept_fd;
static struct codec *codec;
static struct compressor *compressor;
static struct decompressor *decompressor;
static struct pool *pool;
static struct pool_reader *reader;

_Noreturn static void die(const char *what, int error)
{
	printf("error %s: %s\n", what, strerror(-error));
	exit(1);
}

static void check(const char *what, int error)
{
	if (error)
		die(what, error);
}

static uint64_t roll(uint64_t below)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state % below;
}

static void pages_make(void)
{
	uint64_t offset = 0;
	const void *out;

	for (uint64_t i = 0; i < pages; i++) {
		int bytes;

		fill_page(memory + i * PAGE, i, PAGE);
		bytes = compress(compressor, memory + i * PAGE, PAGE, &out);
		if (bytes < 0)
			die("compress", bytes);
		memcpy(packed_memory + offset, out, (size_t)bytes);
		packed[i] = (struct packed){.offset = offset, .bytes = (uint32_t)bytes};
		offset += (uint64_t)bytes;
		order[i] = (uint32_t)i;
	}
	for (uint64_t i = pages - 1; i; i--) {
		uint64_t other = roll(i + 1);
		uint32_t page = order[i];

		order[i] = order[other];
		order[other] = page;
	}
}

static void bare_write(uint64_t page)
{
	const void *out;
	int bytes = compress(compressor, memory + page * PAGE, PAGE, &out);

	if (bytes < 0)
		die("compress", bytes);
}

/* As bare_write, and the result stays, at the end of a file on tmpfs. */
static void bare_keep(uint64_t page)
{
	const void *out;
	int bytes = compress(compressor, memory + page * PAGE, PAGE, &out);

	if (bytes < 0)
		die("compress", bytes);
	if (kept_bytes + (uint64_t)bytes > kept_reserved) {
		check("reserve", sys_pool_reserve(kept_fd, kept + kept_reserved, kept_reserved, KEPT_PIECE));
		kept_reserved += KEPT_PIECE;
	}
	memcpy(kept + kept_bytes, out, (size_t)bytes);
	kept_bytes += (uint64_t)bytes;
}

static void pool_write_one(uint64_t page)
{
	check("pool_write", pool_write(pool, page, memory + page * PAGE));
}

static void bare_read(uint64_t page)
{
	static uint8_t to[PAGE] __attribute__((aligned(PAGE)));

	check("decompress",
	      decompress(decompressor, packed_memory + packed[page].offset, packed[page].bytes, to, PAGE));
}

static void pool_read_one(uint64_t page)
{
	static uint8_t to[PAGE] __attribute__((aligned(PAGE)));

	check("pool_read", pool_read(reader, page, to));
}

static uint64_t timed(void (*one)(uint64_t page), uint64_t first, bool random)
{
	uint64_t begin = sys_now_ns();

	for (uint64_t i = first; i < first + TURN && i < pages; i++)
		one(random ? order[i] : i);
	return sys_now_ns() - begin;
}

static int by_size(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(double *of, uint64_t count)
{
	qsort(of, count, sizeof(*of), by_size);
	return of[count / 2];
}

/* In turns; bare is half of the pages ahead, so that neither finds in the cache what the other has just read. */
static void compare(const char *name, void (*ours)(uint64_t page), void (*bare)(uint64_t page), bool random)
{
	uint64_t turns = pages / TURN;
	double *a = calloc(turns, sizeof(*a)), *b = calloc(turns, sizeof(*b));

	for (uint64_t i = 0; i < turns; i++) {
		a[i] = (double)timed(ours, i * TURN, random) / TURN;
		b[i] = (double)timed(bare, (i + turns / 2) % turns * TURN, random) / TURN;
	}
	printf("%s %.1f %.1f\n", name, median(a, turns), median(b, turns));
	free(a);
	free(b);
}

static void pool_bytes(void)
{
	struct zsmalloc z = {0};
	struct pool_counters c;
	double raw = (double)pages * PAGE, bare;

	for (uint64_t i = 0; i < pages; i++)
		zs_add(&z, packed[i].bytes);
	pool_counters(pool, &c);
	bare = (double)zs_bytes(&z);
	printf("pool %.4f %.4f\n", (double)c.used_bytes / (raw - (double)c.used_bytes), bare / (raw - bare));
	printf("metadata %.2f 16\n", (double)c.metadata_bytes / (double)c.pages);
}

static void kept_begin(void)
{
	void *at;
	bool locked;

	kept_fd = memfd_create("kept", MFD_CLOEXEC);
	check("resize", sys_pool_resize(kept_fd, 2 * pages * PAGE));
	check("map", sys_pool_map(kept_fd, 2 * pages * PAGE, &at, &locked));
	kept = at;
	kept_bytes = kept_reserved = 0;
}

static void kept_end(void)
{
	sys_pool_unmap(kept, 2 * pages * PAGE);
	close(kept_fd);
}

static void round_of(enum codec_kind kind)
{
	int fd = memfd_create("pool", MFD_CLOEXEC);

	check("pool_create", pool_create(fd, PAGE, pages, kind, 1, &pool));
	check("pool_reader_create", pool_reader_create(pool, &reader));
	kept_begin();
	compare("write", pool_write_one, bare_keep, false);
	kept_end();
	pool_bytes();
	compare("read", pool_read_one, bare_read, false);
	compare("random-read", pool_read_one, bare_read, true);
	compare("rewrite", pool_write_one, bare_write, true);
	for (uint64_t page = 0; page < pages; page++)
		pool_free(pool, page);
	compare("write-only", pool_write_one, bare_write, false);
	pool_reader_destroy(reader);
	pool_close(pool);
	close(fd);
}

int main(int count, char **arguments)
{
	enum codec_kind kind;

	if (count != 4)
		return 2;
	kind = strcmp(arguments[1], "zstd") ? CODEC_LZ4 : CODEC_ZSTD;
	pages = strtoull(arguments[2], NULL, 10) / TURN * TURN;
	memory = aligned_alloc(PAGE, pages * PAGE);
	packed_memory = aligned_alloc(PAGE, pages * PAGE * 2);
	packed = calloc(pages, sizeof(*packed));
	order = calloc(pages, sizeof(*order));
	if (!pages || !memory || !packed_memory || !packed || !order)
		die("memory", -ENOMEM);
	check("codec_open", codec_open(kind, 1, &codec));
	check("compressor_create", compressor_create(codec, PAGE, &compressor));
	check("decompressor_create", decompressor_create(codec, &decompressor));
	pages_make();
	for (uint64_t rounds = strtoull(arguments[3], NULL, 10); rounds; rounds--)
		round_of(kind);
	return 0;
}
