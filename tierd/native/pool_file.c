/* SPDX-License-Identifier: Apache-2.0 */
/* pool_file.c: a pool's file: made, opened, adopted. */
#include <string.h>

#include "pool_inside.h"

static const char MAGIC[8] = "tierpool";

struct pool_header {
	char magic[8];
	uint32_t version, codec, page_bytes, slots;
	uint64_t pages;
	uint32_t checksum; /* of everything above */
};
_Static_assert(sizeof(struct pool_header) <= PAGE_BYTES_MIN && offsetof(struct pool_header, checksum) == 32, "format");

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
	p->stored = p->object_bytes = 0;
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
		error = reserve_space(p, slot_memory(p, slot), (uint64_t)c->pages * p->page_bytes);
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
		error = reserve_space(p, p->memory, p->page_bytes);
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

	while (at < all) {
		int error = sys_pool_data(p->fd, at, &start, &end);

		if (error)
			return error == -ENXIO ? 0 : error;
		end = end < all ? end : all;
		for (at = round_up(start, p->page_bytes); at + p->page_bytes <= end; at += p->page_bytes)
			set_reserved(p, p->memory + at);
		at = end > at ? end : at;
	}
	return 0;
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
