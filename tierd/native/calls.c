/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calls.c: a batch of system calls made by a thread of the VMM at the price of one stop.
 *
 * An area of the VMM's memory holds a stub (of the architecture, inject_stub()) and a table of calls. The thread is stopped
 * once, as for a single call (inject.c), and sent through the stub, whose last system call is the rt_sigreturn that restores it;
 * it is let go of at once. What becomes of the batch is looked up in the area, by us or by a successor of ours.
 *
 * Each batch has a number, which the stub is entered with, in a register. It makes a call only while the header's `batch` is that
 * number, so to cancel is to write the next one: no stub that is on its way, whoever sent it, will make another call, and none
 * comes back to life with a later batch. Whether one is in the middle of a call says `running`, a counter, because a stub that
 * comes late may meet its successor's. This is Dekker's handshake:
 *
 *   the stub:  running++, full fence, batch == mine? -> a call, done++, again; at the end running--
 *   cancel:    batch = next, full fence, running == 0? -> no call of a former batch is being made, or will be
 *
 * The fences are the stub's locked increment (arm64: the dmb after it), and on our side the reference counts of the page that
 * process_vm_writev(2) drops after its copy. (A copy that is torn could only be taken for a number 255 batches old, by a stub
 * that is as late.)
 *
 * A batch has ended when running is 0 and either done is count or batch is no longer its number; only then `done` says how many
 * were made. The results are written before it, and x86 keeps the order (arm64: a dmb between them). Only the stub of the current
 * number ever writes `done`.
 *
 * running == 0 does not mean that the thread has left the stub: it may be before its first instruction (then it will do nothing)
 * or before its last (nor then). So a next batch may start, even in the same thread; but the area may not go. A thread that is
 * found there has its frame already, and is sent on with that: with a frame more for every batch that came before it could run,
 * a thread that gets no CPU time would have its stack filled.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "inject.h"
#include "sys.h"

#ifdef __aarch64__ /* whose pages may have 4, 16 or 64 KiB: the code is a mapping of its own */
enum { CODE_BYTES = 65536, AREA_BYTES = 2 * CODE_BYTES };
#else
enum { CODE_BYTES = 4096, AREA_BYTES = 4 * CODE_BYTES };
#endif
enum { POLL_US = 20, PASS_MS = 10, INSIDE_MS = 1000, LEAVE_MS = 1000, LOOK_MS = 100 };
enum { BEGIN_NS_MAX = 10000000 }; /* faults on the pages of a batch wait for it */

#define AREA_MAGIC 0x6c6c616364726569ull
#define ENTRIES    offsetof(struct inject_header, entry)

_Static_assert(CODE_BYTES + ENTRIES + TIERD_CALLS_MAX * sizeof(struct inject_entry) <= AREA_BYTES, "the table fits");
_Static_assert(sizeof(((struct tierd_inside_call *)0)->data) == sizeof(((struct inject_entry *)0)->data), "data");

struct vmm {
	pid_t pid; /* or of a thread of its */
	int mem;   /* /proc/PID/mem, for reading and writing; -1: not at hand */
};

struct batch {
	struct inject_excursion excursion; /* first: it is freed by that address */
	uint64_t header, number, committed_ns;
	struct inject_frame frame;
};

/* --- the area ----------------------------------------------------------------------------------------------------------- */

/* What could not be read or written: -EFAULT, it is not there; -EAGAIN, it is, and what runs in it may go on: it is swapped out, say,
 * and there is no memory for it just now. */
static int not_reached(pid_t pid, uint64_t address)
{
	uint64_t entry = 0, page = address / (uint64_t)sysconf(_SC_PAGESIZE);
	char path[64];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT ? -ESRCH : -EAGAIN;
	n = pread(fd, &entry, sizeof(entry), (off_t)(page * sizeof(entry)));
	close(fd);
	return n < 0 || entry >> 62 /* present or swapped */ ? -EAGAIN : n ? -EFAULT : -ESRCH;
}

