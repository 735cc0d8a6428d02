/* SPDX-License-Identifier: Apache-2.0 */
/*
 * load.c: a child that plays the VMM for the benchmarks.
 *
 *   load BYTES CPU [anonymous ...]  one memfd of that size, or anonymous memory; the thread that touches is pinned to CPU (-1: nowhere)
 *
 * Commands on stdin, one answer a line: fill | random COUNT -> p50 p99 | walk COUNT -> ns | touch -> ns | fresh COUNT -> ns |
 * stride PAGES -> ns
 */
#include "load.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

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
		else if (!strcmp(name, "random"))
			touch_randomly(memory, bytes / page_bytes, page_bytes, count, &p50, &p99);
		else if (!strcmp(name, "walk") || !strcmp(name, "touch"))
			for (uint64_t i = 0; i < (count ? count : bytes / page_bytes); i++)
				(void)*(volatile uint64_t *)(memory + i * page_bytes);
		else if (!strcmp(name, "stride"))
			for (uint64_t i = 0; i < bytes / page_bytes; i += count)
				(void)*(volatile uint64_t *)(memory + i * page_bytes);
		else if (!strcmp(name, "fresh"))
			for (uint64_t i = 0; i < count; i++)
				*(volatile uint64_t *)(memory + i * page_bytes) = 1;
		if (strcmp(name, "random"))
			p50 = now_ns() - began;
		printf("ok %lu %lu\n", (unsigned long)p50, (unsigned long)p99);
		fflush(stdout);
	}
	return 0;
}
