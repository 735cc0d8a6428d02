/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject.c: one system call made by a thread of the VMM, which restores itself.
 *
 * A tracer that dies leaves its tracee running with whatever registers it was given. So a signal frame with the thread's own
 * registers is laid below its red zone, and one SETREGSET points it at a `syscall; ret` whose return address is
 * rt_sigreturn. Before that step nothing of the thread has changed (bytes below the red zone are nobody's); after it the
 * thread needs nobody. The system-call stops are only looked at for the result; the thread is never trapped by an int3.
 *
 * ptrace(2), sigreturn(2), sigaltstack(2). All calls of one injection come from one thread, its own.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "inject.h"
#include "sys.h"

enum { POLL_US = 20, SIGNALS_MAX = 64, CODE_BYTES_MAX = 64 << 20, LET_GO_NS = 500000000, STACK_BYTES = 1 << 20 };

#define SYSCALL_STOP (SIGTRAP | 0x80)

#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
#endif

/* --- finding code ------------------------------------------------------------------------------------------------------- */

static uint64_t find_aligned(const uint8_t *in, size_t in_bytes, uint64_t address, const uint8_t *pattern, size_t bytes)
{
	for (const uint8_t *from = in, *hit; (hit = memmem(from, (size_t)(in + in_bytes - from), pattern, bytes));
	     from = hit + 1)
		if ((address + (uint64_t)(hit - in)) % inject_code_alignment == 0)
			return address + (uint64_t)(hit - in);
	return 0;
}

static uint64_t find_in(int mem, uint64_t start, uint64_t end, const uint8_t *pattern, size_t bytes)
{
	enum { PIECE = 1 << 20 };
	uint8_t *buffer = malloc(PIECE);
	uint64_t found = 0;

	for (uint64_t at = start; buffer && !found && at + bytes <= end;) {
		size_t want = end - at < PIECE ? end - at : PIECE;
		ssize_t n = pread(mem, buffer, want, (off_t)at);

		if (n < (ssize_t)bytes)
			break;
		found = find_aligned(buffer, (size_t)n, at, pattern, bytes);
		at += (uint64_t)n - bytes + 1;
	}
	free(buffer);
	return found;
}

/* Looks through executable file mappings, libc first by nature; and through the vdso, which is better where it has them: no
 * thread sleeps in a call of its. That of x86-64 has neither, that of arm64 has the second and with some kernels both. */
static int find_code(pid_t tid, struct inject_code *code)
{
	char path[64], line[512];
	int mem, error = 0;
	FILE *maps;

	snprintf(path, sizeof(path), "/proc/%d/mem", tid);
	mem = open(path, O_RDONLY | O_CLOEXEC);
	if (mem < 0)
		return errno == ENOENT ? -ESRCH : -errno;
	snprintf(path, sizeof(path), "/proc/%d/maps", tid);
	maps = fopen(path, "re");
	if (!maps)
		error = -errno;
	while (maps && fgets(line, sizeof(line), maps)) {
		bool vdso = strstr(line, "[vdso]");
		unsigned long start, end, inode;
		uint64_t found;
		char mode[5];

		if (sscanf(line, "%lx-%lx %4s %*x %*s %lu", &start, &end, mode, &inode) != 4 || mode[2] != 'x' ||
		    (!inode && !vdso) || end - start > CODE_BYTES_MAX)
			continue;
		found = !code->call || vdso ? find_in(mem, start, end, inject_call_pattern, inject_call_bytes) : 0;
		if (found)
			code->call = found;
		found = !code->sigreturn || vdso
				? find_in(mem, start, end, inject_sigreturn_pattern, inject_sigreturn_bytes)
				: 0;
		if (found)
			code->sigreturn = found;
	}
	if (maps)
		fclose(maps);
	close(mem);
	return error ? error : code->call && code->sigreturn ? 0 : -ENOTSUP;
}

/* --- stops -------------------------------------------------------------------------------------------------------------- */

/* Waits for the next stop of tid. Bounded: a thread in uninterruptible sleep does not stop. */
static int next_stop(pid_t tid, uint64_t deadline_ns, int *status)
{
	for (;;) {
		bool late = sys_now_ns() >= deadline_ns; /* before the look: we may be the one who was late */
		pid_t got = waitpid(tid, status, __WALL | WNOHANG);

		if (got == tid)
			return WIFSTOPPED(*status) ? 0 : -ESRCH;
		if (got < 0 && errno != EINTR)
			return -errno;
		if (late)
			return -ETIMEDOUT;
		sys_pause_us(POLL_US);
	}
}

static int event_of(int status)
{
	return status >> 16;
}

/* A group-stopped thread (SIGSTOP) must stay stopped when we let go of it: DETACH from PTRACE_EVENT_STOP keeps that. */
static bool in_group_stop(int status)
{
	return event_of(status) == PTRACE_EVENT_STOP && WSTOPSIG(status) != SIGTRAP;
}

/* Interrupts tid and brings it to a stop of ours; signals that arrive first are handed on to it. */
static int stop_thread(pid_t tid, uint64_t deadline_ns, int *status)
{
	if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL))
		return -errno;
	TIERD_INJECT_STEP(2);
	for (int i = 0; i < SIGNALS_MAX; i++) {
		int error = next_stop(tid, deadline_ns, status);

		if (error)
			return error;
		if (event_of(*status) == PTRACE_EVENT_STOP)
			return 0;
		/* A signal on its way is delivered. The interrupt is said again: entering any stop takes back one that was pending. */
		if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) ||
		    ptrace(PTRACE_CONT, tid, NULL, (void *)(intptr_t)(WSTOPSIG(*status) & 0x7f)))
			return -errno;
	}
	return -ETIMEDOUT;
}

