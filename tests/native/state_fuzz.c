/* SPDX-License-Identifier: Apache-2.0 */
/*
 * state_fuzz.c: state files that are not what tierd wrote, given to what reads them.
 *
 *   state_fuzz [--seeds N] [--from S]
 *
 * Each seed makes a valid file, damages it (bits, its end, pieces of itself elsewhere, fields of the header with a checksum
 * that is right again), reads it, and maps it as adoption does. It is refused, or everything in it can be used: texts end,
 * regions are whole pages whose sum is the table's, every word and every checksum lies within the file.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

static uint64_t random_state, accepted, refused;

static uint64_t roll(uint64_t below)
{
	uint64_t x = random_state += 0x9e3779b97f4a7c15u;

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return (x ^ (x >> 31)) % below;
}

uint64_t sys_now_ns(void)
{
	return 1000000000u;
}

size_t sys_page_bytes(void)
{
	return 4096;
}

static void fail(uint64_t seed, const char *what)
{
	fprintf(stderr, "seed %lu: %s\n", seed, what);
	exit(1);
}

/* A number of the kind that breaks things. */
static uint64_t odd_number(void)
{
	static const uint64_t odd[] = {0,         1,          31,         32,         33,         255,
				       4095,      4096,       1u << 31,   UINT32_MAX, 1ull << 32, 1ull << 57,
				       INT64_MAX, 1ull << 63, UINT64_MAX, ~4095ull};

	return roll(3) ? odd[roll(sizeof(odd) / sizeof(odd[0]))] : roll(UINT64_MAX);
}

static int make_file(void)
{
	struct tierd_identity identity = {.pid = 1 + (int32_t)roll(1000), .start_ticks = roll(1000), .epoch_ns = 8};
	uint64_t page_bytes = roll(2) ? 4096 : 2 << 20;
	struct tierd_region regions[TIERD_REGIONS_MAX] = {0};
	uint32_t count = 1 + (uint32_t)roll(TIERD_REGIONS_MAX);
	int fd = memfd_create("state", 0);

	strcpy(identity.boot_id, "boot");
	strcpy(identity.name, "guest");
	identity.places[0].kind = TIERD_KIND_FILE;
	strcpy(identity.places[0].path, "/store/guest");
	for (uint32_t i = 0; i < count; i++)
		regions[i] = (struct tierd_region){.address = (i + 1ull) << 32, .bytes = page_bytes * (1 + roll(8))};
	identity.page_bytes = roll(2) || page_bytes > 4096 ? page_bytes : 0;
	if (fd < 0 || tierd_table_create(fd, &identity, regions, count))
		fail(0, "cannot make a file");
	return fd;
}

static void damage_header(struct table_header *h)
{
	uint64_t number = odd_number(), region = roll(TIERD_REGIONS_MAX);

	switch (roll(12)) {
	case 0:
		h->version = (uint32_t)number;
		break;
	case 1:
		h->region_count = (uint32_t)number;
		break;
	case 2:
		h->pages = number;
		break;
	case 3:
		h->identity.pid = (int32_t)number;
		break;
	case 4:
		h->identity.uffd_in_vmm = (int32_t)number;
		break;
	case 5:
		memset(h->identity.name, 0xff, sizeof(h->identity.name));
		break;
	case 6:
		memset(h->identity.boot_id, 'x', sizeof(h->identity.boot_id));
		break;
	case 7:
		memset(h->identity.places[0].path, 0xff, sizeof(h->identity.places[0].path));
		break;
	case 8:
		h->regions[region].bytes = number;
		break;
	case 9:
		h->regions[region].address = number;
		break;
	case 10:
		h->regions[region].offset = number;
		break;
	default:
		h->identity.epoch_ns = h->identity.page_bytes = number;
	}
}

static void reseal(struct table_header *h)
{
	const uint8_t *bytes = (const uint8_t *)h;
	uint32_t sum = 2166136261u;

	for (size_t i = sizeof(h->magic); i < offsetof(struct table_header, checksum); i++)
		sum = (sum ^ bytes[i]) * 16777619u;
	h->checksum = sum;
}

