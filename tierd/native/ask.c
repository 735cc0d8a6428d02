/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ask.c: pages of tiers that Python asks (Redis, object stores, plug-ins). A fault thread that wants one files a request and goes on;
 * Python takes it, brings the bytes, and a fault thread verifies and places them. Nobody who serves faults ever waits for a store.
 *
 *   FREE -> WAITING (ask) -> TAKEN (tierd_guest_asked) -> ANSWERED (tierd_guest_answer) -> PLACING (answer_take) -> FREE (request_end)
 *
 * The pages of a request stay ARRIVING: they are owned by it, so other faults on them are left to the owner, and adoption makes them
 * STORED again. Fixed size, allocated with the guest. The lock is held for a look at the table, never over I/O.
 *
 * What such a tier need not keep any more is remembered in a bitmap (garbage), until Python has told the store. A crash forgets it:
 * adoption then takes for garbage whatever no word speaks of.
 */
#include <pthread.h>
#include <stdlib.h>

#include "internal.h"

/* A tier's requests leave room for those of other tiers, and orders for those that somebody waits for: whatever waits for a store that
 * hangs, a fault on a page of another one finds a place. Few in the model, where it must be seen that there is none. */
#ifdef TIERD_MODEL
enum { REQUESTS_MAX = 6 };
#else
enum { REQUESTS_MAX = 256 };
#endif
enum { OF_A_TIER_MAX = REQUESTS_MAX * 3 / 4, ORDERS_MAX = REQUESTS_MAX / 2 };
enum slot_state { FREE, WAITING, TAKEN, ANSWERED, PLACING };

struct slot {
	enum slot_state state;
	uint32_t tier;
	uint64_t order, since_ns; /* of its state */
	struct request request;
};

struct asking {
	pthread_mutex_t lock;
	uint64_t order;
	struct slot slots[REQUESTS_MAX];
};

int asking_create(struct tierd_guest *g)
{
	g->asking = sys_alloc(sizeof(*g->asking));
	return g->asking ? -pthread_mutex_init(&g->asking->lock, NULL) : -ENOMEM;
}

void asking_destroy(struct tierd_guest *g)
{
	for (uint32_t tier = 0; tier < TIERD_TIERS; tier++)
		if (g->garbage[tier])
			sys_free(g->garbage[tier], bitmap_bytes(g->pages));
	if (!g->asking)
		return;
	pthread_mutex_destroy(&g->asking->lock);
	sys_free(g->asking, sizeof(*g->asking));
}

static void enter_state(struct asking *a, struct slot *s, enum slot_state state)
{
	s->state = state;
	s->order = a->order++;
	s->since_ns = sys_now_ns();
}

/* NULL: there is no room for it. */
static struct slot *free_slot(struct asking *a, unsigned int tier, bool demand)
{
	struct slot *first = NULL;
	uint32_t orders = 0, of_tier = 0;

	for (struct slot *s = a->slots; s < a->slots + REQUESTS_MAX; s++) {
		if (s->state != FREE) {
			orders += !s->request.demand;
			of_tier += s->tier == tier;
		} else if (!first) {
			first = s;
		}
	}
	return of_tier < OF_A_TIER_MAX && (demand || orders < ORDERS_MAX) ? first : NULL;
}

bool ask(struct tierd_guest *g, const struct request *r)
{
	struct asking *a = g->asking;
	unsigned int tier = word_tier(page_load(g, r->first.page)); /* it is ours to look at */
	struct slot *s;

	pthread_mutex_lock(&a->lock);
	s = free_slot(a, tier, r->demand);
	if (!s) {
		pthread_mutex_unlock(&a->lock);
		return false;
	}
	s->tier = tier;
	s->request = *r;
	s->request.number = (uint32_t)(s - a->slots);
	enter_state(a, s, WAITING);
	s->request.asked_ns = s->since_ns;
	atomic_fetch_add(&g->asked_pages, r->count);
	pthread_mutex_unlock(&a->lock);
	ring(g->asked_fd);
	return true;
}

/* The first one in that state: those that a guest thread waits for before the others. */
static struct slot *first_in(struct asking *a, enum slot_state state)
{
	struct slot *first = NULL;

	for (struct slot *s = a->slots; s < a->slots + REQUESTS_MAX; s++)
		if (s->state == state && (!first || s->request.demand > first->request.demand ||
					  (s->request.demand == first->request.demand && s->order < first->order)))
			first = s;
	return first;
}

