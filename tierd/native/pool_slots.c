/* SPDX-License-Identifier: Apache-2.0 */
/* pool_slots.c: space in a pool: pages of its index, slots, objects in them. The worker's. */
#include "pool_inside.h"

void set_reserved(struct pool *p, const void *memory)
{
	uint64_t bit = reserved_bit(p, memory);

	atomic_fetch_or_explicit(&p->reserved[bit / WORD_BITS], 1ull << bit % WORD_BITS, memory_order_release);
	add(&p->used_bytes, p->page_bytes);
	add(&p->meta_bytes, p->page_bytes);
}

bool pool_has_room(const struct pool *p, uint64_t bytes)
{
	uint64_t capacity = atomic_load_explicit(&p->capacity_bytes, memory_order_relaxed),
		 used = atomic_load_explicit(&p->used_bytes, memory_order_relaxed);

	return used <= capacity && bytes <= capacity - used;
}

int reserve_space(const struct pool *p, void *memory, uint64_t bytes)
{
	int error;

	do
		error = sys_pool_reserve(p->fd, memory, offset_of(p, memory), bytes);
	while (error == -EINTR);
	return error;
}

static int punch(const struct pool *p, void *memory, uint64_t bytes)
{
	int error;

	do
		error = sys_pool_punch(p->fd, offset_of(p, memory), bytes);
	while (error == -EINTR);
	return error;
}

/* Of a hole, and it is one again when that fails. (Should the punch fail, too, whoever reserves it next has it.) */
static int reserve_hole(const struct pool *p, void *memory, uint64_t bytes)
{
	int error = reserve_space(p, memory, bytes);

	if (error)
		punch(p, memory, bytes);
	return error;
}

/* Space for the entry of the index or the directory at `memory`. */
int reserve_entry(struct pool *p, const void *memory)
{
	uint64_t offset = offset_of(p, memory);
	int error;

	if (is_reserved(p, memory))
		return 0;
	if (!pool_has_room(p, p->page_bytes))
		return -ENOSPC;
	error = reserve_hole(p, p->memory + offset / p->page_bytes * p->page_bytes, p->page_bytes);
	if (!error)
		set_reserved(p, memory);
	return error;
}

/* --- slots -------------------------------------------------------------------------------------------------------------- */

void list_push(struct pool *p, uint32_t *head, uint32_t slot)
{
	p->slots[slot].prev = 0;
	p->slots[slot].next = *head;
	if (*head)
		p->slots[*head].prev = slot;
	*head = slot;
}

uint32_t list_pop(struct pool *p, uint32_t *head)
{
	uint32_t slot = *head;

	if (!slot)
		return 0;
	*head = p->slots[slot].next;
	if (*head)
		p->slots[*head].prev = 0;
	return slot;
}

static void list_remove(struct pool *p, uint32_t *head, uint32_t slot)
{
	struct slot *s = &p->slots[slot];

	if (s->prev)
		p->slots[s->prev].next = s->next;
	else
		*head = s->next;
	if (s->next)
		p->slots[s->next].prev = s->prev;
}

static void slot_relist(struct pool *p, struct size_class *c, uint32_t slot)
{
	struct slot *s = &p->slots[slot];
	uint8_t list = s->used == c->objects ? UNLISTED : (uint8_t)(s->used * QUARTERS / c->objects);

	if (list == s->list)
		return;
	if (s->list != UNLISTED)
		list_remove(p, &c->lists[s->list], slot);
	if (list != UNLISTED)
		list_push(p, &c->lists[list], slot);
	s->list = list;
}

/* Between detach and attach, nothing is put into the slot. */
void slot_detach(struct pool *p, struct size_class *c, uint32_t slot)
{
	struct slot *s = &p->slots[slot];

	if (s->list != UNLISTED)
		list_remove(p, &c->lists[s->list], slot);
	s->list = UNLISTED;
	c->free_objects -= c->objects - s->used;
}

void slot_attach(struct pool *p, struct size_class *c, uint32_t slot)
{
	c->free_objects += c->objects - p->slots[slot].used;
	slot_relist(p, c, slot);
}

static uint32_t fullest(const struct size_class *c)
{
	for (int quarter = QUARTERS - 1; quarter >= 0; quarter--)
		if (c->lists[quarter])
			return c->lists[quarter];
	return 0;
}

uint32_t emptiest(const struct size_class *c)
{
	for (int quarter = 0; quarter < QUARTERS; quarter++)
		if (c->lists[quarter])
			return c->lists[quarter];
	return 0;
}

static void slot_unuse(struct pool *p, uint32_t slot)
{
	directory_store(p, slot, 0);
	list_push(p, &p->free_slots, slot);
}

/* The first pages of a slot that nothing refers to. What the file system does not take is out of use until pool_compact: there may be
 * holes in it. */
int slot_punch(struct pool *p, uint32_t slot, uint16_t pages)
{
	uint64_t bytes = (uint64_t)pages * p->page_bytes;
	int error = punch(p, slot_memory(p, slot), bytes);

	if (error) {
		p->slots[slot].fresh = pages;
		list_push(p, &p->unpunched, slot);
		return error;
	}
	add(&p->used_bytes, -(int64_t)bytes);
	slot_unuse(p, slot);
	return 0;
}

