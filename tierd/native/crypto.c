/* SPDX-License-Identifier: Apache-2.0 */
/* crypto.c: see crypto.h. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "crypto.h"
#include "sys.h"

static struct crypto crypto;
static bool complete;

static void *symbol(void *library, const char *name)
{
	void *function = dlsym(library, name);

	complete &= function != NULL;
	return function;
}

static void open_once(void)
{
	void *library = dlopen("libcrypto.so.3", RTLD_NOW | RTLD_LOCAL);

	if (!library)
		library = dlopen("libcrypto.so.1.1", RTLD_NOW | RTLD_LOCAL);
	if (!library)
		return;
	complete = true;
	crypto.aes_256_gcm = symbol(library, "EVP_aes_256_gcm");
	crypto.aes_256_xts = symbol(library, "EVP_aes_256_xts");
	crypto.context_new = symbol(library, "EVP_CIPHER_CTX_new");
	crypto.context_free = symbol(library, "EVP_CIPHER_CTX_free");
	crypto.init = symbol(library, "EVP_CipherInit_ex");
	crypto.update = symbol(library, "EVP_CipherUpdate");
	crypto.final = symbol(library, "EVP_CipherFinal_ex");
	crypto.control = symbol(library, "EVP_CIPHER_CTX_ctrl");
}

const struct crypto *crypto_open(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, open_once);
	return complete ? &crypto : NULL;
}

/* --- pages of a file ---------------------------------------------------------------------------------------------------- */

/* A context serves one thread at a time: of one guest fault threads, the worker, and batches that are stored. Where there are more than
 * slots (fault_threads_max), the last ones wait while others encrypt a few pages. */
enum { SLOTS = 16, SLOT_PAUSE_US = 10 };

struct page_cipher {
	struct slot {
		_Alignas(64) atomic_bool busy;
		void *context[2]; /* decrypting, encrypting */
	} slots[SLOTS];
};

int page_cipher_create(const uint8_t key[64], struct page_cipher **ret)
{
	const struct crypto *l = crypto_open();
	struct page_cipher *c;

	if (!l)
		return -ELIBACC;
	c = sys_alloc(sizeof(*c));
	if (!c)
		return -ENOMEM;
	for (int i = 0; i < 2 * SLOTS; i++) {
		void **context = &c->slots[i / 2].context[i % 2];

		*context = l->context_new();
		if (!*context || l->init(*context, l->aes_256_xts(), NULL, key, NULL, i % 2) != 1) {
			int error = *context ? -EIO : -ENOMEM;

			page_cipher_destroy(c);
			return error;
		}
	}
	*ret = c;
	return 0;
}

void page_cipher_destroy(struct page_cipher *c)
{
	const struct crypto *l = crypto_open();

	if (!c)
		return;
	for (int i = 0; i < 2 * SLOTS; i++)
		if (c->slots[i / 2].context[i % 2])
			l->context_free(c->slots[i / 2].context[i % 2]);
	sys_free(c, sizeof(*c));
}

static struct slot *take_slot(struct page_cipher *c)
{
	for (;;) {
		for (struct slot *s = c->slots; s < c->slots + SLOTS; s++)
			if (!atomic_exchange_explicit(&s->busy, true, memory_order_acquire))
				return s;
		sys_pause_us(SLOT_PAUSE_US);
	}
}

int page_cipher_run(struct page_cipher *c, bool encrypt, uint64_t page, uint32_t count, uint32_t page_bytes,
		    const uint8_t *from, uint8_t *to)
{
	const struct crypto *l = crypto_open();
	struct slot *s = take_slot(c);
	void *context = s->context[encrypt];
	int error = 0;

	for (uint32_t i = 0; i < count && !error; i++, page++, from += page_bytes, to += page_bytes) {
		uint8_t tweak[16] = {0};
		int done;

		memcpy(tweak, &page, sizeof(page)); /* little-endian, as all that tierd runs on */
		if (l->init(context, NULL, NULL, NULL, tweak, -1) != 1 ||
		    l->update(context, to, &done, from, (int)page_bytes) != 1 || done != (int)page_bytes)
			error = -EIO;
	}
	atomic_store_explicit(&s->busy, false, memory_order_release);
	return error;
}
