/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crypto.h: AES of OpenSSL's libcrypto, the system's, found when it is first wanted. Its functions (openssl/evp.h, the same in 1.1 and 3)
 * are declared here, so that building takes no headers of it.
 */
#ifndef TIERD_CRYPTO_H
#define TIERD_CRYPTO_H

#include <stdbool.h>
#include <stdint.h>

struct crypto {
	const void *(*aes_256_gcm)(void);
	const void *(*aes_256_xts)(void);
	void *(*context_new)(void);
	void (*context_free)(void *context);
	/* encrypt: 1, decrypt: 0, as it was: -1 */
	int (*init)(void *context, const void *cipher, void *engine, const uint8_t *key, const uint8_t *nonce,
		    int encrypt);
	int (*update)(void *context, uint8_t *to, int *to_bytes, const uint8_t *from, int bytes);
	int (*final)(void *context, uint8_t *to, int *to_bytes);
	int (*control)(void *context, int what, int bytes, void *at);
};

/* NULL: neither libcrypto.so.3 nor .1.1 is installed. */
const struct crypto *crypto_open(void);

/* A key with which the pages of a file are encrypted: AES-256-XTS, each with its number. Any number of threads. All memory is taken when
 * it is made; it is the allocator's, so the key can be in what a host without encrypted swap swaps out. That nobody has changed the
 * file, the checksum of a page must say. */
struct page_cipher;
int page_cipher_create(const uint8_t key[64], struct page_cipher **ret); /* -ELIBACC, -ENOMEM, -EIO */
void page_cipher_destroy(struct page_cipher *c);
/* `from` may be `to`. -EIO: the library failed, `to` holds anything. */
int page_cipher_run(struct page_cipher *c, bool encrypt, uint64_t page, uint32_t count, uint32_t page_bytes,
		    const uint8_t *from, uint8_t *to);

#endif