static int outcome(pid_t pid, uint64_t address, ssize_t n, size_t bytes)
{
	if (n == (ssize_t)bytes)
		return 0;
	return n < 0 && errno != EFAULT && errno != ENOMEM ? -errno : not_reached(pid, address);
}

/* A process whose first thread has ended is not found by its number, and the right to look may be taken from us at any time. The
 * descriptor of /proc/PID/mem is bound to the address space: it tells when that is gone, and only then. */
static int outcome_by_mem(ssize_t n, size_t bytes)
{
	return n == (ssize_t)bytes ? 0 : n ? -EAGAIN : -ESRCH;
}

static int write_area(struct vmm vmm, uint64_t address, const void *from, size_t bytes)
{
	struct iovec local = {(void *)from, bytes}, remote = {(void *)(uintptr_t)address, bytes};
	int error = outcome(vmm.pid, address, process_vm_writev(vmm.pid, &local, 1, &remote, 1, 0), bytes);

	return !error || error == -EFAULT || vmm.mem < 0
		       ? error
		       : outcome_by_mem(pwrite(vmm.mem, from, bytes, (off_t)address), bytes);
}

static int read_area(struct vmm vmm, uint64_t address, void *to, size_t bytes)
{
	struct iovec local = {to, bytes}, remote = {(void *)(uintptr_t)address, bytes};
	int error = outcome(vmm.pid, address, process_vm_readv(vmm.pid, &local, 1, &remote, 1, 0), bytes);

	return !error || error == -EFAULT || vmm.mem < 0
		       ? error
		       : outcome_by_mem(pread(vmm.mem, to, bytes, (off_t)address), bytes);
}

/* `running` is read last: what is concluded from its being 0 rests on what the other words said before. */
static int read_header(struct vmm vmm, uint64_t header, struct inject_header *h)
{
	enum { FIRST = offsetof(struct inject_header, running) };
	int error = read_area(vmm, header, h, FIRST);

	if (!error)
		error = read_area(vmm, header + FIRST, &h->running, sizeof(h->running));
	return error ? error : h->magic == AREA_MAGIC ? 0 : -EFAULT;
}

/* All calls of the last batch have been made: a stub that comes later finds none to make. */
static bool all_made(const struct inject_header *h)
{
	return !h->running && h->done == h->count;
}

/* No call of the batches so far will begin; *h as it was found after that. */
static int cancel(struct vmm vmm, uint64_t header, struct inject_header *h)
{
	uint64_t next;
	int error = read_header(vmm, header, h);

	next = h->batch + 1;
	if (!error)
		error = write_area(vmm, header + offsetof(struct inject_header, batch), &next, sizeof(next));
	return error ? error : read_header(vmm, header, h);
}

static int wait_idle(struct vmm vmm, uint64_t header, uint32_t timeout_ms, struct inject_header *h)
{
	uint64_t deadline_ns = sys_now_ns() + timeout_ms * 1000000ull;

	for (;;) {
		bool late = sys_now_ns() >= deadline_ns; /* before the look: we may be the one who was late */
		int error = read_header(vmm, header, h);

		if (error ? error != -EAGAIN : !h->running)
			return error;
		if (late)
			return -ETIMEDOUT;
		sys_pause_us(POLL_US);
	}
}

/* For what must have the area for itself, under a number that no stub has. A batch that runs is left alone. A stub that was too
 * late for its batch may be passing through: it is given a moment. */
static int take_over(struct vmm vmm, uint64_t header, struct inject_header *h)
{
	int error = wait_idle(vmm, header, PASS_MS, h);

	if (!error)
		error = cancel(vmm, header, h);
	if (!error)
		error = wait_idle(vmm, header, PASS_MS, h);
	return error == -ETIMEDOUT || error == -EAGAIN ? -EBUSY : error;
}

static struct vmm by_number(pid_t tid)
{
	return (struct vmm){tid, -1};
}

static int inside(int32_t tid, struct tierd_call call, int64_t *result)
{
	int error = tierd_inject(tid, &call, NULL, 0, INSIDE_MS);

	if (!error && call.result < 0 && call.result >= -4095)
		error = (int)call.result;
	*result = call.result;
	return error;
}