/* Of a detached, empty slot. */
int slot_drop(struct pool *p, uint32_t slot)
{
	uint16_t pages = class_of_slot(p, slot)->pages;

	atomic_store_explicit(&p->slots[slot].size_class, 0, memory_order_relaxed);
	return slot_punch(p, slot, pages);
}

static uint32_t slot_number_take(struct pool *p)
{
	uint32_t slot = list_pop(p, &p->free_slots);

	if (!slot && p->slots_high + 1 < p->slot_count)
		slot = ++p->slots_high;
	return slot;
}

/* Another slot for the class, attached. */
static int slot_add(struct pool *p, struct size_class *c)
{
	uint64_t bytes = (uint64_t)c->pages * p->page_bytes;
	uint8_t number = (uint8_t)(c - p->classes);
	uint32_t slot = pool_has_room(p, bytes) ? slot_number_take(p) : 0;
	int error;

	if (!slot)
		return -ENOSPC;
	error = reserve_entry(p, (const void *)&p->directory[slot]);
	if (error) {
		list_push(p, &p->free_slots, slot);
		return error;
	}
	directory_store(p, slot, number); /* first: a successor finds whatever takes space */
	error = pool_has_room(p, bytes) ? reserve_hole(p, slot_memory(p, slot), bytes) : -ENOSPC;
	if (error) {
		slot_unuse(p, slot);
		return error;
	}
	p->slots[slot] = (struct slot){.free = NO_ORDINAL, .list = UNLISTED};
	atomic_store_explicit(&p->slots[slot].size_class, number, memory_order_relaxed);
	add(&p->used_bytes, (int64_t)bytes);
	slot_attach(p, c, slot);
	return 0;
}

void object_put(struct pool *p, uint32_t entry)
{
	struct slot *s = &p->slots[slot_of(entry)];
	struct object *o = object_at(p, entry);

	*o = (struct object){.page = s->free, .bytes = OBJECT_FREE};
	s->free = (uint16_t)ordinal_of(entry);
}

bool object_stored(const struct pool *p, uint32_t entry)
{
	const struct object *o = object_at(p, entry);

	return o->bytes != OBJECT_FREE && o->page < p->pages && index_load(p, o->page) == entry;
}

/* Finds out what is free in a detached slot. */
void slot_scan(struct pool *p, uint32_t slot)
{
	struct size_class *c = class_of_slot(p, slot);
	struct slot *s = &p->slots[slot];

	s->free = NO_ORDINAL;
	s->used = 0;
	s->fresh = c->objects;
	for (uint32_t ordinal = c->objects; ordinal--;) {
		if (object_stored(p, entry_of(slot, ordinal)))
			s->used++;
		else
			object_put(p, entry_of(slot, ordinal));
	}
}

/* Whatever was damaged in the slot, it can be used afterwards. */
static void slot_repair(struct pool *p, uint32_t slot)
{
	struct size_class *c = class_of_slot(p, slot);

	slot_detach(p, c, slot);
	slot_scan(p, slot);
	slot_attach(p, c, slot);
}

static bool slot_pop(struct pool *p, const struct size_class *c, uint32_t slot, uint32_t *entry)
{
	struct slot *s = &p->slots[slot];
	const struct object *o;

	*entry = entry_of(slot, s->free == NO_ORDINAL ? s->fresh : s->free);
	if (s->free == NO_ORDINAL) {
		s->fresh++;
		return s->fresh <= c->objects;
	}
	o = object_at(p, *entry);
	if (o->bytes != OBJECT_FREE || (o->page >= c->objects && o->page != NO_ORDINAL))
		return false;
	s->free = (uint16_t)o->page;
	return true;
}

/* An object that nobody uses, and that is nobody's until an entry refers to it. */
int object_take(struct pool *p, struct size_class *c, uint32_t *entry)
{
	uint32_t slot = fullest(c);

	while (!slot || !slot_pop(p, c, slot, entry)) {
		int error = 0;

		if (slot)
			slot_repair(p, slot); /* it has room, or is full */
		else
			error = slot_add(p, c);
		if (error)
			return error;
		slot = fullest(c);
	}
	p->slots[slot].used++;
	c->free_objects--;
	slot_relist(p, c, slot);
	return 0;
}

static void object_give(struct pool *p, uint32_t entry)
{
	uint32_t slot = slot_of(entry);
	struct size_class *c = class_of_slot(p, slot);

	object_put(p, entry);
	p->slots[slot].used--;
	c->free_objects++;
	slot_relist(p, c, slot);
	if (!p->slots[slot].used) {
		slot_detach(p, c, slot);
		slot_drop(p, slot); /* an error is pool_compact's to tell: it tries again */
	}
}

void count_object(struct pool *p, const struct object *o, int64_t n)
{
	add(&p->object_bytes, n * o->bytes);
}

/* What an entry referred to that is not the page's any more. */
void object_forget(struct pool *p, uint64_t page, uint32_t entry)
{
	const struct object *o = object_of(p, page, entry);

	if (o) {
		count_object(p, o, -1);
		object_give(p, entry);
	} else if (slot_of(entry) < p->slot_count && class_of_slot(p, slot_of(entry))) {
		slot_repair(p, slot_of(entry));
	}
}
