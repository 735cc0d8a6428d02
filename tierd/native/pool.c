/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.c: see pool.h for who may call what.
 *
 * The file: a header, an index (one 32-bit entry a guest page: where its object is), a directory (one byte a slot: the size class of its
 * objects), and slots, each of SLOT_PAGES pages of addresses. A slot holds objects of one size class in the first few of its
 * pages, as many as leave the least waste at the end; the others are never touched. Index and directory are sparse, too: a page of
 * them takes space with its first entry (`reserved` says which have; a hole must not even be read).
 *
 * An object is stored when, and only when, the page that its header names has an index entry that says it is here. That is all a
 * successor needs: who is free, how full a slot is, which slot to take next are found out again (slot_scan). So the order is
 *
 *   directory byte, space, object, index entry (release)      and backwards:      index entry, space, directory byte
 *
 * and a death in between leaves at worst a slot in the directory that no entry refers to. A moved or rewritten page has two objects
 * for a moment; the entry says which counts, and both are right.
 *
 * Free objects of a slot are linked through themselves, and nothing believes these links: what is damaged there leads to a
 * slot_scan.
 */
#include <string.h>

#include "internal.h"
#include "pool.h"

static const char MAGIC[8] = "tierpool";

enum {
	SLOT_PAGES = 8,
	ORDINAL_BITS = 9,
	OBJECTS_MAX = 1 << ORDINAL_BITS, /* of a slot */
	SLOTS_MAX = (1 << (32 - ORDINAL_BITS)) - 1,
	STEPS_MAX = 256, /* object sizes are multiples of a step: of a 256th of a page */
	CLASSES_MAX = STEPS_MAX / 4 * 3 + 1,
	STEP_BYTES_MIN = 16,
	PAGE_BYTES_MIN = 64, /* the model's; real ones are the kernel's */
	PAGE_BYTES_MAX = 65536,
	WORD_BITS = 64,
};

enum { NO_ORDINAL = 0xffff };
enum { QUARTERS = 4, UNLISTED = QUARTERS };

struct object {
	uint32_t page;  /* of a free one: the ordinal of the next free one */
	uint16_t bytes; /* of data; or what it is */
	uint8_t data[];
} __attribute__((packed, aligned(2)));
enum { OBJECT_FREE = 0, OBJECT_FILLED = 0xffff };
_Static_assert(sizeof(struct object) == 6 && PAGE_BYTES_MAX / 4 * 3 < OBJECT_FILLED, "metadata");

struct pool_header {
	char magic[8];
	uint32_t version, codec, page_bytes, slots;
	uint64_t pages;
	uint32_t checksum; /* of everything above */
};
_Static_assert(sizeof(struct pool_header) <= PAGE_BYTES_MIN && offsetof(struct pool_header, checksum) == 32, "format");

struct slot {
	uint32_t next, prev; /* in its list; 0: none */
	uint16_t used;
	uint16_t free;              /* ordinal of the first free object; NO_ORDINAL: none */
	uint16_t fresh;             /* from this one on, none was used yet; in `unpunched`: pages to punch */
	_Atomic uint8_t size_class; /* 0: the slot is not in use */
	uint8_t list;
};
_Static_assert(sizeof(struct slot) == 16, "metadata");

struct size_class {
	uint32_t stride;          /* bytes from one object to the next */
	uint16_t objects, pages;  /* of a slot */
	uint32_t lists[QUARTERS]; /* slots that have room, by how full they are */
	uint64_t free_objects;    /* of the slots in these lists */
};

struct pool {
	int fd;
	struct codec *codec;
	struct compressor *compressor;
	enum codec_kind codec_kind;
	bool locked, adopted;
	uint32_t page_bytes, step_bytes, packed_max;
	uint64_t pages, bytes;
	uint8_t *memory; /* the mapped file */
	_Atomic uint32_t *index;
	_Atomic uint8_t *directory;
	uint8_t *slots_memory;
	_Atomic uint64_t *reserved; /* bitmap: pages of index and directory that have space */
	uint64_t reserved_bytes;

