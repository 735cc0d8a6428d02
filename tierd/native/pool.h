/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.h: a guest's compressed memory: pages by number, in one sparse file on tmpfs that outlives the process.
 *
 * One pool a guest, and nothing in it is shared with another. One thread, the guest's worker, calls what changes it (write, free,
 * adopt, compact, set_capacity). Any number of threads read at the same time, each with a reader of its own.
 *
 * There is no lock. It is the caller's page table that keeps them apart: whoever reads a page's object, or has it written or
 * freed, owns the page. pool_compact moves objects of pages that nobody else owns, and asks for each.
 *
 * Writing, freeing and compacting may make system calls (space is reserved and given back) and never wait for anything. Reading makes
 * none, allocates nothing and takes no lock.
 *
 * A SIGKILL at any instruction leaves every page that was written and not freed: pool_open and pool_adopt find it. The order is:
 * pool_write, then the page's word says that it is here; and the word says that it is not, then pool_free.
 *
 * Functions return 0 or -errno.
 */
#ifndef TIERD_POOL_H
#define TIERD_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "codec.h"

struct pool;
struct pool_reader;

/* The one number in a file that says how it is laid out. */
enum { POOL_VERSION = 2 };

/*
 * An empty pool for page numbers below `pages`, in an empty file that is the caller's and stays open. A page is the system's: 4 to 64 KiB.
 * -EINVAL: another size, a file that is not empty, a number of pages that is 0 or too large, no such codec or level; -ELIBACC or
 * -ELIBBAD: codec_library(codec) is not installed or not usable; -ENOSPC, -ENOMEM. A file that could not be made is left empty.
 */
int pool_create(int fd, uint32_t page_bytes, uint64_t pages, enum codec_kind codec, int level, struct pool **ret);

/*
 * The pool that is in a file. Only pool_has, pool_codec and pool_counters before pool_adopt. Changes nothing.
 * -EBADMSG: not a pool's file, or a damaged one; -EPROTONOSUPPORT: of another version; -ESTALE: of a guest of other pages; -ELIBACC, ...
 */
int pool_open(int fd, uint32_t page_bytes, uint64_t pages, int level, struct pool **ret);
void pool_close(struct pool *pool); /* after its readers; the file keeps what it holds */
enum codec_kind pool_codec(const struct pool *pool);

/*
 * Once after pool_open: makes of the file a pool that can be written to. Asks `live` about every page that has an object; what the
 * file holds for a page that is not live, and what no page refers to, is free afterwards. Tells `damaged` of every live page whose
 * object cannot be found; it has none then. (An object is not decompressed here: pool_read does, and says -EBADMSG.)
 * -ENOMEM, -EIO: call again or give up, nothing that is live was lost.
 */
int pool_adopt(struct pool *pool, bool (*live)(void *arg, uint64_t page), void (*damaged)(void *arg, uint64_t page),
	       void *arg);

/*
 * Stores a page, in place of what was stored of it. Until this returns 0, and when it fails, the page's former object is still there.
 * -E2BIG: it does not compress to three quarters of a page; -ENOSPC: the capacity is reached or the file system is full;
 * -ENOMEM: the memory cgroup is at its limit; -EIO: the codec failed; -EINVAL: no such page, not adopted yet.
 */
int pool_write(struct pool *pool, uint64_t page, const void *from);

/* Forgets a page; nothing when there is none. */
void pool_free(struct pool *pool, uint64_t page);

/* Whether the page has an object. By any thread; the answer is worth something to who owns the page. */
bool pool_has(const struct pool *pool, uint64_t page);

int pool_reader_create(const struct pool *pool, struct pool_reader **ret); /* -ENOMEM */
void pool_reader_destroy(struct pool_reader *r);
/* By a thread that owns the page. -ENOENT: it has no object; -EBADMSG: it is damaged, and `to` holds anything. */
int pool_read(struct pool_reader *r, uint64_t page, void *to);

/*
 * Moves objects together, so that whole slots become empty and go back to the file system. `own` takes a page or says no (it is
 * passed over then), `disown` gives it back. Asks for `pages_max` pages at most, and goes on where it stopped when called again; *moved is set
 * also on errors. Nothing to do is *moved == 0, which a pool all of whose pages are others' says, too.
 */
int pool_compact(struct pool *pool, uint32_t pages_max, bool (*own)(void *arg, uint64_t page),
		 void (*disown)(void *arg, uint64_t page), void *arg, uint32_t *moved);

/* Of the file, all of it; UINT64_MAX (as it is made): the file system is the limit. A pool that has more keeps it. */
void pool_set_capacity(struct pool *pool, uint64_t bytes);

struct pool_counters {
	uint64_t pages;          /* stored */
	uint64_t object_bytes;   /* what the pages were compressed to */
	uint64_t used_bytes;     /* of the file: objects, their waste, index, header */
	uint64_t metadata_bytes; /* of the file and of this process: all that is neither object nor waste */
	uint64_t capacity_bytes;
	bool locked; /* the host does not swap the pool out */
};
/* By any thread, also while the pool changes: each number is right for itself. */
void pool_counters(const struct pool *pool, struct pool_counters *ret);

#endif
