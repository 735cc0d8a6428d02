/* SPDX-License-Identifier: Apache-2.0 */
/* load.h: the load that the bare handler and tierd are both measured under: one thread, every touch timed. */
#ifndef LOAD_H
#define LOAD_H

#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pages.h"

static inline uint64_t clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static inline void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (cpu >= 0 && sched_setaffinity(0, sizeof(set), &set))
		perror("pin");
}

static inline int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Reads one word of each of `count` pages in an order of chance, checks it, and says p50 and p99 in ns. */
static inline void touch_randomly(uint8_t *memory, uint64_t pages, uint64_t page_bytes, uint64_t count, uint64_t *p50,
				  uint64_t *p99)
{
	uint64_t *order = malloc(pages * sizeof(*order)), *took = malloc(count * sizeof(*took));

	for (uint64_t i = 0; i < pages; i++)
		order[i] = i;
	for (uint64_t i = pages - 1; i; i--) {
		uint64_t k = mix(i) % (i + 1), swap = order[i];

		order[i] = order[k];
		order[k] = swap;
	}
	for (uint64_t i = 0; i < count; i++) {
		volatile uint64_t *word = (uint64_t *)(memory + order[i] * page_bytes);
		uint64_t began = now_ns(), got = *word;

		took[i] = now_ns() - began;
		if (got != mix(order[i] * page_bytes / 8)) {
			printf("error page %lu is wrong\n", (unsigned long)order[i]);
			exit(1);
		}
	}
	qsort(took, count, sizeof(*took), compare);
	*p50 = took[count / 2];
	*p99 = took[count * 99 / 100];
	free(order);
	free(took);
}

#endif