	struct slot *slots; /* from 1 on */
	uint64_t slot_count;
	_Atomic uint32_t slots_high;    /* the highest number that was ever in use */
	uint32_t free_slots, unpunched; /* lists: not in use; empty, but the file system did not take the space */
	uint32_t class_count, compact_class;
	struct size_class classes[CLASSES_MAX + 1]; /* from 1 on */
	uint8_t class_of[CLASSES_MAX + 1];          /* by number of steps */
	_Atomic uint64_t capacity_bytes, used_bytes, meta_bytes, stored, filled, object_bytes;
};

struct pool_reader {
	const struct pool *pool;
	struct decompressor *decompressor;
};

/* counters have one writer; others look at them */
static void add(_Atomic uint64_t *counter, int64_t n)
{
	uint64_t now = atomic_load_explicit(counter, memory_order_relaxed);

	atomic_store_explicit(counter, now + (uint64_t)n, memory_order_relaxed);
}

static uint64_t round_up(uint64_t bytes, uint64_t unit)
{
	return (bytes + unit - 1) / unit * unit;
}

/* --- where things are --------------------------------------------------------------------------------------------------- */

static uint64_t slot_bytes(const struct pool *p)
{
	return (uint64_t)SLOT_PAGES * p->page_bytes;
}

static uint8_t *slot_memory(const struct pool *p, uint32_t slot)
{
	return p->slots_memory + slot * slot_bytes(p);
}

static uint64_t offset_of(const struct pool *p, const void *memory)
{
	return (uint64_t)((const uint8_t *)memory - p->memory);
}

static uint32_t entry_of(uint32_t slot, uint32_t ordinal)
{
	return slot << ORDINAL_BITS | ordinal;
}

static uint32_t slot_of(uint32_t entry)
{
	return entry >> ORDINAL_BITS;
}

static uint32_t ordinal_of(uint32_t entry)
{
	return entry & (OBJECTS_MAX - 1);
}

static struct size_class *class_of_slot(const struct pool *p, uint32_t slot)
{
	uint8_t number = atomic_load_explicit(&p->slots[slot].size_class, memory_order_relaxed);

	return number ? (struct size_class *)&p->classes[number] : NULL;
}

static struct object *object_at(const struct pool *p, uint32_t entry)
{
	uint32_t slot = slot_of(entry);

	return (struct object *)(slot_memory(p, slot) + ordinal_of(entry) * class_of_slot(p, slot)->stride);
}

static uint32_t data_bytes(const struct object *o)
{
	return o->bytes == OBJECT_FILLED ? sizeof(uint64_t) : o->bytes;
}

/* The object that an entry of the page refers to; NULL: that is damaged. */
static struct object *object_of(const struct pool *p, uint64_t page, uint32_t entry)
{
	const struct size_class *c;
	struct object *o;

	if (!slot_of(entry) || slot_of(entry) >= p->slot_count)
		return NULL;
	c = class_of_slot(p, slot_of(entry));
	if (!c || ordinal_of(entry) >= c->objects)
		return NULL;
	o = object_at(p, entry);
	if (o->page != page || o->bytes == OBJECT_FREE)
		return NULL;
	return sizeof(*o) + data_bytes(o) <= c->stride ? o : NULL;
}

/* --- index and directory ------------------------------------------------------------------------------------------------ */

/* the bit of `reserved` for what is at `memory` */
static uint64_t reserved_bit(const struct pool *p, const void *memory)
{
	return (offset_of(p, memory) - offset_of(p, (const void *)p->index)) / p->page_bytes;
}

static bool is_reserved(const struct pool *p, const void *memory)
{
	uint64_t bit = reserved_bit(p, memory);

	return atomic_load_explicit(&p->reserved[bit / WORD_BITS], memory_order_acquire) >> bit % WORD_BITS & 1;
}

