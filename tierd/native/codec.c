/* SPDX-License-Identifier: Apache-2.0 */
/* codec.c: see codec.h. The libraries' functions are declared here, so that building takes no headers of theirs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "codec.h"
#include "sys.h"

struct lz4 { /* lz4.h, stable since 1.7.3 */
	int (*state_bytes)(void);
	int (*bound)(int bytes);
	int (*compress)(void *state, const char *from, char *to, int bytes, int to_bytes, int acceleration);
	int (*decompress)(const char *from, char *to, int bytes, int to_bytes);
};

struct zstd { /* zstd.h, stable since 1.0.0; *level: 1.4.0 */
	unsigned int (*is_error)(size_t result);
	size_t (*bound)(size_t bytes);
	int (*min_level)(void);
	int (*max_level)(void);
	void *(*create_compressor)(void);
	size_t (*free_compressor)(void *context);
	size_t (*compress)(void *context, void *to, size_t to_bytes, const void *from, size_t bytes, int level);
	void *(*create_decompressor)(void);
	size_t (*free_decompressor)(void *context);
	size_t (*decompress)(void *context, void *to, size_t to_bytes, const void *from, size_t bytes);
};

struct codec {
	enum codec_kind kind;
	int level;
	void *library;
	struct lz4 lz4;
	struct zstd zstd;
};

struct compressor {
	const struct codec *codec;
	void *context;
	uint8_t *out;
	size_t context_bytes; /* of LZ4's, which is memory of ours */
	uint32_t bytes, out_bytes;
};

struct decompressor {
	const struct codec *codec;
	void *context; /* NULL: LZ4 needs none */
};

const char *codec_library(enum codec_kind kind)
{
	switch (kind) {
	case CODEC_LZ4:
		return "liblz4.so.1";
	case CODEC_ZSTD:
		return "libzstd.so.1";
	default:
		return NULL;
	}
}

struct symbol {
	const char *name;
	size_t at; /* of the pointer in struct codec */
};

#define LZ4(field)  offsetof(struct codec, lz4.field)
#define ZSTD(field) offsetof(struct codec, zstd.field)

static const struct symbol LZ4_SYMBOLS[] = {
	{"LZ4_sizeofState", LZ4(state_bytes)},
	{"LZ4_compressBound", LZ4(bound)},
	{"LZ4_compress_fast_extState", LZ4(compress)},
	{"LZ4_decompress_safe", LZ4(decompress)},
	{0},
};

static const struct symbol ZSTD_SYMBOLS[] = {
	{"ZSTD_isError", ZSTD(is_error)},
	{"ZSTD_compressBound", ZSTD(bound)},
	{"ZSTD_minCLevel", ZSTD(min_level)},
	{"ZSTD_maxCLevel", ZSTD(max_level)},
	{"ZSTD_createCCtx", ZSTD(create_compressor)},
	{"ZSTD_freeCCtx", ZSTD(free_compressor)},
	{"ZSTD_compressCCtx", ZSTD(compress)},
	{"ZSTD_createDCtx", ZSTD(create_decompressor)},
	{"ZSTD_freeDCtx", ZSTD(free_decompressor)},
	{"ZSTD_decompressDCtx", ZSTD(decompress)},
	{0},
};

static int resolve(struct codec *c, const struct symbol *symbols)
{
	for (; symbols->name; symbols++) {
		void *function = dlsym(c->library, symbols->name);

		if (!function)
			return -ELIBBAD;
		memcpy((char *)c + symbols->at, &function, sizeof(function));
	}
	return 0;
}

static bool level_valid(const struct codec *c)
{
	if (c->kind == CODEC_LZ4)
		return c->level >= 0;
	return c->level >= c->zstd.min_level() && c->level <= c->zstd.max_level();
}

