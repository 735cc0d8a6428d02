/* SPDX-License-Identifier: Apache-2.0 */
/*
 * load.c: a child that plays the VMM for the benchmarks.
 *
 *   load BYTES CPU [anonymous ...]  one memfd of that size, or anonymous memory; the thread that touches is pinned to CPU (-1: nowhere)
 *
 * Commands on stdin, one answer a line: fill | fill-half | random COUNT -> p50 p99 | walk COUNT -> ns | touch -> ns | fresh COUNT -> ns |
 * stride PAGES -> ns | change PAGES (each so many one is written to) -> ns | work SECONDS -> ns stalled, touches
 */
#include "load.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

/* --- a guest at work, in a thread that is not the one which tierd stops: as a vCPU is not ---------------------------------- */

/* Of `pages` the first 64th is hot, the next eighth is read once in WARM_NS, the rest is cold. */
enum { HOT_PART = 64, WARM_PART = 8, BURST = 64, FAULT_NS_MIN = 1000 };
static const uint64_t WARM_NS = 7500000000;

struct work {
	uint8_t *memory;
	uint64_t pages, page_bytes, seconds;
	uint64_t stalled_ns, touches;
	long preempted; /* so often so far */
};

/* Adds the time of the access where it was a fault. Where somebody else had the CPU meanwhile nothing is known of it. */
static void touch(struct work *w, uint64_t page, bool write)
{
	volatile uint64_t *word = (uint64_t *)(w->memory + page * w->page_bytes);
	uint64_t began = now_ns(), took;
	struct rusage usage;

	if (write)
		*word = page;
	else
		(void)*word;
	took = now_ns() - began;
	w->touches++;
	if (took < FAULT_NS_MIN)
		return;
	getrusage(RUSAGE_THREAD, &usage);
	if (usage.ru_nivcsw == w->preempted)
		w->stalled_ns += took;
	w->preempted = usage.ru_nivcsw;
}

/* One half is only read. */
static void touch_hot(struct work *w, uint64_t page, uint64_t hot)
{
	touch(w, page, page < hot / 2 && !(w->touches % 4));
}

static void *work(void *argument)
{
	struct work *w = argument;
	uint64_t hot = w->pages / HOT_PART, warm = w->pages / WARM_PART, warm_done = 0, began = now_ns(), passed;

	while ((passed = now_ns() - began) < w->seconds * 1000000000) {
		for (uint64_t i = 0; i < BURST; i++)
			touch_hot(w, mix(w->touches) % hot, hot);
		for (; warm_done < passed * warm / WARM_NS; warm_done++)
			touch(w, hot + warm_done % warm, false);
		usleep(1000);
	}
	return NULL;
}

static void work_beside(uint8_t *memory, uint64_t pages, uint64_t page_bytes, uint64_t seconds, uint64_t *stalled_ns,
			uint64_t *touches)
{
	struct work w = {.memory = memory, .pages = pages, .page_bytes = page_bytes, .seconds = seconds};
	pthread_t thread;

	if (pthread_create(&thread, NULL, work, &w) || pthread_join(thread, NULL)) {
		printf("error no thread\n");
		exit(1);
	}
	*stalled_ns = w.stalled_ns;
	*touches = w.touches;
}

int main(int argc, char **argv)
{
	uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), bytes = argc > 2 ? strtoull(argv[1], NULL, 10) : 0;
	int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
	char line[128], name[16];
	uint8_t *memory;

	if (!bytes || fd < 0 || ftruncate(fd, (off_t)bytes))
		return 1;
	memory = argc > 3 ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
			  : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		return 1;
	pin(atoi(argv[2]));
	printf("ok %lu\n", (unsigned long)memory);
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		unsigned long count = 0;
		uint64_t began = now_ns(), p50 = 0, p99 = 0;

		sscanf(line, "%15s %lu", name, &count);
		if (!strcmp(name, "fill"))
			fill(memory, bytes);
		else if (!strcmp(name, "fill-half"))
			fill_half(memory, bytes, page_bytes);
		else if (!strcmp(name, "work"))
			work_beside(memory, bytes / page_bytes, page_bytes, count, &p50, &p99);
		else if (!strcmp(name, "random"))
			touch_randomly(memory, bytes / page_bytes, page_bytes, count, &p50, &p99);
		else if (!strcmp(name, "walk") || !strcmp(name, "touch"))
			for (uint64_t i = 0; i < (count ? count : bytes / page_bytes); i++)
				(void)*(volatile uint64_t *)(memory + i * page_bytes);
		else if (!strcmp(name, "stride"))
			for (uint64_t i = 0; i < bytes / page_bytes; i += count)
				(void)*(volatile uint64_t *)(memory + i * page_bytes);
		else if (!strcmp(name, "change"))
			for (uint64_t i = 0; i < bytes / page_bytes; i += count)
				((volatile uint64_t *)(memory + i * page_bytes))[1] = began + i;
		else if (!strcmp(name, "fresh"))
			for (uint64_t i = 0; i < count; i++)
				*(volatile uint64_t *)(memory + i * page_bytes) = 1;
		if (strcmp(name, "random") && strcmp(name, "work"))
			p50 = now_ns() - began;
		printf("ok %lu %lu\n", (unsigned long)p50, (unsigned long)p99);
		fflush(stdout);
	}
	return 0;
}
