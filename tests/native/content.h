/* SPDX-License-Identifier: Apache-2.0 */
/* content.h: what a page of a guest holds, in the model and in memory: a value and what follows from it. */
#ifndef TIERD_CONTENT_H
#define TIERD_CONTENT_H

#include <stdbool.h>
#include <stdint.h>

static const uint64_t ONE_WORD = 1ull << 63;

/* A page of this value is that word again and again; others begin with it. */
static inline bool is_one_word(uint64_t value)
{
	return !value || value & ONE_WORD;
}

#endif
