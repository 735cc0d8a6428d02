/* SPDX-License-Identifier: Apache-2.0 */
/* pool.c: pages in a pool: written, read, freed, and moved together. */
#include <string.h>

#include "pool_inside.h"

struct pool_reader {
	const struct pool *pool;
	struct decompressor *decompressor;
};

/* --- pages -------------------------------------------------------------------------------------------------------------- */

/* What is to be stored of a page: `o` its header, *data its bytes. */
static int object_make(struct pool *p, const void *from, struct object *o, const void **data)
{
	int bytes = compress(p->compressor, from, p->page_bytes, data);

	if (bytes < 0)
		return bytes;
	if ((uint32_t)bytes > p->packed_max)
		return -E2BIG;
	o->bytes = (uint16_t)bytes;
	return 0;
}

static struct size_class *class_of_object(struct pool *p, const struct object *o)
{
	return &p->classes[p->class_of[round_up(sizeof(*o) + o->bytes, p->step_bytes) / p->step_bytes]];
}

int pool_write(struct pool *p, uint64_t page, const void *from)
{
	struct object made = {.page = (uint32_t)page}, *o;
	uint32_t entry, before;
	const void *data;
	int error;

	if (page >= p->pages || !p->adopted)
		return -EINVAL;
	if (!pool_has_room(p, 0)) /* the capacity was lowered: what is free in its slots is not for more */
		return -ENOSPC;
	error = object_make(p, from, &made, &data);
	if (!error)
		error = reserve_entry(p, (const void *)&p->index[page]);
	if (!error)
		error = object_take(p, class_of_object(p, &made), &entry);
	if (error)
		return error;
	o = object_at(p, entry);
	*o = made;
	memcpy(o->data, data, o->bytes);
	count_object(p, o, 1);
	before = index_load(p, page);
	index_store(p, page, entry);
	if (before)
		object_forget(p, page, before);
	else
		add(&p->stored, 1);
	return 0;
}

void pool_free(struct pool *p, uint64_t page)
{
	uint32_t entry = page < p->pages && p->adopted ? index_load(p, page) : 0;

	if (!entry)
		return;
	index_store(p, page, 0);
	add(&p->stored, -1);
	object_forget(p, page, entry);
}

bool pool_has(const struct pool *p, uint64_t page)
{
	return page < p->pages && index_load(p, page);
}

int pool_reader_create(const struct pool *p, struct pool_reader **ret)
{
	struct pool_reader *r = sys_alloc(sizeof(*r));
	int error;

	if (!r)
		return -ENOMEM;
	r->pool = p;
	error = decompressor_create(p->codec, &r->decompressor);
	if (error)
		pool_reader_destroy(r);
	else
		*ret = r;
	return error;
}

void pool_reader_destroy(struct pool_reader *r)
{
	if (!r)
		return;
	decompressor_destroy(r->decompressor);
	sys_free(r, sizeof(*r));
}

int pool_read(struct pool_reader *r, uint64_t page, void *to)
{
	const struct pool *p = r->pool;
	uint32_t entry = page < p->pages ? index_load(p, page) : 0;
	const struct object *o;

	if (!entry)
		return -ENOENT;
	o = object_of(p, page, entry);
	if (!o)
		return -EBADMSG;
	return decompress(r->decompressor, o->data, o->bytes, to, p->page_bytes);
}

/* --- compaction --------------------------------------------------------------------------------------------------------- */

struct mover {
	uint32_t left;
	uint32_t *moved;
	bool (*own)(void *arg, uint64_t page);
	void (*disown)(void *arg, uint64_t page);
	void *arg;
};

/* From a detached slot to an attached one. */
static int object_move(struct pool *p, struct size_class *c, uint64_t page, uint32_t from)
{
	const struct object *o = object_of(p, page, from);
	uint32_t to;
	int error;

	if (!o)
		return -EBADMSG; /* pool_read says so, too */
	error = object_take(p, c, &to);
	if (error)
		return error;
	memcpy(object_at(p, to), o, sizeof(*o) + o->bytes);
	index_store(p, page, to);
	object_put(p, from);
	p->slots[slot_of(from)].used--;
	return 0;
}

static int slot_evacuate(struct pool *p, struct size_class *c, uint32_t slot, struct mover *m)
{
	int error = 0;

	for (uint32_t ordinal = 0; ordinal < c->objects && m->left && p->slots[slot].used && !error; ordinal++) {
		uint32_t entry = entry_of(slot, ordinal);
		uint64_t page = object_at(p, entry)->page;

		if (!object_stored(p, entry))
			continue;
		m->left--;
		if (!m->own(m->arg, page))
			continue;
		error = object_move(p, c, page, entry);
		m->disown(m->arg, page);
		if (!error)
			++*m->moved;
		else if (error == -EBADMSG) /* it stays where it is */
			error = 0;
	}
	return error;
}

/* The slots that a class could do without; those that cannot be emptied now wait aside for the end of it. */
static int class_compact(struct pool *p, struct size_class *c, struct mover *m)
{
	uint32_t aside = 0, slot;
	int error = 0;

	while (m->left && !error && c->free_objects >= c->objects) {
		slot = emptiest(c);
		slot_detach(p, c, slot);
		error = slot_evacuate(p, c, slot, m);
		if (p->slots[slot].used)
			list_push(p, &aside, slot);
		else
			error = slot_drop(p, slot);
	}
	while ((slot = list_pop(p, &aside)))
		slot_attach(p, c, slot);
	return error;
}

static int punch_again(struct pool *p)
{
	uint32_t slot;
	int error = 0;

	while (!error && (slot = list_pop(p, &p->unpunched)))
		error = slot_punch(p, slot, p->slots[slot].fresh);
	return error;
}

int pool_compact(struct pool *p, uint32_t pages_max, bool (*own)(void *arg, uint64_t page),
		 void (*disown)(void *arg, uint64_t page), void *arg, uint32_t *moved)
{
	struct mover m = {.left = pages_max, .moved = moved, .own = own, .disown = disown, .arg = arg};
	int error;

	*moved = 0;
	if (!p->adopted)
		return -EINVAL;
	error = punch_again(p);
	for (uint32_t i = 0; i < p->class_count && !error; i++) {
		error = class_compact(p, &p->classes[1 + p->compact_class], &m);
		if (!m.left)
			break;
		p->compact_class = (p->compact_class + 1) % p->class_count;
	}
	return error;
}

/* --- for the operator --- */

enum codec_kind pool_codec(const struct pool *p)
{
	return p->codec_kind;
}

void pool_set_capacity(struct pool *p, uint64_t bytes)
{
	atomic_store_explicit(&p->capacity_bytes, bytes, memory_order_relaxed);
}

void pool_counters(const struct pool *p, struct pool_counters *ret)
{
	*ret = (struct pool_counters){
		.pages = p->stored,
		.object_bytes = p->object_bytes,
		.used_bytes = p->used_bytes,
		.metadata_bytes = p->page_bytes + p->meta_bytes + p->stored * sizeof(struct object) +
				  p->slots_high * sizeof(struct slot) + p->reserved_bytes + sizeof(*p),
		.capacity_bytes = p->capacity_bytes,
		.locked = p->locked,
	};
}
