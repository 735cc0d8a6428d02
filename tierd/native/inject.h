/* SPDX-License-Identifier: Apache-2.0 */
/* inject.h: between the protocols of calls made inside the VMM (inject.c, calls.c) and the frame of an architecture. */
#ifndef TIERD_INJECT_H
#define TIERD_INJECT_H

#include <semaphore.h>
#include <stdatomic.h>
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

/* Code of the VMM that is used: a `syscall; ret` (arm64: `svc #0; ret`), and the `rt_sigreturn` that ends the excursion. */
struct inject_code {
	uint64_t call, sigreturn;
};

/* What is written below the thread's stack pointer in one piece, and the registers that run it. */
struct inject_frame {
	uint64_t address, scratch;
	size_t bytes;
	uint8_t data[INJECT_FRAME_MAX];
};

/* Byte patterns to look for in executable file mappings. */
extern const uint8_t inject_call_pattern[], inject_sigreturn_pattern[];
extern const size_t inject_call_bytes, inject_sigreturn_bytes, inject_code_alignment;

/* --- of the architecture: the thread is stopped by us ----------------------------------------------------------------- */

/* Builds the frame that restores the thread (with the registers it should have *after* a system call restart or the abort of a
 * restartable sequence); -ENOTSUP when its state cannot be restored by a signal frame. Changes nothing of the thread. */
int inject_prepare(pid_t tid, uint64_t return_address, const void *scratch, size_t scratch_bytes,
		   struct inject_frame *frame);
/* The one atomic step: from here on the thread goes through the call and back by itself, whether we live or not. */
int inject_commit(pid_t tid, const struct inject_code *code, const struct tierd_call *call,
		  const struct inject_frame *frame);
/* Whether tid stands at the entry or the exit of our call, and of no other. */
bool inject_in_call(pid_t tid, const struct inject_code *code, const struct inject_frame *frame);
int inject_result(pid_t tid, int64_t *result);
int inject_where(pid_t tid, uint64_t *address); /* of its next instruction */

/* --- a batch: what lies in the VMM, and the code that works it off ------------------------------------------------------ */

struct inject_entry {
	int64_t number;
	uint64_t argument[6];
	int64_t result;
	uint64_t data[8];
};

/* Who writes: we, before a batch: all but `running`; we, at any time: `batch`; the stub: `done` and `running`. */
struct inject_header {
	uint64_t magic;
	uint64_t batch; /* the number of the one batch that may make calls */
	uint64_t count, done;
	uint64_t running; /* how many stubs are between their entry and their end */
	uint64_t reserved[11];
	struct inject_entry entry[];
};

_Static_assert(offsetof(struct inject_header, batch) == 8 && offsetof(struct inject_header, count) == 16 &&
		       offsetof(struct inject_header, done) == 24 && offsetof(struct inject_header, running) == 32 &&
		       sizeof(struct inject_header) == 128,
	       "as the stubs have it");
_Static_assert(offsetof(struct inject_entry, argument) == 8 && offsetof(struct inject_entry, result) == 56 &&
		       sizeof(struct inject_entry) == 1 << 7,
	       "as the stubs have it");

/* Position-independent; 0 bytes where there is none. */
const uint8_t *inject_stub(size_t *bytes);
/* Whether the thread stands in the stub before it has begun or after its end: with a frame that serves for a next batch. */
bool inject_has_frame(pid_t tid, uint64_t stub, uint64_t header);
/* As inject_commit(): the thread goes through the stub and back. The frame needs no return address; NULL: it has one. */
int inject_commit_batch(pid_t tid, uint64_t stub, uint64_t header, uint64_t batch, const struct inject_frame *frame);

/* --- of inject.c -------------------------------------------------------------------------------------------------------- */

/* What is done to one stopped thread, by a thread of ours of its own: only the thread that traces can let go, and that may take
 * longer than the caller waits. The first member of what `run` needs; both are freed by the last of the two. */
struct inject_excursion {
	int32_t tid;
	uint32_t timeout_ms;
	int (*run)(struct inject_excursion *e); /* the thread is stopped, and let go of afterwards */
	uint64_t deadline_ns, began_ns, stopped_ns;
	bool stopped; /* kept by run, as is the signal that it is to be let go with */
	int signal, error;
	sem_t done;
	_Atomic bool over; /* what run has written can be read (the thread sanitizer does not know sem_clockwait) */
	_Atomic int users;
	_Atomic bool decided; /* to commit, by run, or to give it up, by the caller: whoever sets it first */
};

/* From calloc(3). Blocks, at most timeout_ms and a second, and a moment after a commit; 0, or the error of the stop or of run.
 * -ETIMEDOUT: nothing was or will be committed; the thread may stand for as long as run does. The caller releases it in any case. */
int inject_excurse(struct inject_excursion *e);
/* Run asks directly before its commit. What is before it may wait for a page of the guest whose owner is the caller, where the
 * stack of the thread lies in memory that is taken for the guest's. */
bool inject_may_commit(struct inject_excursion *e);
void inject_release(struct inject_excursion *e);
int inject_write_frame(pid_t tid, const struct inject_frame *frame);
/* Where the thread, not in a system call and about to go on at *pc, has to come back to: of a restartable sequence its abort
 * handler. -ENOTSUP: one that the kernel would kill for. */
int inject_leave_section(pid_t tid, uint64_t *pc);
int inject_block_signals(pid_t tid);

#endif
