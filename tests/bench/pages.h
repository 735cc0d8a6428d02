/* SPDX-License-Identifier: Apache-2.0 */
/* pages.h: what the benchmarks fill memory with. Any word can be known from where it lies. */
#ifndef PAGES_H
#define PAGES_H

#include <stdint.h>
#include <string.h>

static inline uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15u;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

/* Incompressible, and different in every page. */
static inline void fill(uint8_t *memory, uint64_t bytes)
{
	for (uint64_t i = 0; i < bytes / 8; i++)
		((uint64_t *)memory)[i] = mix(i);
}

enum { PIECE = 32, NEW_MIN_OF_16 = 5, NEW_MAX_OF_16 = 8 };

/* Page number `page`, in pieces of 32 bytes, new ones or copies of earlier ones of the page: LZ4 makes about half of it, of some pages
 * more and of some less, and has work to do. The first word is as `fill` makes it. */
static inline void fill_page(uint8_t *memory, uint64_t page, uint64_t page_bytes)
{
	uint64_t new_of_16 = NEW_MIN_OF_16 + mix(~page) % (NEW_MAX_OF_16 - NEW_MIN_OF_16 + 1);

	for (uint64_t at = 0; at < page_bytes; at += PIECE) {
		uint64_t chance = mix(~(page * page_bytes + at));

		if (at && chance % 16 >= new_of_16)
			memcpy(memory + at, memory + (chance >> 8) % (at / PIECE) * PIECE, PIECE);
		else
			for (uint64_t i = 0; i < PIECE; i += 8)
				*(uint64_t *)(memory + at + i) = mix((page * page_bytes + at + i) / 8);
	}
}

static inline void fill_half(uint8_t *memory, uint64_t bytes, uint64_t page_bytes)
{
	for (uint64_t page = 0; page < bytes / page_bytes; page++)
		fill_page(memory + page * page_bytes, page, page_bytes);
}

#endif
