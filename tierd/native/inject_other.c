/* SPDX-License-Identifier: Apache-2.0 */
/* inject_other.c: architectures whose signal frame nobody has written yet. Everything but calls inside a VMM works there. */
#ifndef __x86_64__
#include <errno.h>

#include "inject.h"

const uint8_t inject_call_pattern[] = {0};
const size_t inject_call_bytes = sizeof(inject_call_pattern);
const uint8_t inject_sigreturn_pattern[] = {0};
const size_t inject_sigreturn_bytes = sizeof(inject_sigreturn_pattern);

int inject_prepare(pid_t tid, const struct inject_code *code, struct tierd_call *call, const void *scratch,
		   size_t scratch_bytes, struct inject_frame *frame)
{
	(void)tid, (void)code, (void)call, (void)scratch, (void)scratch_bytes, (void)frame;
	return -ENOTSUP;
}

int inject_commit(pid_t tid, const struct inject_code *code, const struct tierd_call *call,
		  const struct inject_frame *frame)
{
	(void)tid, (void)code, (void)call, (void)frame;
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
