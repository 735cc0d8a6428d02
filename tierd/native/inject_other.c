/* SPDX-License-Identifier: Apache-2.0 */
/* inject_other.c: architectures whose signal frame nobody has written yet. Everything but calls inside a VMM works there. */
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <errno.h>

#include "inject.h"

const uint8_t inject_call_pattern[] = {0};
const size_t inject_call_bytes = sizeof(inject_call_pattern);
const uint8_t inject_sigreturn_pattern[] = {0};
const size_t inject_sigreturn_bytes = sizeof(inject_sigreturn_pattern);
const size_t inject_code_alignment = 1;

int inject_prepare(pid_t tid, uint64_t return_address, const void *scratch, size_t scratch_bytes,
		   struct inject_frame *frame)
{
	(void)tid, (void)return_address, (void)scratch, (void)scratch_bytes, (void)frame;
	return -ENOTSUP;
}

int inject_commit(pid_t tid, const struct inject_code *code, const struct tierd_call *call,
		  const struct inject_frame *frame)
{
	(void)tid, (void)code, (void)call, (void)frame;
	return -ENOTSUP;
}

const uint8_t *inject_stub(size_t *bytes)
{
	*bytes = 0;
	return NULL;
}

int inject_commit_batch(pid_t tid, uint64_t stub, uint64_t header, uint64_t batch, const struct inject_frame *frame)
{
	(void)tid, (void)stub, (void)header, (void)batch, (void)frame;
	return -ENOTSUP;
}

bool inject_has_frame(pid_t tid, uint64_t stub, uint64_t header)
{
	(void)tid, (void)stub, (void)header;
	return false;
}

int inject_where(pid_t tid, uint64_t *address)
{
	(void)tid, (void)address;
	return -ENOTSUP;
}

bool inject_in_call(pid_t tid, const struct inject_code *code, const struct inject_frame *frame)
{
	(void)tid, (void)code, (void)frame;
	return false;
}

int inject_result(pid_t tid, int64_t *result)
{
	(void)tid, (void)result;
	return -ENOTSUP;
}
#endif