int tierd_guest_asked(struct tierd_guest *g, struct tierd_request *requests, uint32_t max, uint32_t *count)
{
	struct asking *a = g->asking;
	struct slot *s;

	*count = 0;
	if (!a)
		return -ENODEV;
	pthread_mutex_lock(&a->lock);
	while (*count < max && (s = first_in(a, WAITING))) {
		enter_state(a, s, TAKEN);
		requests[(*count)++] = (struct tierd_request){.page = s->request.first.page,
							      .number = s->request.number,
							      .count = s->request.count,
							      .tier = s->tier,
							      .demand = s->request.demand};
	}
	pthread_mutex_unlock(&a->lock);
	return 0;
}

int tierd_guest_answer(struct tierd_guest *g, uint32_t number, const void *bytes, uint32_t good, int32_t error)
{
	struct asking *a = g->asking;
	struct slot *s = a && number < REQUESTS_MAX ? &a->slots[number] : NULL;
	bool taken;

	if (!s)
		return -EINVAL;
	pthread_mutex_lock(&a->lock);
	taken = s->state == TAKEN;
	if (taken) {
		s->request.good = good < s->request.count ? good : s->request.count;
		s->request.error = error;
		s->request.bytes = bytes;
		enter_state(a, s, ANSWERED);
		atomic_fetch_add(&g->answers, 1);
	}
	pthread_mutex_unlock(&a->lock);
	if (taken)
		ring(g->answer_fd);
	return taken ? 0 : -EINVAL;
}

int tierd_guest_is_right(struct tierd_guest *g, uint64_t page, const void *bytes)
{
	return page < g->pages && checksum(bytes, g->page_bytes) == g->sums[page];
}

bool answer_take(struct tierd_guest *g, struct request *ret)
{
	struct asking *a = g->asking;
	struct slot *s;

	pthread_mutex_lock(&a->lock);
	s = first_in(a, ANSWERED);
	if (s) {
		enter_state(a, s, PLACING);
		atomic_fetch_sub(&g->answers, 1);
		*ret = s->request;
	}
	pthread_mutex_unlock(&a->lock);
	return s;
}

void request_end(struct tierd_guest *g, const struct request *r)
{
	struct asking *a = g->asking;

	pthread_mutex_lock(&a->lock);
	a->slots[r->number].state = FREE;
	atomic_fetch_sub(&g->asked_pages, r->count);
	pthread_mutex_unlock(&a->lock);
}

/* `asked_ns` is all 0 before. */
void asking_ages(struct tierd_guest *g, uint64_t now_ns, uint64_t asked_ns[TIERD_TIERS], uint64_t *answered_ns)
{
	struct asking *a = g->asking;

	*answered_ns = 0;
	if (!a || !atomic_load(&g->asked_pages))
		return;
	pthread_mutex_lock(&a->lock);
	for (struct slot *s = a->slots; s < a->slots + REQUESTS_MAX; s++) {
		uint64_t *age_ns = s->state == ANSWERED ? answered_ns : &asked_ns[s->tier];

		if ((s->state == WAITING || s->state == TAKEN || s->state == ANSWERED) && now_ns > s->since_ns &&
		    now_ns - s->since_ns > *age_ns)
			*age_ns = now_ns - s->since_ns;
	}
	pthread_mutex_unlock(&a->lock);
}

/* --- what a store need not keep ------------------------------------------------------------------------------------------ */

int tierd_guest_garbage(struct tierd_guest *g, uint32_t tier, uint64_t first_page, uint64_t max_pages, uint64_t *page,
			uint64_t *count)
{
	const uint64_t *bits = tier < TIERD_TIERS ? g->garbage[tier] : NULL;
	uint64_t at = first_page;

	*count = 0;
	if (!bits)
		return -ENODEV;
	while (at < g->pages && !bit_get(bits, at))
		at += at % 64 || bits[at / 64] ? 1 : 64;
	for (*page = at; at < g->pages && *count < max_pages && bit_get(bits, at); at++)
		(*count)++;
	return 0;
}

int tierd_guest_garbage_gone(struct tierd_guest *g, uint32_t tier, uint64_t page, uint64_t count)
{
	uint64_t *bits = tier < TIERD_TIERS ? g->garbage[tier] : NULL;

	if (!bits || page + count > g->pages)
		return -EINVAL;
	for (uint64_t i = page; i < page + count; i++)
		bit_clear(bits, i);
	return 0;
}