/* Of a thread that stands in this stop: a signal that it was about to be given is given to it. */
static void detach(pid_t tid, int status)
{
	bool signal = !event_of(status) && WSTOPSIG(status) != SYSCALL_STOP;

	ptrace(PTRACE_DETACH, tid, NULL, (void *)(intptr_t)(signal ? WSTOPSIG(status) : 0));
}

/* Lets go of a thread that may be running: it must stop once more to be detached, unless it is gone. False: it did not stop. */
static bool let_go(pid_t tid, bool stopped, int signal)
{
	int status, error;

	if (stopped) {
		ptrace(PTRACE_DETACH, tid, NULL, (void *)(intptr_t)signal);
		return true;
	}
	if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL))
		return true;
	error = next_stop(tid, sys_now_ns() + LET_GO_NS, &status);
	if (!error)
		detach(tid, status);
	return error != -ETIMEDOUT;
}

/* A thread in uninterruptible sleep (a page of the guest that the kernel waits for, while the store hangs) stops when that ends, and
 * would stay stopped for as long as whoever traces it lives. */
static void let_go_at_last(pid_t tid)
{
	int status;
	pid_t got;

	do
		got = waitpid(tid, &status, __WALL);
	while (got < 0 && errno == EINTR);
	if (got == tid && WIFSTOPPED(status))
		detach(tid, status);
}

/*
 * A signal that was pending would be handled before our call, and the sigreturn of its handler would be taken for it. All are
 * blocked until the frame's sigreturn puts the thread's own mask back; after the commit, so that whoever dies here leaves a
 * thread that unblocks itself.
 */
int inject_block_signals(pid_t tid)
{
	uint64_t all = ~0ull;

	return ptrace(PTRACE_SETSIGMASK, tid, (void *)sizeof(all), &all) ? -errno : 0;
}

/* After the commit: to the entry of the call, to its exit. */
static int watch_call(pid_t tid, const struct inject_code *code, const struct inject_frame *frame, uint64_t deadline_ns,
		      bool *stopped, int *signal)
{
	for (int stops = 0; stops < 2;) {
		int status, error;

		if (ptrace(PTRACE_SYSCALL, tid, NULL, (void *)(intptr_t)*signal))
			return -errno;
		*signal = 0;
		*stopped = false;
		TIERD_INJECT_STEP(7 + stops);
		error = next_stop(tid, deadline_ns, &status);
		if (error)
			return error;
		*stopped = true;
		if (event_of(status) == PTRACE_EVENT_STOP) {
			if (in_group_stop(status)) /* SIGSTOP arrived: it can wait until the thread is itself again */
				continue;
		} else if (WSTOPSIG(status) == SYSCALL_STOP) {
			stops += inject_in_call(tid, code, frame);
		} else {
			*signal = WSTOPSIG(status);
		}
	}
	return 0;
}

static int read_scratch(pid_t tid, const struct inject_frame *frame, void *scratch, size_t bytes)
{
	struct iovec to = {scratch, bytes}, from = {(void *)(uintptr_t)frame->scratch, bytes};

	if (!bytes)
		return 0;
	return process_vm_readv(tid, &to, 1, &from, 1, 0) == (ssize_t)bytes ? 0 : -EFAULT;
}

