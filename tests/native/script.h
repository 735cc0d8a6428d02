/* SPDX-License-Identifier: Apache-2.0 */
/*
 * script.h: what a guest and a daemon do, and what must be true of it: one script for the model (driver.c) and for the real
 * kernel (real.c), which are its worlds.
 *
 * One invariant above all: every byte that the guest reads is the last one it wrote (of a page that the VMM gave back itself:
 * zeros, or what it last held). A memory error is allowed exactly where the stored copy was destroyed.
 */
#ifndef TIERD_SCRIPT_H
#define TIERD_SCRIPT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "internal.h"

enum { SCRIPT_PAGES_MAX = 64, BATCH_PAGES_MAX = 16 };

struct script {
	uint32_t pages;
	bool failures;  /* calls of the kernel or the store fail now and then, so a batch may */
	bool losses;    /* stored copies are destroyed, so pages may be LOST */
	bool anon;      /* the guest's memory is private and anonymous */
	uint32_t tiers; /* the ladder's: 1, or the first of them is a pool */
	uint32_t asked; /* bit i: tier i is one that Python asks, whose part the script plays */
	bool often;     /* what can sink does so in every cycle */
	/* the guest's side, by page; under world_lock */
	uint64_t last[SCRIPT_PAGES_MAX]; /* what the guest last wrote */
	uint32_t writes[SCRIPT_PAGES_MAX];
	bool maybe_zero[SCRIPT_PAGES_MAX]; /* the VMM gave it back */
	int giving_back[SCRIPT_PAGES_MAX];
	_Atomic uint64_t accesses, memory_errors;
	/* the daemon's side */
	uint64_t evicted, demoted, repaired;
};

extern struct script S;
extern _Thread_local uint64_t script_random; /* who runs draws from it: a seed says what everybody wants to do */

uint32_t below(uint32_t n);
_Noreturn void script_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* TIERD_ENGINE_* by name; false: there is no such engine */
bool script_engine(const char *name, uint32_t *ret);

/* --- the guest --- */
void script_guest(uint32_t thread); /* until world_stopped */
void script_read(uint32_t thread, uint32_t page);
void script_read_all(uint32_t thread);
bool script_may_have_written(uint32_t page, uint64_t value); /* some time; not zeros */

/* --- the daemon's worker --- */
void script_set_reads(struct tierd_guest *g); /* drawn anew */
void script_cycle(struct tierd_guest *g);
/* Whatever is stored, of any age: it is selected to sink, and the batch cancelled. */
void script_select_all(struct tierd_guest *g);
/* One try at bringing everything back: how many pages are still away. With `repaired` these include the LOST ones. */
uint64_t script_bring_back(struct tierd_guest *g, bool repaired);

/* Where tiers are asked, what Python does in trio's thread: takes requests, reads, answers, in some other order. False: there was none. */
enum { SCRIPT_TAKEN_MAX = 4 };
struct script_requests {
	struct tierd_request taken[SCRIPT_TAKEN_MAX];
	uint32_t count;
};
bool script_answer(struct tierd_guest *g, struct script_requests *held);

/* --- what the world says ------------------------------------------------------------------------------------------------ */

enum outcome { MADE, MEMORY_ERROR, UNKNOWN /* a write was cut off by a memory error: the page may hold anything */ };

enum outcome world_access(uint32_t thread, uint32_t page, bool write, uint64_t *value);
bool world_may_fail(uint32_t page); /* its stored copy was destroyed */
bool world_may_be_older(uint32_t page,
			uint64_t value); /* of a page that was given back: the corner that README.md names */
bool world_zeroed(uint32_t page);        /* just now: a punch that did not punch, before the bytes are written back */
void world_settled(uint32_t page);       /* the guest knows again what the page holds */
void world_give_back(uint32_t page);     /* MADV_REMOVE by the VMM */
void world_zap(uint32_t page);           /* MADV_DONTNEED by the VMM */
void world_lock(uint32_t page);
void world_unlock(uint32_t page);
void world_rest(uint32_t steps);
bool world_stopped(void);
void world_before_pass(void);
/* The store of a tier that is asked: pages [page, page + count). 0, or -errno: then each may have been written or not. */
int world_store_write(uint32_t tier, uint64_t page, uint32_t count, const uint8_t *bytes);
int world_store_read(uint32_t tier, uint64_t page, uint32_t count, uint8_t *bytes);
int world_store_discard(uint32_t tier, uint64_t page, uint64_t count);
/* What is run at the same time as what comes before the end, whose answer is its. */
void world_begin_beside(int (*run)(struct tierd_batch *), struct tierd_batch *b);
int world_end_beside(void);
void world_before_select(void);
void world_selected(double min_idle_s, bool sinks); /* a batch was, just now: out of the guest, or out of a tier */

#endif
