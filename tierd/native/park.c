/* SPDX-License-Identifier: Apache-2.0 */
/*
 * park.c: faults on stored pages that have to wait: their read failed and is tried again later, or every other fault thread
 * is inside a read and the last one must stay free for faults that need no store.
 *
 * A parked page stays ARRIVING: it is owned by the lot, so other faults on it are left to the owner, and adoption makes it
 * STORED again. Fixed size, allocated with the guest. The lock is held for a look at the lot, never over I/O.
 */
#include <pthread.h>
#include <stdlib.h>

#include "internal.h"

enum { PARKED_MAX = 256, NO_SLOT_PAUSE_US = 50000 };

struct parking {
	pthread_mutex_t lock;
	uint32_t used;
	struct parked pages[PARKED_MAX];
};

int parking_create(struct tierd_guest *g)
{
	g->parking = sys_alloc(sizeof(*g->parking));
	return g->parking ? -pthread_mutex_init(&g->parking->lock, NULL) : -ENOMEM;
}

void parking_destroy(struct tierd_guest *g)
{
	if (!g->parking)
		return;
	pthread_mutex_destroy(&g->parking->lock);
	sys_free(g->parking, sizeof(*g->parking));
}

bool park(struct tierd_guest *g, const struct parked *p)
{
	struct parking *lot = g->parking;
	bool room;

	pthread_mutex_lock(&lot->lock);
	room = lot->used < PARKED_MAX;
	if (room) {
		lot->pages[lot->used++] = *p;
		atomic_store(&g->parked_pages, lot->used);
	}
	pthread_mutex_unlock(&lot->lock);
	return room;
}

bool unpark_due(struct tierd_guest *g, uint64_t now_ns, struct parked *ret, uint64_t *next_due_ns)
{
	struct parking *lot = g->parking;
	uint32_t first = 0;
	bool due;

	pthread_mutex_lock(&lot->lock);
	for (uint32_t i = 1; i < lot->used; i++)
		if (lot->pages[i].due_ns < lot->pages[first].due_ns)
			first = i;
	*next_due_ns = lot->used ? lot->pages[first].due_ns : 0;
	due = lot->used && *next_due_ns <= now_ns;
	if (due) {
		*ret = lot->pages[first];
		lot->pages[first] = lot->pages[--lot->used];
		atomic_store(&g->parked_pages, lot->used);
	}
	pthread_mutex_unlock(&lot->lock);
	return due;
}

void parking_hurry(struct tierd_guest *g)
{
	struct parking *lot = g->parking;

	pthread_mutex_lock(&lot->lock);
	for (uint32_t i = 0; i < lot->used; i++)
		lot->pages[i].due_ns = 0;
	pthread_mutex_unlock(&lot->lock);
}

uint64_t parking_overdue_ns(struct tierd_guest *g, uint64_t now_ns)
{
	struct parking *lot = g->parking;
	uint64_t overdue_ns = 0;

	pthread_mutex_lock(&lot->lock);
	for (uint32_t i = 0; i < lot->used; i++)
		if (now_ns > lot->pages[i].due_ns && now_ns - lot->pages[i].due_ns > overdue_ns)
			overdue_ns = now_ns - lot->pages[i].due_ns;
	pthread_mutex_unlock(&lot->lock);
	return overdue_ns;
}

/* --- who may read the store now ----------------------------------------------------------------------------------------- */

bool reader_enter(struct tierd_guest *g)
{
	uint32_t threads = atomic_load(&g->thread_count), readers = atomic_load(&g->readers);

	do
		if (readers >= (threads > 1 ? threads - 1 : 1))
			return false;
	while (!atomic_compare_exchange_weak(&g->readers, &readers, readers + 1));
	return true;
}

void reader_leave(struct tierd_guest *g)
{
	atomic_fetch_sub(&g->readers, 1);
}

uint64_t reader_due_ns(uint64_t now_ns)
{
	return now_ns + NO_SLOT_PAUSE_US * 1000ull;
}