static int unmap(int32_t tid, uint64_t area)
{
	int64_t unused;

	return inside(tid, (struct tierd_call){.number = SYS_munmap, .argument = {area, AREA_BYTES}}, &unused);
}

static int fill_area(int32_t tid, uint64_t area)
{
	struct inject_header h = {.magic = AREA_MAGIC};
	struct tierd_call protect = {.number = SYS_mprotect, .argument = {area, CODE_BYTES, PROT_READ | PROT_EXEC}};
	size_t bytes;
	const uint8_t *stub = inject_stub(&bytes);
	int64_t unused;
	int error = write_area(by_number(tid), area, stub, bytes);

	if (!error)
		error = write_area(by_number(tid), area + CODE_BYTES, &h, ENTRIES);
	return error ? error : inside(tid, protect, &unused);
}

int tierd_calls_create(int32_t tid, uint64_t *area)
{
	struct tierd_call map = {.number = SYS_mmap};
	size_t stub_bytes;
	int64_t address;
	int error;

	inject_stub(&stub_bytes);
	if (!stub_bytes)
		return -ENOTSUP;
	map.argument[1] = AREA_BYTES;
	map.argument[2] = PROT_READ | PROT_WRITE;
	map.argument[3] = MAP_PRIVATE | MAP_ANONYMOUS;
	map.argument[4] = (uint64_t)-1;
	error = inside(tid, map, &address);
	if (error)
		return error;
	error = fill_area(tid, (uint64_t)address);
	if (error)
		unmap(tid, (uint64_t)address);
	else
		*area = (uint64_t)address;
	return error;
}

/* --- whether all have left it ------------------------------------------------------------------------------------------- */

struct look {
	struct inject_excursion excursion;
	uint64_t address;
};

static int run_look(struct inject_excursion *e)
{
	return inject_where(e->tid, &((struct look *)e)->address);
}

static int look_by_stop(pid_t tid, uint64_t *address)
{
	struct look *l = calloc(1, sizeof(*l));
	int error;

	if (!l)
		return -ENOMEM;
	l->excursion = (struct inject_excursion){.tid = tid, .timeout_ms = LOOK_MS, .run = run_look};
	error = inject_excurse(&l->excursion);
	*address = atomic_load(&l->excursion.over) ? l->address : 0; /* else there is an error */
	inject_release(&l->excursion);
	return error;
}

/* Of a thread that sleeps procfs says where, and it need not be disturbed: the last word of the line. */
static int look_at(pid_t tid, uint64_t *address)
{
	char path[64], line[256] = "";
	const char *last;
	ssize_t n = -1;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/syscall", tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, line, sizeof(line) - 1);
		close(fd);
	}
	last = n > 0 ? strrchr(line, ' ') : NULL;
	if (!last)
		return look_by_stop(tid, address);
	*address = strtoull(last, NULL, 16);
	return 0;
}

/* -EBUSY: thread tid is in the stub, or it could not be seen where it is. */
static int wait_left(pid_t tid, uint64_t area, uint64_t deadline_ns)
{
	for (;;) {
		bool late = sys_now_ns() >= deadline_ns;
		uint64_t address;
		int error = look_at(tid, &address);

		if (error == -ESRCH || (!error && address - area >= CODE_BYTES))
			return 0;
		if (late)
			return -EBUSY;
		sys_pause_us(POLL_US);
	}
}

/* Nobody is sent into the stub meanwhile, so a thread that was seen elsewhere stays elsewhere. */
static int wait_all_left(pid_t tid, uint64_t area)
{
	uint64_t deadline_ns = sys_now_ns() + LEAVE_MS * 1000000ull;
	struct dirent *entry;
	char path[64];
	int error = 0;
	DIR *tasks;

	snprintf(path, sizeof(path), "/proc/%d/task", tid);
	tasks = opendir(path);
	if (!tasks)
		return errno == ENOENT ? -ESRCH : -errno;
	while (!error && (entry = readdir(tasks)))
		if (entry->d_name[0] != '.')
			error = wait_left(atoi(entry->d_name), area, deadline_ns);
	closedir(tasks);
	return error;
}

