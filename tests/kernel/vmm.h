/* SPDX-License-Identifier: Apache-2.0 */
/* vmm.h: the guest's memory (vmm.c), the commands that spoil it (vmm_hazards.c), the handshake. Commands: see struct command. */
#ifndef VMM_H
#define VMM_H

#include <stdbool.h>
#include <stdint.h>

enum { REGIONS_MAX = 8 };

extern uint64_t page_bytes, pages;
extern uint32_t *sequence;     /* by page; 0: zeros */
extern int memfd[REGIONS_MAX]; /* -1 each: the memory is anonymous */
extern bool anonymous;

uint64_t *page_at(uint64_t page);
/* of FIRST COUNT; COUNT 0 or missing: up to the end */
uint64_t end_of(const uint64_t *a);

/* each page is checked up to its first wrong word */
void check_page(uint64_t page, const uint64_t *words);
void write_page(uint64_t page, uint64_t *to);

void map_second(const uint64_t *a, int count);
void unmap_second(const uint64_t *a, int count);
void lock(const uint64_t *a, int count);
void unlock(const uint64_t *a, int count);
void pin(const uint64_t *a, int count);
void unpin(const uint64_t *a, int count);
void splice_page(const uint64_t *a, int count);
void unsplice(const uint64_t *a, int count);
void fork_child(const uint64_t *a, int count);
void end_child(const uint64_t *a, int count);
void register_own(const uint64_t *a, int count);
void unregister_own(const uint64_t *a, int count);
void filter(const uint64_t *a, int count);
void collapse(const uint64_t *a, int count);
void large(const uint64_t *a, int count);
void mergeable(const uint64_t *a, int count);
void twin(const uint64_t *a, int count);
void give_back(const uint64_t *a, int count);
void zap(const uint64_t *a, int count);
void page_out(const uint64_t *a, int count);
void balloon(const uint64_t *a, int count);
void replace_mapping(const uint64_t *a, int count);
void unmap_region(const uint64_t *a, int count);
void map_again(const uint64_t *a, int count);
void map_other(const uint64_t *a, int count);
void execute(const uint64_t *a, int count);
void add_memory(const uint64_t *a, int count);

/* vmm_handshake.c */
/* `device`: a /dev/userfaultfd that was inherited, or -1 */
void start_handshake(const char *path, int device, uint64_t region_count, uint64_t region_bytes);
void handshake(const uint64_t *a, int count);
void close_userfaultfd(const uint64_t *a, int count);

#endif
