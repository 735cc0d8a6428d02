/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model_pool.c: the promises of pool.h, at page granularity, behind its seam: what it holds outlives a daemon, one thread changes it,
 * any number read, and a page's object may be moved or freed under a reader that does not own the page. Room that is given back is
 * scribbled over at once, so that such a reader shows. pool.c itself is tested by tests/native/pool_test.c.
 */
#include <errno.h>
#include <string.h>

#include "model.h"
#include "pool.h"
#include "sys.h"

enum { OBJECTS = 2 * MODEL_PAGES_MAX, WORDS = MODEL_PAGE_BYTES / 8 };

struct pool {
	uint64_t capacity_pages, pages;
	bool used[OBJECTS];
	bool adopted;
};

struct pool_reader {
	struct pool *pool;
};

static int pool_made(struct pool **ret, bool adopted)
{
	*ret = sys_alloc(sizeof(**ret));
	(*ret)->adopted = adopted;
	M.pool_changes = false;
	(*ret)->capacity_pages = OBJECTS;
	return 0;
}

int pool_create(int fd, uint32_t page_bytes, uint64_t pages, enum codec_kind codec, int level, struct pool **ret)
{
	(void)codec;
	(void)level;
	if (fd != FD_POOL || page_bytes != sys_page_bytes() || pages != M.pages)
		model_fail("a pool for other pages");
	return pool_made(ret, true);
}

int pool_open(int fd, uint32_t page_bytes, uint64_t pages, int level, struct pool **ret)
{
	(void)level;
	if (fd != FD_POOL || page_bytes != sys_page_bytes() || pages != M.pages)
		model_fail("a pool for other pages");
	return pool_made(ret, false);
}

void pool_close(struct pool *pool)
{
	sys_free(pool, sizeof(*pool));
}

static void change(struct pool *pool)
{
	if (M.pool_changes)
		model_fail("two change the pool at once");
	if (!pool->adopted)
		model_fail("the pool is changed before it is adopted");
	M.pool_changes = true;
	model_pause();
}

static void changed(void)
{
	model_pause();
	M.pool_changes = false;
}

static void give_back(struct pool *pool, uint32_t object)
{
	pool->used[object] = false;
	memset(M.pool_object[object], 0xee, sizeof(M.pool_object[object]));
}

/* OBJECTS: there is no room. */
static uint32_t take(struct pool *pool)
{
	uint32_t object = 0;

	while (object < OBJECTS && pool->used[object])
		object++;
	if (object < OBJECTS)
		pool->used[object] = true;
	return object;
}

static void fill(uint32_t object, const uint64_t *from)
{
	for (int i = 0; i < WORDS; i++) {
		M.pool_object[object][i] = from[i];
		if (i % 4 == 3)
			model_pause();
	}
}

static void made_anew(uint64_t page)
{
	struct model_store *s = &M.store[MODEL_POOL];

	M.may_fail[page] &= !s->destroyed[page];
	s->destroyed[page] = s->unreadable[page] = false;
}

int pool_adopt(struct pool *pool, bool (*live)(void *arg, uint64_t page), void (*damaged)(void *arg, uint64_t page),
	       void *arg)
{
	(void)damaged;
	memset(pool->used, 0, sizeof(pool->used));
	for (uint64_t page = 0; page < M.pages; page++) {
		if (M.pool_index[page] && !live(arg, page)) {
			made_anew(page);
			M.pool_index[page] = 0;
		}
		if (M.pool_index[page]) {
			pool->used[M.pool_index[page] - 1] = true;
			pool->pages++;
		}
		model_pause();
	}
	for (uint32_t object = 0; object < OBJECTS; object++)
		if (!pool->used[object])
			give_back(pool, object);
	pool->adopted = true;
	return 0;
}

int pool_write(struct pool *pool, uint64_t page, const void *from)
{
	uint32_t object, before = M.pool_index[page];
	int error = 0;

	change(pool);
	object = pool->pages < pool->capacity_pages && !model_chance(M.faults.pool_full) ? take(pool) : OBJECTS;
	if (model_chance(M.faults.pool_refuses))
		error = -E2BIG;
	else if (object == OBJECTS)
		error = -ENOSPC;
	if (error) {
		if (object < OBJECTS)
			give_back(pool, object);
		changed();
		return error;
	}
	fill(object, from);
	made_anew(page);
	M.pool_index[page] = object + 1;
	pool->pages += !before;
	model_pause();
	if (before)
		give_back(pool, before - 1);
	changed();
	return 0;
}

void pool_free(struct pool *pool, uint64_t page)
{
	uint32_t before = M.pool_index[page];

	change(pool);
	if (before) {
		made_anew(page);
		M.pool_index[page] = 0;
		model_pause();
		give_back(pool, before - 1);
		pool->pages--;
	}
	changed();
}

bool pool_has(const struct pool *pool, uint64_t page)
{
	(void)pool;
	return M.pool_index[page];
}

int pool_reader_create(const struct pool *pool, struct pool_reader **ret)
{
	*ret = sys_alloc(sizeof(**ret));
	(*ret)->pool = (struct pool *)pool;
	return 0;
}

void pool_reader_destroy(struct pool_reader *r)
{
	sys_free(r, sizeof(*r));
}

int pool_read(struct pool_reader *r, uint64_t page, void *to)
{
	uint32_t object = M.pool_index[page];

	(void)r;
	if (!object)
		return -ENOENT;
	for (int i = 0; i < WORDS; i++) {
		((uint64_t *)to)[i] = M.pool_object[object - 1][i];
		if (i % 4 == 3)
			model_pause();
	}
	return M.store[MODEL_POOL].unreadable[page] ? -EBADMSG : 0;
}

int pool_compact(struct pool *pool, uint32_t pages_max, bool (*own)(void *arg, uint64_t page),
		 void (*disown)(void *arg, uint64_t page), void *arg, uint32_t *moved)
{
	uint32_t asked = 0;

	*moved = 0;
	change(pool);
	for (uint64_t page = 0; page < M.pages && asked < pages_max; page++) {
		uint32_t before = M.pool_index[page], object;

		if (!before || model_chance(500))
			continue;
		asked++;
		if (!own(arg, page))
			continue;
		object = take(pool);
		if (object < OBJECTS) {
			fill(object, M.pool_object[before - 1]);
			M.pool_index[page] = object + 1;
			model_pause();
			give_back(pool, before - 1);
			(*moved)++;
		}
		disown(arg, page);
	}
	changed();
	return 0;
}

void pool_set_capacity(struct pool *pool, uint64_t bytes)
{
	pool->capacity_pages = bytes / MODEL_PAGE_BYTES;
}

void pool_counters(const struct pool *pool, struct pool_counters *ret)
{
	*ret = (struct pool_counters){.pages = pool->pages, .capacity_bytes = pool->capacity_pages * MODEL_PAGE_BYTES};
}
