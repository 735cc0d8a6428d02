/* SPDX-License-Identifier: Apache-2.0 */
/*
 * codec.h: LZ4 and Zstandard from the system's shared libraries, found when they are first wanted.
 *
 * A codec may be used by any number of threads; a compressor and a decompressor by one at a time. All memory is taken when they
 * are made: compressing and decompressing allocate nothing, take no lock and make no system call.
 */
#ifndef TIERD_CODEC_H
#define TIERD_CODEC_H

#include <stddef.h>
#include <stdint.h>

enum codec_kind { CODEC_LZ4 = 1, CODEC_ZSTD = 2 }; /* stands in files */

struct codec;
struct compressor;
struct decompressor;

/* The shared library's name, for messages; NULL: no such codec. */
const char *codec_library(enum codec_kind kind);
/* `level`: of LZ4 the acceleration, of Zstandard the compression level; 1 is each one's quick setting, 0 its default. -EINVAL: no such
 * codec or level; -ELIBACC: the library is not installed; -ELIBBAD: it is, and lacks a function. */
int codec_open(enum codec_kind kind, int level, struct codec **ret);
void codec_close(struct codec *c); /* after all that was made of it */

/* For pieces of at most `bytes`. -ENOMEM */
int compressor_create(const struct codec *c, uint32_t bytes, struct compressor **ret);
void compressor_destroy(struct compressor *z);
/* The number of compressed bytes, which are at *out until the next call. -EIO: the library failed; -EINVAL: the piece is longer than
 * was said. */
int compress(struct compressor *z, const void *from, uint32_t bytes, const void **out);

int decompressor_create(const struct codec *c, struct decompressor **ret); /* -ENOMEM */
void decompressor_destroy(struct decompressor *d);
/* -EBADMSG: these are not `to_bytes` bytes compressed; `to` holds anything then, and nothing beyond it was written. */
int decompress(struct decompressor *d, const void *from, uint32_t bytes, void *to, uint32_t to_bytes);

#endif
