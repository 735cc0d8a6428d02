/* SPDX-License-Identifier: Apache-2.0 */
/*
 * zsmalloc.h: what the allocator behind zram and zswap would take for objects of given sizes, by its own rules (mm/zsmalloc.c:
 * calculate_zspage_chain_size, can_merge; chains of up to 8 pages, the default). Pages of 4 KiB, nothing freed, no metadata but the
 * handle that lies in the object.
 */
#ifndef ZSMALLOC_H
#define ZSMALLOC_H

#include <stdint.h>

enum { ZS_PAGE = 4096, ZS_STEP = 16, ZS_MIN = 32, ZS_CHAIN_MAX = 8, ZS_HANDLE = 8, ZS_SIZES = ZS_PAGE / ZS_STEP + 1 };

struct zsmalloc {
	uint64_t objects[ZS_SIZES]; /* by size in steps */
};

static inline void zs_add(struct zsmalloc *z, uint32_t bytes)
{
	uint32_t size = bytes + ZS_HANDLE < ZS_MIN ? ZS_MIN : bytes + ZS_HANDLE;

	z->objects[(size + ZS_STEP - 1) / ZS_STEP]++;
}

static inline uint32_t zs_chain(uint32_t size)
{
	uint32_t best = 1;

	if (!(size & (size - 1)))
		return 1;
	for (uint32_t pages = 2; pages <= ZS_CHAIN_MAX; pages++)
		if (pages * ZS_PAGE % size < best * ZS_PAGE % size)
			best = pages;
	return best;
}

static inline uint64_t zs_bytes(const struct zsmalloc *z)
{
	uint64_t bytes = 0, objects = 0;
	uint32_t pages = 0, each = 0;

	for (uint32_t steps = ZS_SIZES - 1; steps >= ZS_MIN / ZS_STEP; steps--) {
		uint32_t chain = zs_chain(steps * ZS_STEP), fit = chain * ZS_PAGE / (steps * ZS_STEP);

		if (chain != pages || fit != each) {
			bytes += each ? (objects + each - 1) / each * pages * ZS_PAGE : 0;
			objects = 0;
			pages = chain;
			each = fit;
		}
		objects += z->objects[steps];
	}
	return bytes + (objects + each - 1) / each * pages * ZS_PAGE;
}

#endif