int tierd_calls_destroy(int32_t tid, uint64_t area)
{
	struct inject_header h;
	int error = take_over(by_number(tid), area + CODE_BYTES, &h);

	if (!error)
		error = wait_all_left(tid, area);
	return error ? error : unmap(tid, area);
}

/* --- a batch ------------------------------------------------------------------------------------------------------------ */

static bool well_formed(const struct tierd_inside_call *calls, uint32_t count)
{
	if (!count || count > TIERD_CALLS_MAX)
		return false;
	for (uint32_t i = 0; i < count; i++)
		for (int k = 0; k < 6; k++)
			if (calls[i].in_data >> k & 1 && calls[i].argument[k] >= sizeof(calls[i].data))
				return false;
	return true;
}

static void make_entry(struct inject_entry *e, const struct tierd_inside_call *call, uint64_t address)
{
	*e = (struct inject_entry){.number = call->number};
	memcpy(e->argument, call->argument, sizeof(e->argument));
	memcpy(e->data, call->data, sizeof(e->data));
	for (int i = 0; i < 6; i++)
		if (call->in_data >> i & 1)
			e->argument[i] += address + offsetof(struct inject_entry, data);
}

static int lay_out(struct batch *b, const struct tierd_inside_call *calls, uint32_t count)
{
	struct inject_entry entries[TIERD_CALLS_MAX];
	uint64_t count_and_done[2] = {count, 0}, table = b->header + ENTRIES;
	struct inject_header h;
	pid_t tid = b->excursion.tid;
	int error = take_over(by_number(tid), b->header, &h);

	if (error)
		return error;
	b->number = h.batch;
	for (uint32_t i = 0; i < count; i++)
		make_entry(&entries[i], &calls[i], table + i * sizeof(entries[i]));
	error = write_area(by_number(tid), table, entries, count * sizeof(entries[0]));
	if (!error)
		error = write_area(by_number(tid), b->header + offsetof(struct inject_header, count), count_and_done,
				   sizeof(count_and_done));
	TIERD_INJECT_STEP(11);
	return error;
}

static int run_batch(struct inject_excursion *e)
{
	struct batch *b = (struct batch *)e;
	uint64_t stub = b->header - CODE_BYTES;
	struct inject_frame *frame = inject_has_frame(e->tid, stub, b->header) ? NULL : &b->frame;
	struct inject_header h;
	int error = read_header(by_number(e->tid), b->header,
				&h); /* stopped, it cannot become another program, or another process's, any more */

	if (!error && frame)
		error = inject_prepare(e->tid, 0, NULL, 0, frame);
	if (!error && frame)
		error = inject_write_frame(e->tid, frame);
	TIERD_INJECT_STEP(4);
	if (!error && (sys_now_ns() >= e->deadline_ns || !inject_may_commit(e)))
		error = -ETIMEDOUT;
	if (!error)
		error = inject_commit_batch(e->tid, stub, b->header, b->number, frame);
	TIERD_INJECT_STEP(5);
	if (error)
		return error;
	b->committed_ns = sys_now_ns();
	inject_block_signals(e->tid); /* fails only where the process dies, which whoever waits for the end will see */
	TIERD_INJECT_STEP(6);
	return 0;
}

/* Of the batch that was committed; it is cancelled when its budget is spent, or the time to wait for it is. The budget is of the time
 * that the VMM's thread is ours: while it waits for a CPU, as it would without us, nothing is gained by trying again. */