static void set_reserved(struct pool *p, const void *memory)
{
	uint64_t bit = reserved_bit(p, memory);

	atomic_fetch_or_explicit(&p->reserved[bit / WORD_BITS], 1ull << bit % WORD_BITS, memory_order_release);
	add(&p->used_bytes, p->page_bytes);
	add(&p->meta_bytes, p->page_bytes);
}

static bool has_room(const struct pool *p, uint64_t bytes)
{
	uint64_t capacity = atomic_load_explicit(&p->capacity_bytes, memory_order_relaxed),
		 used = atomic_load_explicit(&p->used_bytes, memory_order_relaxed);

	return used <= capacity && bytes <= capacity - used;
}

static int reserve(const struct pool *p, void *memory, uint64_t bytes)
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

/* Space for the entry of the index or the directory at `memory`. */
static int reserve_entry(struct pool *p, const void *memory)
{
	uint64_t offset = offset_of(p, memory);
	int error;

	if (is_reserved(p, memory))
		return 0;
	if (!has_room(p, p->page_bytes))
		return -ENOSPC;
	error = reserve(p, p->memory + offset / p->page_bytes * p->page_bytes, p->page_bytes);
	if (!error)
		set_reserved(p, memory);
	return error;
}

static uint32_t index_load(const struct pool *p, uint64_t page)
{
	TIERD_YIELD();
	if (!is_reserved(p, (const void *)&p->index[page]))
		return 0;
	return atomic_load_explicit(&p->index[page], memory_order_acquire);
}

/* An object is complete before the entry refers to it, and left alone until it does not: a successor sees what was stored by the last
 * instruction that ran, so that it is the compiler that must keep to this order. */
static void index_store(struct pool *p, uint64_t page, uint32_t entry)
{
	TIERD_YIELD();
	atomic_store_explicit(&p->index[page], entry, memory_order_release);
	atomic_signal_fence(memory_order_seq_cst);
}

static void directory_store(struct pool *p, uint32_t slot, uint8_t number)
{
	atomic_store_explicit(&p->directory[slot], number, memory_order_release);
	atomic_signal_fence(memory_order_seq_cst);
}

/* --- slots -------------------------------------------------------------------------------------------------------------- */

static void list_push(struct pool *p, uint32_t *head, uint32_t slot)
{
	p->slots[slot].prev = 0;
	p->slots[slot].next = *head;
	if (*head)
		p->slots[*head].prev = slot;
	*head = slot;
}

static uint32_t list_pop(struct pool *p, uint32_t *head)
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
static void slot_detach(struct pool *p, struct size_class *c, uint32_t slot)
{
	struct slot *s = &p->slots[slot];

	if (s->list != UNLISTED)
		list_remove(p, &c->lists[s->list], slot);
	s->list = UNLISTED;
	c->free_objects -= c->objects - s->used;
}

static void slot_attach(struct pool *p, struct size_class *c, uint32_t slot)
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

static uint32_t emptiest(const struct size_class *c)
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
static int slot_punch(struct pool *p, uint32_t slot, uint16_t pages)
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
static int slot_drop(struct pool *p, uint32_t slot)
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
	uint32_t slot = has_room(p, bytes) ? slot_number_take(p) : 0;
	int error;

	if (!slot)
		return -ENOSPC;
	error = reserve_entry(p, (const void *)&p->directory[slot]);
	if (error) {
		list_push(p, &p->free_slots, slot);
		return error;
	}
	directory_store(p, slot, number); /* first: a successor finds whatever takes space */
	error = has_room(p, bytes) ? reserve(p, slot_memory(p, slot), bytes) : -ENOSPC;
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

static void object_put(struct pool *p, uint32_t entry)
{
	struct slot *s = &p->slots[slot_of(entry)];
	struct object *o = object_at(p, entry);

	*o = (struct object){.page = s->free, .bytes = OBJECT_FREE};
	s->free = (uint16_t)ordinal_of(entry);
}