static void make_pointers(struct tierd_call *call, struct inject_frame *frame, size_t scratch_bytes)
{
	uint8_t *area = frame->data + (frame->scratch - frame->address);
	uint64_t word;

	for (int i = 0; i < 6; i++)
		if (call->in_scratch >> i & 1)
			call->argument[i] += frame->scratch;
	for (size_t i = 0; i < 64 && (i + 1) * sizeof(word) <= scratch_bytes; i++) {
		if (!(call->pointers >> i & 1))
			continue;
		memcpy(&word, area + i * sizeof(word), sizeof(word));
		word += frame->scratch;
		memcpy(area + i * sizeof(word), &word, sizeof(word));
	}
}

int inject_write_frame(pid_t tid, const struct inject_frame *frame)
{
	struct iovec from = {(void *)frame->data, frame->bytes}, to = {(void *)(uintptr_t)frame->address, frame->bytes};
	ssize_t n = process_vm_writev(tid, &from, 1, &to, 1, 0);

	return n == (ssize_t)frame->bytes ? 0 : n < 0 ? -errno : -EFAULT;
}

/* --- a restartable sequence ----------------------------------------------------------------------------------------------- */

struct rseq_configuration { /* struct ptrace_rseq_configuration */
	uint64_t address;
	uint32_t bytes, signature, flags, padding;
};

struct rseq_section_64 { /* struct rseq_cs */
	uint32_t version, flags;
	uint64_t start, bytes, abort;
};

/* of struct rseq: where it points at the section that the thread is in */
enum { RSEQ_SECTION = 8 };

_Static_assert(sizeof(struct rseq_configuration) == 24, "struct ptrace_rseq_configuration of the kernel");
_Static_assert(sizeof(struct rseq_section_64) == 32, "struct rseq_cs of the kernel");

static int read_memory(pid_t tid, uint64_t address, void *to, size_t bytes)
{
	struct iovec local = {to, bytes}, remote = {(void *)(uintptr_t)address, bytes};
	ssize_t n = process_vm_readv(tid, &local, 1, &remote, 1, 0);

	return n == (ssize_t)bytes ? 0 : n < 0 ? -errno : -EFAULT;
}

/*
 * A thread in a restartable sequence, rseq(2), must come back to its abort handler, as it would from a signal handler: the kernel
 * sees it leave for our call and forgets the sequence (rseq_ip_fixup()), so nothing else would abort it. Only the frame says so:
 * up to the commit the thread's own memory is as it was, and what the kernel finds there later it clears.
 */
int inject_leave_section(pid_t tid, uint64_t *pc)
{
	struct rseq_configuration c = {0};
	struct rseq_section_64 s;
	uint64_t section = 0;
	uint32_t signature;
	int error;

	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, (void *)sizeof(c), &c) < 0) /* Linux 5.13 */
		return errno == EIO || errno == EINVAL ? 0 : -errno;
	error = c.address ? read_memory(tid, c.address + RSEQ_SECTION, &section, sizeof(section)) : 0;
	if (error || !section)
		return error;
	error = read_memory(tid, section, &s, sizeof(s));
	if (error || *pc - s.start >= s.bytes)
		return error;
	error = read_memory(tid, s.abort - sizeof(signature), &signature, sizeof(signature));
	if (error)
		return error;
	if (s.version || signature != c.signature) /* the kernel would kill for it: leave that to the kernel */
		return -ENOTSUP;
	*pc = s.abort;
	return 0;
}

/* --- an excursion ------------------------------------------------------------------------------------------------------- */

void inject_release(struct inject_excursion *e)
{
	if (atomic_fetch_sub(&e->users, 1) != 1)
		return;
	sem_destroy(&e->done);
	free(e);
}

static void *excursion_main(void *argument)
{
	struct inject_excursion *e = argument;
	bool gone = true;
	int status;

	/* of this thread: else every pause takes 50 us more, in which the VMM's thread stands still */
	prctl(PR_SET_TIMERSLACK, 1ul);
	e->deadline_ns = sys_now_ns() + e->timeout_ms * 1000000ull;
	if (ptrace(PTRACE_SEIZE, e->tid, NULL, (void *)(intptr_t)PTRACE_O_TRACESYSGOOD)) {
		e->error = errno == EPERM ? -EBUSY : -errno; /* root is refused only where somebody else traces */
	} else {
		TIERD_INJECT_STEP(1);
		e->began_ns = sys_now_ns();
		e->error = stop_thread(e->tid, e->deadline_ns, &status);
		TIERD_INJECT_STEP(3);
		e->stopped = !e->error;
		if (!e->error && in_group_stop(status))
			e->error = -EAGAIN; /* stopped by a SIGSTOP: it would not run our call */
		if (!e->error)
			e->error = e->run(e);
		if (e->error != -ESRCH)
			gone = let_go(e->tid, e->stopped, e->signal);
		e->stopped_ns = sys_now_ns() - e->began_ns;
	}
	atomic_store(&e->over, true);
	sem_post(&e->done);
	if (!gone)
		let_go_at_last(e->tid);
	inject_release(e);
	return NULL;
}