static void damage(int fd)
{
	off_t bytes = lseek(fd, 0, SEEK_END);
	struct table_header h;
	uint8_t piece[512];

	switch (roll(5)) {
	case 0: /* bits of the header, of which most is empty */
		for (uint64_t i = 1 + roll(4); i; i--) {
			off_t at = (off_t)roll(sizeof(h));

			if (pread(fd, piece, 1, at) == 1) {
				piece[0] ^= (uint8_t)(1u << roll(8));
				(void)!pwrite(fd, piece, 1, at);
			}
		}
		break;
	case 1:
		(void)!ftruncate(fd, (off_t)roll((uint64_t)bytes + 1));
		break;
	case 2:
		(void)!ftruncate(fd, bytes + 1 + (off_t)roll(1 << 20));
		break;
	case 3:
		if (pread(fd, piece, sizeof(piece), (off_t)roll(sizeof(h))) > 0)
			(void)!pwrite(fd, piece, 1 + roll(sizeof(piece)), (off_t)roll(sizeof(h)));
		break;
	default:
		if (pread(fd, &h, sizeof(h), 0) != sizeof(h))
			return;
		for (uint64_t i = 1 + roll(3); i; i--)
			damage_header(&h);
		reseal(&h);
		(void)!pwrite(fd, &h, sizeof(h), 0);
	}
}

static void use(uint64_t seed, int fd, uint64_t page_bytes, const struct tierd_region *regions, uint32_t count)
{
	struct tierd_guest *g = calloc(1, sizeof(*g));
	uint64_t sum = 0;

	g->table_fd = fd;
	g->page_bytes = (uint32_t)page_bytes;
	g->region_count = count;
	for (uint32_t i = 0; i < count; i++) {
		struct region *r = &g->regions[i];

		*r = (struct region){.address = regions[i].address,
				     .bytes = regions[i].bytes,
				     .offset = regions[i].offset,
				     .first_page = g->pages,
				     .memfd = -1};
		r->pages = r->bytes / page_bytes;
		g->pages += r->pages;
	}
	if (table_map(g))
		fail(seed, "read, but cannot be mapped");
	for (uint64_t page = 0; page < g->pages; page++)
		sum += g->words[page] + g->sums[page] + page_age(g, page, epoch_now(g), g->words[page]);
	if (sum == 1)
		printf(" \b"); /* so that it is computed */
	table_unmap(g);
	free(g);
}

static void run(uint64_t seed)
{
	struct tierd_serving serving;
	struct tierd_identity identity;
	struct tierd_region regions[TIERD_REGIONS_MAX];
	uint32_t count = 0;
	int fd, error;

	random_state = seed;
	fd = make_file();
	for (uint64_t i = roll(4); i; i--)
		damage(fd);
	error = tierd_table_read(fd, &identity, regions, &count, &serving);
	if (error) {
		refused++;
		if (error != -EBADMSG && error != -EPROTONOSUPPORT)
			fail(seed, "another error");
	} else {
		accepted++;
		if (!count || count > TIERD_REGIONS_MAX)
			fail(seed, "number of regions");
		if (identity.pid <= 0 || identity.uffd_in_vmm < 0 || !identity.epoch_ns)
			fail(seed, "identity");
		if (!memchr(identity.name, 0, sizeof(identity.name)) ||
		    !memchr(identity.boot_id, 0, sizeof(identity.boot_id)) ||
		    !memchr(identity.places[0].path, 0, sizeof(identity.places[0].path)))
			fail(seed, "a text does not end");
		use(seed, fd, identity.page_bytes, regions, count);
	}
	close(fd);
}

int main(int argc, char **argv)
{
	uint64_t seeds = 1000, from = 1;

	for (int i = 1; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--seeds"))
			seeds = strtoull(argv[i + 1], NULL, 10);
		else if (!strcmp(argv[i], "--from"))
			from = strtoull(argv[i + 1], NULL, 10);
	}
	for (uint64_t seed = from; seed < from + seeds; seed++)
		run(seed);
	printf("%lu files: %lu accepted, %lu refused\n", seeds, accepted, refused);
	return 0;
}