static bool object_stored(const struct pool *p, uint32_t entry)
{
	const struct object *o = object_at(p, entry);

	return o->bytes != OBJECT_FREE && o->page < p->pages && index_load(p, o->page) == entry;
}

/* Finds out what is free in a detached slot. */
static void slot_scan(struct pool *p, uint32_t slot)
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
static int object_take(struct pool *p, struct size_class *c, uint32_t *entry)
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

static void count_object(struct pool *p, const struct object *o, int64_t n)
{
	add(&p->filled, o->bytes == OBJECT_FILLED ? n : 0);
	add(&p->object_bytes, n * data_bytes(o));
}

/* What an entry referred to that is not the page's any more. */
static void object_forget(struct pool *p, uint64_t page, uint32_t entry)
{
	const struct object *o = object_of(p, page, entry);

	if (o) {
		count_object(p, o, -1);
		object_give(p, entry);
	} else if (slot_of(entry) < p->slot_count && class_of_slot(p, slot_of(entry))) {
		slot_repair(p, slot_of(entry));
	}
}

/* --- pages -------------------------------------------------------------------------------------------------------------- */

static bool is_filled(const uint8_t *page, uint32_t bytes)
{
	return !memcmp(page, page + sizeof(uint64_t), bytes - sizeof(uint64_t));
}

/* What is to be stored of a page: `o` its header, *data its bytes. */
static int object_make(struct pool *p, const void *from, struct object *o, const void **data)
{
	int bytes;

	*data = from;
	o->bytes = OBJECT_FILLED;
	if (is_filled(from, p->page_bytes))
		return 0;
	bytes = compress(p->compressor, from, data);
	if (bytes < 0)
		return bytes;
	if ((uint32_t)bytes > p->packed_max)
		return -E2BIG;
	o->bytes = (uint16_t)bytes;
	return 0;
}

static struct size_class *class_of_object(struct pool *p, const struct object *o)
{
	return &p->classes[p->class_of[round_up(sizeof(*o) + data_bytes(o), p->step_bytes) / p->step_bytes]];
}