static int start_thread(struct inject_excursion *e)
{
	pthread_attr_t attributes;
	pthread_t thread;
	int error = pthread_attr_init(&attributes);

	if (error)
		return -error;
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	error = pthread_create(&thread, &attributes, excursion_main, e);
	pthread_attr_destroy(&attributes);
	return -error;
}

bool inject_may_commit(struct inject_excursion *e)
{
	return !atomic_exchange(&e->decided, true);
}

/* False: it has not come so far as to commit, and will not. */
static bool wait_done(struct inject_excursion *e, uint64_t ns)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	ns += (uint64_t)until.tv_nsec;
	until.tv_sec += (time_t)(ns / 1000000000);
	until.tv_nsec = (long)(ns % 1000000000);
	while (sem_clockwait(&e->done, CLOCK_MONOTONIC, &until)) {
		if (errno != ETIMEDOUT)
			continue;
		if (!atomic_exchange(&e->decided, true))
			return false;
		until.tv_sec = INT32_MAX;
	}
	return atomic_load(&e->over);
}

int inject_excurse(struct inject_excursion *e)
{
	int error;

	atomic_store(&e->users, 2);
	sem_init(&e->done, 0, 0);
	error = start_thread(e);
	if (error) {
		inject_release(e);
		return error;
	}
	return wait_done(e, e->timeout_ms * 1000000ull + 2ull * LET_GO_NS) ? e->error : -ETIMEDOUT;
}

/* --- one call ----------------------------------------------------------------------------------------------------------- */

struct injection {
	struct inject_excursion excursion; /* first: it is freed by that address */
	struct inject_code code;
	struct tierd_call call;
	uint32_t scratch_bytes;
	uint8_t scratch[INJECT_SCRATCH_MAX];
	struct inject_frame frame;
};

static int run_call(struct inject_excursion *e)
{
	struct injection *i = (struct injection *)e;
	int error = inject_prepare(e->tid, i->code.sigreturn, i->scratch, i->scratch_bytes, &i->frame);

	if (!error) {
		make_pointers(&i->call, &i->frame, i->scratch_bytes);
		error = inject_write_frame(e->tid, &i->frame);
	}
	TIERD_INJECT_STEP(4);
	if (!error && !inject_may_commit(e))
		error = -ETIMEDOUT;
	if (!error)
		error = inject_commit(e->tid, &i->code, &i->call, &i->frame);
	TIERD_INJECT_STEP(5);
	if (!error)
		error = inject_block_signals(e->tid);
	TIERD_INJECT_STEP(6);
	if (!error)
		error = watch_call(e->tid, &i->code, &i->frame, e->deadline_ns, &e->stopped, &e->signal);
	TIERD_INJECT_STEP(9);
	if (!error)
		error = inject_result(e->tid, &i->call.result);
	if (!error)
		error = read_scratch(e->tid, &i->frame, i->scratch, i->scratch_bytes);
	TIERD_INJECT_STEP(10);
	return error;
}

int tierd_inject(int32_t tid, struct tierd_call *call, void *scratch, uint32_t scratch_bytes, uint32_t timeout_ms)
{
	struct injection *i;
	int error;

	if (scratch_bytes > INJECT_SCRATCH_MAX)
		return -EINVAL;
	i = calloc(1, sizeof(*i));
	if (!i)
		return -ENOMEM;
	error = find_code(tid, &i->code); /* before the stop: it takes milliseconds */
	if (error) {
		free(i);
		return error;
	}
	i->excursion = (struct inject_excursion){.tid = tid, .timeout_ms = timeout_ms, .run = run_call};
	i->call = *call;
	i->scratch_bytes = scratch_bytes;
	if (scratch_bytes)
		memcpy(i->scratch, scratch, scratch_bytes);
	error = inject_excurse(&i->excursion);
	if (atomic_load(&i->excursion.over)) { /* else run is at it still */
		*call = i->call;
		call->stopped_ns = i->excursion.stopped_ns;
		if (scratch_bytes)
			memcpy(scratch, i->scratch, scratch_bytes);
	}
	inject_release(&i->excursion);
	return error;
}