int codec_open(enum codec_kind kind, int level, struct codec **ret)
{
	const char *name = codec_library(kind);
	struct codec *c;
	int error;

	if (!name)
		return -EINVAL;
	c = calloc(1, sizeof(*c));
	if (!c)
		return -ENOMEM;
	c->kind = kind;
	c->level = level;
	c->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
	error = c->library ? resolve(c, kind == CODEC_LZ4 ? LZ4_SYMBOLS : ZSTD_SYMBOLS) : -ELIBACC;
	if (!error && !level_valid(c))
		error = -EINVAL;
	if (error)
		codec_close(c);
	else
		*ret = c;
	return error;
}

void codec_close(struct codec *c)
{
	if (!c)
		return;
	if (c->library)
		dlclose(c->library);
	free(c);
}

/* --- compressing -------------------------------------------------------------------------------------------------------- */

static int context_create(struct compressor *z)
{
	const struct codec *c = z->codec;
	const void *out;

	if (c->kind == CODEC_LZ4) {
		z->context_bytes = (size_t)c->lz4.state_bytes();
		z->context = sys_alloc(z->context_bytes);
		return z->context ? 0 : -ENOMEM;
	}
	z->context = c->zstd.create_compressor();
	if (!z->context)
		return -ENOMEM;
	memset(z->out, 0, z->bytes); /* Zstandard takes its memory at the first piece */
	return compress(z, z->out, z->bytes, &out) < 0 ? -ENOMEM : 0;
}

int compressor_create(const struct codec *c, uint32_t bytes, struct compressor **ret)
{
	size_t bound = c->kind == CODEC_LZ4 ? (size_t)c->lz4.bound((int)bytes) : c->zstd.bound(bytes);
	struct compressor *z;
	int error = -ENOMEM;

	if (bytes > INT_MAX || !bound)
		return -EINVAL;
	z = calloc(1, sizeof(*z));
	if (!z)
		return -ENOMEM;
	z->codec = c;
	z->bytes = bytes;
	z->out_bytes = (uint32_t)bound;
	z->out = sys_alloc(bound);
	if (z->out)
		error = context_create(z);
	if (error)
		compressor_destroy(z);
	else
		*ret = z;
	return error;
}

void compressor_destroy(struct compressor *z)
{
	if (!z)
		return;
	if (z->context && z->codec->kind == CODEC_LZ4)
		sys_free(z->context, z->context_bytes);
	else if (z->context)
		z->codec->zstd.free_compressor(z->context);
	if (z->out)
		sys_free(z->out, z->out_bytes);
	free(z);
}

int compress(struct compressor *z, const void *from, uint32_t bytes, const void **out)
{
	const struct codec *c = z->codec;
	size_t n;

	*out = z->out;
	if (bytes > z->bytes)
		return -EINVAL;
	if (c->kind == CODEC_LZ4) {
		int done = c->lz4.compress(z->context, from, (char *)z->out, (int)bytes, (int)z->out_bytes, c->level);

		return done > 0 ? done : -EIO;
	}
	n = c->zstd.compress(z->context, z->out, z->out_bytes, from, bytes, c->level);
	return c->zstd.is_error(n) ? -EIO : (int)n;
}

/* --- decompressing ------------------------------------------------------------------------------------------------------ */

int decompressor_create(const struct codec *c, struct decompressor **ret)
{
	struct decompressor *d = calloc(1, sizeof(*d));

	if (!d)
		return -ENOMEM;
	d->codec = c;
	if (c->kind == CODEC_ZSTD) {
		d->context = c->zstd.create_decompressor();
		if (!d->context) {
			free(d);
			return -ENOMEM;
		}
	}
	*ret = d;
	return 0;
}

void decompressor_destroy(struct decompressor *d)
{
	if (!d)
		return;
	if (d->context)
		d->codec->zstd.free_decompressor(d->context);
	free(d);
}

int decompress(struct decompressor *d, const void *from, uint32_t bytes, void *to, uint32_t to_bytes)
{
	const struct codec *c = d->codec;

	if (c->kind == CODEC_LZ4)
		return c->lz4.decompress(from, to, (int)bytes, (int)to_bytes) == (int)to_bytes ? 0 : -EBADMSG;
	return c->zstd.decompress(d->context, to, to_bytes, from, bytes) == to_bytes ? 0 : -EBADMSG;
}