int pool_write(struct pool *p, uint64_t page, const void *from)
{
	struct object made = {.page = (uint32_t)page}, *o;
	uint32_t entry, before;
	const void *data;
	int error;

	if (page >= p->pages || !p->adopted)
		return -EINVAL;
	error = object_make(p, from, &made, &data);
	if (!error)
		error = reserve_entry(p, (const void *)&p->index[page]);
	if (!error)
		error = object_take(p, class_of_object(p, &made), &entry);
	if (error)
		return error;
	o = object_at(p, entry);
	*o = made;
	memcpy(o->data, data, data_bytes(o));
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

static void fill(void *to, uint32_t bytes, const void *word)
{
	for (uint32_t i = 0; i < bytes; i += sizeof(uint64_t))
		memcpy((uint8_t *)to + i, word, sizeof(uint64_t));
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
	if (o->bytes != OBJECT_FILLED)
		return decompress(r->decompressor, o->data, o->bytes, to, p->page_bytes);
	fill(to, p->page_bytes, o->data);
	return 0;
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
		return 0; /* damaged: pool_read says so */
	error = object_take(p, c, &to);
	if (error)
		return error;
	memcpy(object_at(p, to), o, sizeof(*o) + data_bytes(o));
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

/* --- adoption ----------------------------------------------------------------------------------------------------------- */

static void forget_all(struct pool *p)
{
	memset(p->slots, 0, (p->slots_high + 1) * sizeof(*p->slots));
	for (uint32_t i = 1; i <= p->class_count; i++) {
		memset(p->classes[i].lists, 0, sizeof(p->classes[i].lists));
		p->classes[i].free_objects = 0;
	}
	p->free_slots = p->unpunched = p->slots_high = 0;
	p->used_bytes = p->page_bytes + p->meta_bytes;
	p->stored = p->filled = p->object_bytes = 0;
}

static uint8_t directory_get(const struct pool *p, uint32_t slot)
{
	if (!is_reserved(p, (const void *)&p->directory[slot]))
		return 0;
	return atomic_load_explicit(&p->directory[slot], memory_order_relaxed);
}

/* The slots as the directory has them. */
static void directory_load(struct pool *p)
{
	for (uint32_t slot = 1; slot < p->slot_count; slot++) {
		uint8_t number = directory_get(p, slot);

		if (!number)
			continue;
		p->slots_high = slot;
		p->slots[slot].list = UNLISTED;
		if (number <= p->class_count)
			atomic_store_explicit(&p->slots[slot].size_class, number, memory_order_relaxed);
	}
}

/* -EBADMSG: no sound object is there. */
static int entry_adopt(struct pool *p, uint64_t page, uint32_t entry)
{
	uint32_t slot = slot_of(entry);
	const struct size_class *c = slot < p->slot_count ? class_of_slot(p, slot) : NULL;
	const struct object *o;
	int error = 0;

	if (!c)
		return -EBADMSG;
	/* brings it all into our page table, and if against all rules there is no space behind it, it must not be read */
	if (!p->slots[slot].used)
		error = reserve(p, slot_memory(p, slot), (uint64_t)c->pages * p->page_bytes);
	if (error)
		return error == -ENOSPC ? -EBADMSG : error;
	o = object_of(p, page, entry);
	if (!o)
		return -EBADMSG;
	p->slots[slot].used++;
	count_object(p, o, 1);
	add(&p->stored, 1);
	return 0;
}

static int index_adopt(struct pool *p, bool (*live)(void *arg, uint64_t page),
		       void (*damaged)(void *arg, uint64_t page), void *arg)
{
	for (uint64_t page = 0; page < p->pages; page++) {
		uint32_t entry = index_load(p, page);
		int error;

		if (!entry)
			continue;
		error = live(arg, page) ? entry_adopt(p, page, entry) : -ENOENT;
		if (error && error != -EBADMSG && error != -ENOENT)
			return error;
		if (error)
			index_store(p, page, 0);
		if (error == -EBADMSG)
			damaged(arg, page);
	}
	return 0;
}

static int slot_adopt(struct pool *p, uint32_t slot)
{
	struct size_class *c = class_of_slot(p, slot);
	uint16_t pages = c ? c->pages : SLOT_PAGES;

	if (!directory_get(p, slot)) {
		list_push(p, &p->free_slots, slot);
		return 0;
	}
	add(&p->used_bytes, (int64_t)pages * p->page_bytes);
	if (!c) /* a number that means nothing */
		return slot_punch(p, slot, pages);
	if (!p->slots[slot].used)
		return slot_drop(p, slot);
	slot_scan(p, slot);
	slot_attach(p, c, slot);
	return 0;
}

int pool_adopt(struct pool *p, bool (*live)(void *arg, uint64_t page), void (*damaged)(void *arg, uint64_t page),
	       void *arg)
{
	int error;

	forget_all(p);
	directory_load(p);
	error = index_adopt(p, live, damaged, arg);
	for (uint32_t slot = p->slots_high; slot && !error; slot--)
		error = slot_adopt(p, slot);
	p->adopted = !error;
	return error;
}

/* --- the pool ----------------------------------------------------------------------------------------------------------- */

/* How many pages of a slot leave the least of them unused; of equals the most, which are reserved at once. */
static void class_shape(struct size_class *c, uint32_t steps, uint32_t steps_a_page)
{
	c->pages = 0;
	for (uint32_t pages = 1; pages <= SLOT_PAGES; pages++) {
		uint32_t room = pages * steps_a_page, objects = room / steps;

		if (!objects || objects > OBJECTS_MAX)
			continue;
		if (c->pages && objects * c->pages < c->objects * pages)
			continue;
		c->pages = (uint16_t)pages;
		c->objects = (uint16_t)objects;
	}
}

/* Sizes of which a slot holds equally many are one class, the largest. */
static void classes_make(struct pool *p)
{
	uint32_t steps_a_page = p->page_bytes / p->step_bytes;

	for (uint32_t steps = (uint32_t)round_up(sizeof(struct object) + p->packed_max, p->step_bytes) / p->step_bytes;
	     steps; steps--) {
		struct size_class c = {.stride = steps * p->step_bytes}, *last = &p->classes[p->class_count];

		class_shape(&c, steps, steps_a_page);
		if (c.pages != last->pages || c.objects != last->objects)
			p->classes[++p->class_count] = c;
		p->class_of[steps] = (uint8_t)p->class_count;
	}
}

static int geometry(struct pool *p)
{
	uint64_t index = round_up(p->pages * sizeof(*p->index), p->page_bytes), directory;

	p->step_bytes = p->page_bytes / STEPS_MAX > STEP_BYTES_MIN ? p->page_bytes / STEPS_MAX : STEP_BYTES_MIN;
	p->packed_max = p->page_bytes / 4 * 3;
	p->slot_count = (p->pages < SLOTS_MAX ? p->pages : SLOTS_MAX) + 1;
	directory = round_up(p->slot_count, p->page_bytes);
	p->bytes = p->page_bytes + index + directory + p->slot_count * slot_bytes(p);
	p->reserved_bytes = round_up((index + directory) / p->page_bytes, WORD_BITS) / 8;
	classes_make(p);
	p->slots = sys_alloc_sparse(p->slot_count * sizeof(*p->slots));
	p->reserved = sys_alloc(p->reserved_bytes);
	return p->slots && p->reserved ? 0 : -ENOMEM;
}

static int map(struct pool *p)
{
	void *memory;
	int error = sys_pool_map(p->fd, p->bytes, &memory, &p->locked);

	if (error)
		return error;
	p->memory = memory;
	p->index = (void *)(p->memory + p->page_bytes);
	p->directory = (void *)(p->memory + p->page_bytes + round_up(p->pages * sizeof(*p->index), p->page_bytes));
	p->slots_memory = (uint8_t *)p->directory + round_up(p->slot_count, p->page_bytes);
	return 0;
}

static bool arguments_sane(uint32_t page_bytes, uint64_t pages)
{
	return page_bytes >= PAGE_BYTES_MIN && page_bytes <= PAGE_BYTES_MAX && !(page_bytes & (page_bytes - 1)) &&
	       page_bytes % sys_page_bytes() == 0 && pages && pages < UINT32_MAX;
}

/* All but what the file says. */
static int pool_make(int fd, uint32_t page_bytes, uint64_t pages, enum codec_kind codec, int level, struct pool **ret)
{
	struct pool *p = sys_alloc(sizeof(*p));
	int error;

	if (!p)
		return -ENOMEM;
	p->fd = fd;
	p->page_bytes = page_bytes;
	p->pages = pages;
	p->codec_kind = codec;
	atomic_store(&p->capacity_bytes, UINT64_MAX);
	atomic_store(&p->used_bytes, page_bytes);
	error = codec_open(codec, level, &p->codec);
	if (!error)
		error = compressor_create(p->codec, page_bytes, &p->compressor);
	if (!error)
		error = geometry(p);
	if (error)
		pool_close(p);
	else
		*ret = p;
	return error;
}

static void header_make(const struct pool *p, struct pool_header *h)
{
	*h = (struct pool_header){.version = POOL_VERSION,
				  .codec = p->codec_kind,
				  .page_bytes = p->page_bytes,
				  .slots = (uint32_t)p->slot_count,
				  .pages = p->pages};
	memcpy(h->magic, MAGIC, sizeof(MAGIC));
	h->checksum = checksum(h, offsetof(struct pool_header, checksum));
}

static int file_make(struct pool *p)
{
	int error = sys_pool_resize(p->fd, p->bytes);

	if (!error)
		error = map(p);
	if (!error)
		error = reserve(p, p->memory, p->page_bytes);
	if (!error)
		header_make(p, (struct pool_header *)p->memory);
	p->adopted = !error;
	return error;
}

int pool_create(int fd, uint32_t page_bytes, uint64_t pages, enum codec_kind codec, int level, struct pool **ret)
{
	int64_t bytes = sys_pool_bytes(fd);
	struct pool *p;
	int error;

	if (bytes < 0)
		return (int)bytes;
	if (bytes || !arguments_sane(page_bytes, pages))
		return -EINVAL;
	error = pool_make(fd, page_bytes, pages, codec, level, &p);
	if (error)
		return error;
	error = file_make(p);
	if (!error) {
		*ret = p;
		return 0;
	}
	pool_close(p);
	sys_pool_resize(fd, 0); /* what fails here leaves what pool_open refuses */
	return error;
}

static int header_check(const struct pool_header *h, uint32_t page_bytes, uint64_t pages)
{
	if (memcmp(h->magic, MAGIC, sizeof(MAGIC)))
		return -EBADMSG;
	if (h->version != POOL_VERSION)
		return -EPROTONOSUPPORT;
	if (h->checksum != checksum(h, offsetof(struct pool_header, checksum)))
		return -EBADMSG;
	return h->page_bytes == page_bytes && h->pages == pages ? 0 : -ESTALE;
}

/* Which pages of index and directory have space: those that were touched, in whole. */
static int reserved_load(struct pool *p)
{
	uint64_t at = p->page_bytes, all = offset_of(p, p->slots_memory), start, end;
	int error;

	while (at < all && !(error = sys_pool_data(p->fd, at, &start, &end))) {
		end = end < all ? end : all;
		for (at = round_up(start, p->page_bytes); at + p->page_bytes <= end; at += p->page_bytes)
			set_reserved(p, p->memory + at);
		at = end;
	}
	return at < all && error != -ENXIO ? error : 0;
}

static int file_load(struct pool *p, uint32_t slots)
{
	int64_t bytes = sys_pool_bytes(p->fd);
	int error;

	if (bytes < 0)
		return (int)bytes;
	if ((uint64_t)bytes != p->bytes || slots != p->slot_count)
		return -EBADMSG;
	error = map(p);
	return error ? error : reserved_load(p);
}

int pool_open(int fd, uint32_t page_bytes, uint64_t pages, int level, struct pool **ret)
{
	struct pool_header h;
	ssize_t n = sys_pool_read(fd, &h, sizeof(h), 0);
	struct pool *p;
	int error;

	if (n < 0)
		return (int)n;
	if (!arguments_sane(page_bytes, pages))
		return -EINVAL;
	error = n == sizeof(h) ? header_check(&h, page_bytes, pages) : -EBADMSG;
	if (!error)
		error = pool_make(fd, page_bytes, pages, h.codec, level, &p);
	if (error)
		return error;
	error = file_load(p, h.slots);
	if (error)
		pool_close(p);
	else
		*ret = p;
	return error;
}

void pool_close(struct pool *p)
{
	if (!p)
		return;
	if (p->memory)
		sys_pool_unmap(p->memory, p->bytes);
	if (p->slots)
		sys_free(p->slots, p->slot_count * sizeof(*p->slots));
	if (p->reserved)
		sys_free((void *)p->reserved, p->reserved_bytes);
	compressor_destroy(p->compressor);
	codec_close(p->codec);
	sys_free(p, sizeof(*p));
}

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
		.filled_pages = p->filled,
		.object_bytes = p->object_bytes,
		.used_bytes = p->used_bytes,
		.metadata_bytes = p->page_bytes + p->meta_bytes + p->stored * sizeof(struct object) +
				  p->slots_high * sizeof(struct slot) + p->reserved_bytes + sizeof(*p),
		.capacity_bytes = p->capacity_bytes,
		.locked = p->locked,
	};
}
