/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool_inside.h: what the files of the pool share: pool.c (pages), pool_slots.c (space for them), pool_file.c (making, opening and
 * adopting). And how the file is laid out.
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
#ifndef TIERD_POOL_INSIDE_H
#define TIERD_POOL_INSIDE_H

#include "internal.h"
#include "pool.h"

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
	uint16_t bytes; /* of data; or OBJECT_FREE */
	uint8_t data[];
} __attribute__((packed, aligned(2)));
enum { OBJECT_FREE = 0 };
_Static_assert(sizeof(struct object) == 6 && PAGE_BYTES_MAX / 4 * 3 <= UINT16_MAX, "metadata");

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

/* All of it is in mappings of the guest's own, the index and the slots in its pool's file: no cache line is shared with another guest. */
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
	_Atomic uint64_t capacity_bytes, used_bytes, meta_bytes, stored, object_bytes;
};

/* counters have one writer; others look at them */
static inline void add(_Atomic uint64_t *counter, int64_t n)
{
	uint64_t now = atomic_load_explicit(counter, memory_order_relaxed);

	atomic_store_explicit(counter, now + (uint64_t)n, memory_order_relaxed);
}

static inline uint64_t round_up(uint64_t bytes, uint64_t unit)
{
	return (bytes + unit - 1) / unit * unit;
}

/* --- where things are --------------------------------------------------------------------------------------------------- */

static inline uint64_t slot_bytes(const struct pool *p)
{
	return (uint64_t)SLOT_PAGES * p->page_bytes;
}

static inline uint8_t *slot_memory(const struct pool *p, uint32_t slot)
{
	return p->slots_memory + slot * slot_bytes(p);
}

static inline uint64_t offset_of(const struct pool *p, const void *memory)
{
	return (uint64_t)((const uint8_t *)memory - p->memory);
}

static inline uint32_t entry_of(uint32_t slot, uint32_t ordinal)
{
	return slot << ORDINAL_BITS | ordinal;
}

static inline uint32_t slot_of(uint32_t entry)
{
	return entry >> ORDINAL_BITS;
}

static inline uint32_t ordinal_of(uint32_t entry)
{
	return entry & (OBJECTS_MAX - 1);
}

static inline struct size_class *class_of_slot(const struct pool *p, uint32_t slot)
{
	uint8_t number = atomic_load_explicit(&p->slots[slot].size_class, memory_order_relaxed);

	return number ? (struct size_class *)&p->classes[number] : NULL;
}

static inline struct object *object_at(const struct pool *p, uint32_t entry)
{
	uint32_t slot = slot_of(entry);

	return (struct object *)(slot_memory(p, slot) + ordinal_of(entry) * class_of_slot(p, slot)->stride);
}

/* The object that an entry of the page refers to; NULL: that is damaged. */
static inline struct object *object_of(const struct pool *p, uint64_t page, uint32_t entry)
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
	return sizeof(*o) + o->bytes <= c->stride ? o : NULL;
}

/* the bit of `reserved` for what is at `memory` */
static inline uint64_t reserved_bit(const struct pool *p, const void *memory)
{
	return (offset_of(p, memory) - offset_of(p, (const void *)p->index)) / p->page_bytes;
}

static inline bool is_reserved(const struct pool *p, const void *memory)
{
	uint64_t bit = reserved_bit(p, memory);

	return atomic_load_explicit(&p->reserved[bit / WORD_BITS], memory_order_acquire) >> bit % WORD_BITS & 1;
}

static inline uint32_t index_load(const struct pool *p, uint64_t page)
{
	TIERD_YIELD();
	if (!is_reserved(p, (const void *)&p->index[page]))
		return 0;
	return atomic_load_explicit(&p->index[page], memory_order_acquire);
}

/* An object is complete before the entry refers to it, and left alone until it does not: a successor sees what was stored by the last
 * instruction that ran, so that it is the compiler that must keep to this order. */
static inline void index_store(struct pool *p, uint64_t page, uint32_t entry)
{
	TIERD_YIELD();
	atomic_store_explicit(&p->index[page], entry, memory_order_release);
	atomic_signal_fence(memory_order_seq_cst);
}

static inline void directory_store(struct pool *p, uint32_t slot, uint8_t number)
{
	atomic_store_explicit(&p->directory[slot], number, memory_order_release);
	atomic_signal_fence(memory_order_seq_cst);
}

/* pool_slots.c: the worker's. A slot that is attached has its room in its class's lists; while it is detached, nothing is put there. */
void set_reserved(struct pool *p, const void *memory);
bool pool_has_room(const struct pool *p, uint64_t bytes); /* below the capacity */
int reserve_space(const struct pool *p, void *memory, uint64_t bytes);
/* Space for the entry of the index or the directory at `memory`. -ENOSPC, -ENOMEM */
int reserve_entry(struct pool *p, const void *memory);
void list_push(struct pool *p, uint32_t *head, uint32_t slot);
uint32_t list_pop(struct pool *p, uint32_t *head); /* 0: empty */
void slot_detach(struct pool *p, struct size_class *c, uint32_t slot);
void slot_attach(struct pool *p, struct size_class *c, uint32_t slot);
uint32_t emptiest(const struct size_class *c); /* about; 0: none has room */
/* The first pages of a slot that nothing refers to, and that no list has; drop: all that its class uses. */
int slot_punch(struct pool *p, uint32_t slot, uint16_t pages);
int slot_drop(struct pool *p, uint32_t slot);
void slot_scan(struct pool *p, uint32_t slot); /* finds out what is free in it; of a detached one */
/* An object that nobody uses, and that is nobody's until an entry refers to it. -ENOSPC, -ENOMEM */
int object_take(struct pool *p, struct size_class *c, uint32_t *entry);
void object_put(struct pool *p, uint32_t entry);          /* makes it a free one of its slot; the caller counts */
bool object_stored(const struct pool *p, uint32_t entry); /* an entry of the index refers to it */
void object_forget(struct pool *p, uint64_t page, uint32_t entry); /* what the page's entry referred to before */
void count_object(struct pool *p, const struct object *o, int64_t n);

#endif