static int wait_end(const struct batch *b, uint64_t budget_ns, uint32_t timeout_ms, struct inject_header *h)
{
	uint64_t timeout_ns = timeout_ms * 1000000ull, end_ns = budget_ns > BEGIN_NS_MAX ? budget_ns : BEGIN_NS_MAX;
	pid_t tid = b->excursion.tid;
	bool begun = false, cancelled = false;

	for (;;) {
		uint64_t passed_ns =
			sys_now_ns() - b->committed_ns; /* before the look: we may be the one who was late */
		int error = read_header(by_number(tid), b->header, h);

		TIERD_INJECT_STEP(13);
		if (!error && !begun && (h->running || h->done)) {
			begun = true;
			end_ns = passed_ns + budget_ns;
		}
		if (!error && !cancelled && passed_ns >= (end_ns < timeout_ns ? end_ns : timeout_ns)) {
			error = h->batch == b->number ? cancel(by_number(tid), b->header, h) : 0;
			cancelled = !error;
			TIERD_INJECT_STEP(14);
		}
		if (!error && !h->running && (h->done == h->count || h->batch != b->number)) {
			error = read_header(by_number(tid), b->header, h); /* `done` was read before `running` */
			if (!error)
				return 0;
		}
		if (error == -EFAULT)
			return error;
		/* what cannot be seen, for whatever cause, may go on: that it has ended must be seen */
		if ((error && error != -EAGAIN) || passed_ns >= timeout_ns)
			return -EINPROGRESS;
		sys_pause_us(POLL_US);
	}
}

/* `done` is what the VMM's memory says, and the VMM is not to be trusted with ours. */
static int read_results(const struct batch *b, struct tierd_inside_call *calls, uint32_t count, uint64_t done)
{
	struct inject_entry entries[TIERD_CALLS_MAX];
	int error = done > count ? -EFAULT
				 : read_area(by_number(b->excursion.tid), b->header + ENTRIES, entries,
					     done * sizeof(entries[0]));

	for (uint64_t i = 0; !error && i < done; i++) {
		calls[i].result = entries[i].result;
		memcpy(calls[i].data, entries[i].data, sizeof(calls[i].data));
	}
	TIERD_INJECT_STEP(15);
	return error;
}

int tierd_calls_run(int32_t tid, uint64_t area, struct tierd_inside_call *calls, uint32_t count, uint64_t budget_ns,
		    uint32_t timeout_ms, uint32_t *done, uint64_t *stopped_ns)
{
	struct inject_header h = {0};
	struct batch *b;
	int error;

	*done = 0;
	*stopped_ns = 0;
	if (!well_formed(calls, count))
		return -EINVAL;
	b = calloc(1, sizeof(*b));
	if (!b)
		return -ENOMEM;
	b->excursion = (struct inject_excursion){.tid = tid, .timeout_ms = timeout_ms, .run = run_batch};
	b->header = area + CODE_BYTES;
	error = lay_out(b, calls, count);
	if (error) {
		free(b);
		return error;
	}
	error = inject_excurse(&b->excursion);
	if (atomic_load(&b->excursion.over))
		*stopped_ns = b->excursion.stopped_ns;
	TIERD_INJECT_STEP(12);
	if (!error) {
		error = wait_end(b, budget_ns, timeout_ms, &h);
		*stopped_ns = sys_now_ns() - b->excursion.began_ns;
		if (!error || error == -EINPROGRESS) {
			if (read_results(b, calls, count, h.done))
				error = -EINPROGRESS;
			else
				*done = (uint32_t)h.done;
		}
	}
	inject_release(&b->excursion);
	return error;
}

int tierd_calls_settle(int32_t pid, int32_t mem, uint64_t area, uint32_t timeout_ms)
{
	struct vmm vmm = {pid, mem};
	uint64_t header = area + CODE_BYTES, deadline_ns = sys_now_ns() + timeout_ms * 1000000ull;
	struct inject_header h;
	int error;

	for (;;) {
		error = read_header(vmm, header, &h);
		if (!error && all_made(&h)) /* `mem` may be for reading only: that is seen, too */
			return 0;
		error = cancel(vmm, header, &h);
		if (error != -EAGAIN)
			return error ? error : wait_idle(vmm, header, timeout_ms, &h);
		if (sys_now_ns() >= deadline_ns)
			return -ETIMEDOUT;
		sys_pause_us(POLL_US);
	}
}
