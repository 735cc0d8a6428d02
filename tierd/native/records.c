/* SPDX-License-Identifier: Apache-2.0 */
/*
 * records.c: what a run of pages becomes on its way to a store that Python asks: compressed (records.py), sealed (seal.py), laid out
 * as a segment (segments.py), each in one call for all of the run. Page by page, Python would hold the interpreter's lock for it, and
 * faults wait for that lock.
 *
 * Records lie one behind the other in a buffer: record i from bounds[i] to bounds[i + 1]. Nothing here blocks, and nothing is kept.
 */
#include <stdlib.h>
#include <string.h>

#include "codec.h"
#include "crypto.h"
#include "internal.h"

/* --- compressing --- */

struct tierd_packer {
	struct codec *codec;
	struct compressor *compressor;
};

int tierd_packer_create(uint32_t bytes_max, int32_t level, struct tierd_packer **packer)
{
	struct tierd_packer *p = calloc(1, sizeof(*p));
	int error;

	if (!p)
		return -ENOMEM;
	error = codec_open(CODEC_ZSTD, level, &p->codec);
	if (!error)
		error = compressor_create(p->codec, bytes_max, &p->compressor);
	if (error)
		tierd_packer_destroy(p);
	else
		*packer = p;
	return error;
}

void tierd_packer_destroy(struct tierd_packer *p)
{
	compressor_destroy(p->compressor);
	codec_close(p->codec);
	free(p);
}

int tierd_pack(struct tierd_packer *p, const void *from, const uint32_t *bounds, uint32_t count, void *to,
	       uint32_t *to_bounds)
{
	uint8_t *out = to;

	for (uint32_t i = 0; i < count; i++) {
		const uint8_t *page = (const uint8_t *)from + bounds[i];
		uint32_t bytes = bounds[i + 1] - bounds[i];
		const void *frame;
		int frame_bytes = compress(p->compressor, page, bytes, &frame);

		if (frame_bytes < 0)
			return frame_bytes;
		to_bounds[i] = (uint32_t)(out - (uint8_t *)to);
		/* what saves less than a sixteenth is not worth the time when it is read */
		if ((uint64_t)frame_bytes * 16 <= (uint64_t)bytes * 15) {
			*out++ = TIERD_ZSTD;
			memcpy(out, frame, (size_t)frame_bytes);
			out += frame_bytes;
		} else {
			*out++ = TIERD_AS_IT_IS;
			memcpy(out, page, bytes);
			out += bytes;
		}
	}
	to_bounds[count] = (uint32_t)(out - (uint8_t *)to);
	return 0;
}

/* --- sealing: AES-256-GCM --- */

enum { GET_TAG = 0x10 }; /* EVP_CTRL_AEAD_GET_TAG */

static bool seal_one(const struct crypto *l, void *context, uint64_t nonce, uint64_t page, const uint8_t *from,
		     int bytes, uint8_t *to)
{
	uint8_t iv[12] = {0};
	int done, rest;

	memcpy(iv, &nonce, sizeof(nonce));
	return l->init(context, NULL, NULL, NULL, iv, -1) == 1 &&
	       l->update(context, NULL, &done, (const uint8_t *)&page, sizeof(page)) == 1 &&
	       l->update(context, to, &done, from, bytes) == 1 && done == bytes &&
	       l->final(context, to + done, &rest) == 1 && !rest &&
	       l->control(context, GET_TAG, TIERD_TAG_BYTES, to + done) == 1;
}

int tierd_seal(const void *key, const uint64_t *nonces, uint64_t first_page, const void *from, const uint32_t *bounds,
	       uint32_t count, void *to, uint32_t *to_bounds)
{
	const struct crypto *l = crypto_open();
	uint8_t *out = to;
	void *context;
	int error = 0;

	if (!l)
		return -ELIBACC;
	context = l->context_new();
	if (!context)
		return -ENOMEM;
	if (l->init(context, l->aes_256_gcm(), NULL, key, NULL, 1) != 1)
		error = -EIO;
	for (uint32_t i = 0; i < count && !error; i++) {
		uint32_t bytes = bounds[i + 1] - bounds[i];

		to_bounds[i] = (uint32_t)(out - (uint8_t *)to);
		if (seal_one(l, context, nonces[i], first_page + i, (const uint8_t *)from + bounds[i], (int)bytes, out))
			out += bytes + TIERD_TAG_BYTES;
		else
			error = -EIO;
	}
	to_bounds[count] = (uint32_t)(out - (uint8_t *)to);
	l->context_free(context);
	return error;
}

/* --- a segment --- */

struct record_header { /* segments.py, _HEADER */
	uint32_t checksum, page, generation, bytes;
};
_Static_assert(sizeof(struct record_header) == TIERD_HEADER_BYTES, "for Python");

/* Of a header with `seed` in place of its checksum, and what follows it. */
static uint32_t record_checksum(uint32_t seed, struct record_header h, const uint8_t *record, uint32_t length)
{
	_Alignas(uint64_t) uint32_t parts[] = {seed, h.page, h.generation, h.bytes,
					       checksum(record + sizeof(h), length - sizeof(h))};

	return checksum(parts, sizeof(parts));
}

uint64_t tierd_segment(uint32_t seed, const uint32_t *pages, const uint32_t *generations, const void *from,
		       const uint32_t *bounds, uint32_t count, void *to, uint32_t *to_bounds)
{
	uint32_t *row;
	uint8_t *out = to;

	for (uint32_t i = 0; i < count; i++) {
		struct record_header h = {
			.page = pages[i], .generation = generations[i], .bytes = bounds[i + 1] - bounds[i]};
		uint32_t bytes = sizeof(h) + h.bytes, length = (bytes + TIERD_UNIT_BYTES - 1) & -TIERD_UNIT_BYTES;

		memcpy(out + sizeof(h), (const uint8_t *)from + bounds[i], h.bytes);
		memset(out + bytes, 0, length - bytes);
		h.checksum = record_checksum(seed, h, out, length);
		memcpy(out, &h, sizeof(h));
		to_bounds[i] = (uint32_t)(out - (uint8_t *)to);
		out += length;
	}
	to_bounds[count] = (uint32_t)(out - (uint8_t *)to);
	row = (uint32_t *)out;
	for (uint32_t i = 0; i < count; i++, row += TIERD_ROW_BYTES / sizeof(*row)) {
		row[0] = pages[i];
		row[1] = generations[i];
		row[2] = to_bounds[i];
		row[3] = to_bounds[i + 1] - to_bounds[i];
	}
	return (uint64_t)((uint8_t *)row - (uint8_t *)to);
}

int64_t tierd_segment_record(uint32_t seed, const void *record, uint32_t length)
{
	struct record_header h;

	if (length < sizeof(h) || length % TIERD_UNIT_BYTES)
		return -EBADMSG;
	memcpy(&h, record, sizeof(h));
	if (h.bytes > length - sizeof(h) || h.checksum != record_checksum(seed, h, record, length))
		return -EBADMSG;
	return h.bytes;
}
