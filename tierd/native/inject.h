/* SPDX-License-Identifier: Apache-2.0 */
/* inject.h: between the protocol of a call made inside the VMM (inject.c) and the frame of an architecture. */
#ifndef TIERD_INJECT_H
#define TIERD_INJECT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "tierd.h"

/* The test that kills the tracer at every step compiles with -DTIERD_INJECT_STEP=... */
#ifndef TIERD_INJECT_STEP
#define TIERD_INJECT_STEP(n) ((void)0)
#endif

#ifndef PTRACE_GETSIGMASK
#define PTRACE_GETSIGMASK 0x420a
#define PTRACE_SETSIGMASK 0x420b
#endif

enum { INJECT_SCRATCH_MAX = 4096, INJECT_FRAME_MAX = 32768 };

/* Code of the VMM that is used: a `syscall; ret`, and the `rt_sigreturn` that ends the excursion. */
struct inject_code {
	uint64_t call, sigreturn;
};

/* What is written below the thread's stack pointer in one piece, and the registers that run it. */
struct inject_frame {
	uint64_t address, scratch;
	size_t bytes;
	uint8_t data[INJECT_FRAME_MAX];
};

struct inject_registers; /* of the architecture */

/* Byte patterns to look for in executable file mappings. */
extern const uint8_t inject_call_pattern[], inject_sigreturn_pattern[];
extern const size_t inject_call_bytes, inject_sigreturn_bytes;

/* Thread tid is stopped. Builds the frame that restores it (with the registers it should have *after* a system call restart
 * or the abort of a restartable sequence) and the call's arguments; -ENOTSUP when its state cannot be restored by a signal frame. */
int inject_prepare(pid_t tid, const struct inject_code *code, struct tierd_call *call, const void *scratch,
		   size_t scratch_bytes, struct inject_frame *frame);
/* The one atomic step: from here on the thread goes through the call and back by itself, whether we live or not. */
int inject_commit(pid_t tid, const struct inject_code *code, const struct tierd_call *call,
		  const struct inject_frame *frame);
/* Whether tid stands at the entry or the exit of our call, and of no other. */
bool inject_in_call(pid_t tid, const struct inject_code *code, const struct inject_frame *frame);
int inject_result(pid_t tid, int64_t *result);

#endif
