/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject_killer.c: a tracer that dies.
 *
 *   inject_killer TID STEP               one call in thread TID; SIGKILL to itself at step STEP (0: never)
 *   inject_killer TID for-ever           calls without a pause, to be killed from outside
 *   inject_killer TID naive              as a tracer would do it that does not think of its death, which comes in mid-call
 *   inject_killer TID create             an area for batches; prints its address
 *   inject_killer TID STEP AREA KIND     one batch, of those in make_batch(); prints error, calls made, microseconds stopped
 *   inject_killer TID for-ever AREA      batches without a pause, after settling what a predecessor left
 *   inject_killer TID stop AREA KIND     one batch; after its commit SIGSTOP to the whole victim, SIGKILL to itself
 *   inject_killer TID starve AREA        batches cancelled before the thread has the CPU; prints how much of its stack they took
 *   inject_killer TID settle AREA MS     prints the error of tierd_calls_settle()
 *   inject_killer TID stuck AREA MS      a batch, or a single call (AREA 0); what is written into the victim's stack before the commit takes so
 *                                        long, as where it waits for a page. Prints the error, and milliseconds
 *   inject_killer TID blind AREA ERRNO   a batch of the kind `long`; after its commit the victim's memory cannot be had by its number: ERRNO.
 *                                        prints the errors of tierd_calls_run() and of tierd_calls_settle(), with /proc/PID/mem, tried till it is 0
 *   inject_killer TID destroy AREA       prints the error
 *
 * Compiled together with tierd/native/{inject*,calls}.c, whose steps it hooks.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "inject_step.h"
#include "tierd.h"

enum { STOPPED = 3, COMMITTED = 5, STARVED = 1000, QUICK = 40, SLEEPS = 64, WRITES = 32 };

static int die_at;
static pid_t stop_first, starved;
static unsigned int stuck_us, write_us; /* process_vm_writev() takes so long; while the thread is stopped */
static int blind, blind_errno;          /* process_vm_readv() and its like fail so; from the commit on */
static uint64_t stack_top, stack_low = UINT64_MAX;

/* The traced thread stands already; that the others do shows the main one. */
static void stop_all(pid_t pid)
{
	char path[64], line[512], state = 0;
	FILE *stat;

	kill(pid, SIGSTOP);
	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	while (state != 'T') {
		stat = fopen(path, "r");
		if (!stat || !fgets(line, sizeof(line), stat) || sscanf(line, "%*d (%*[^)]) %c", &state) != 1)
			abort();
		fclose(stat);
	}
}

static int get_registers(pid_t tid, struct user_regs_struct *r)
{
	struct iovec v = {r, sizeof(*r)};

	return ptrace(PTRACE_GETREGSET, tid, (void *)NT_PRSTATUS, &v) ? -1 : 0;
}

static void look_at_stack(void)
{
	struct user_regs_struct r;
	uint64_t at;

	if (get_registers(starved, &r))
		abort();
#ifdef __x86_64__
	at = r.rsp;
#else
	at = r.sp;
#endif
	stack_top = at > stack_top ? at : stack_top;
	stack_low = at < stack_low ? at : stack_low;
}

void inject_step(int n)
{
	if (starved && n == STOPPED)
		look_at_stack();
	if (n == STOPPED)
		write_us = stuck_us;
	if (n == COMMITTED)
		blind_errno = blind;
	if (n != die_at)
		return;
	if (stop_first)
		stop_all(stop_first);
	kill(getpid(), SIGKILL);
}

ssize_t __real_process_vm_readv(pid_t pid, const struct iovec *to, unsigned long n, const struct iovec *from,
				unsigned long m, unsigned long flags);
ssize_t __real_process_vm_writev(pid_t pid, const struct iovec *from, unsigned long n, const struct iovec *to,
				 unsigned long m, unsigned long flags);
ssize_t __wrap_process_vm_readv(pid_t pid, const struct iovec *to, unsigned long n, const struct iovec *from,
				unsigned long m, unsigned long flags);
ssize_t __wrap_process_vm_writev(pid_t pid, const struct iovec *from, unsigned long n, const struct iovec *to,
				 unsigned long m, unsigned long flags);

ssize_t __wrap_process_vm_readv(pid_t pid, const struct iovec *to, unsigned long n, const struct iovec *from,
				unsigned long m, unsigned long flags)
{
	errno = blind_errno;
	return blind_errno ? -1 : __real_process_vm_readv(pid, to, n, from, m, flags);
}

ssize_t __wrap_process_vm_writev(pid_t pid, const struct iovec *from, unsigned long n, const struct iovec *to,
				 unsigned long m, unsigned long flags)
{
	usleep(write_us);
	errno = blind_errno;
	return blind_errno ? -1 : __real_process_vm_writev(pid, from, n, to, m, flags);
}

/* Points the thread at a system call, and would put its registers back afterwards. */
static int naive(pid_t tid)
{
	struct user_regs_struct registers, changed;
	struct iovec v = {&changed, sizeof(changed)};
	int status;

	if (ptrace(PTRACE_SEIZE, tid, NULL, NULL) || ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) ||
	    waitpid(tid, &status, __WALL) != tid || get_registers(tid, &registers))
		return 1;
	changed = registers;
#ifdef __x86_64__
	changed.rax = SYS_getpid;
	changed.orig_rax = (unsigned long)-1;
	changed.rbx = changed.rdx = changed.rsi = 0x5151515151515151;
#else
	for (int i = 0; i < 29; i++)
		changed.regs[i] = 0x5151515151515151;
#endif
	if (ptrace(PTRACE_SETREGSET, tid, (void *)NT_PRSTATUS, &v))
		return 1;
	return kill(getpid(), SIGKILL); /* before it puts them back */
}

/* What getpid() must say in thread tid. */
static long process_of(pid_t tid)
{
	char path[64], line[128];
	long process = -1;
	FILE *status;

	snprintf(path, sizeof(path), "/proc/%d/status", tid);
	status = fopen(path, "r");
	while (status && process < 0 && fgets(line, sizeof(line), status))
		sscanf(line, "Tgid: %ld", &process);
	if (status)
		fclose(status);
	return process;
}

/* --- batches ------------------------------------------------------------------------------------------------------------ */

struct kind {
	const char *name;
	uint32_t count;
	uint64_t budget_ns;
	uint32_t timeout_ms;
};

static const struct kind kinds[] = {
	{"quick", QUICK, 2000000000, 2000},       /* getpid and clock_gettime */
	{"sleeps", SLEEPS, 2000000, 2000},        /* of 1 ms each */
	{"writes", 2 * WRITES, 2000000000, 4000}, /* a sleep of 1 ms, one byte to the victim's stderr */
	{"long", 2, 2000000, 50},                 /* a sleep of 300 ms, one byte */
};

static void make_sleep(struct tierd_inside_call *call, uint64_t ns)
{
	*call = (struct tierd_inside_call){.number = SYS_nanosleep, .in_data = 1, .data = {0, ns}};
}

static void make_write(struct tierd_inside_call *call)
{
	*call = (struct tierd_inside_call){
		.number = SYS_write, .argument = {STDERR_FILENO, 8, 1}, .in_data = 1 << 1, .data = {0, 'x'}};
}

static void make_batch(const struct kind *kind, struct tierd_inside_call *calls)
{
	for (uint32_t i = 0; i < kind->count; i++) {
		if (kind == &kinds[0] && i % 2)
			calls[i] = (struct tierd_inside_call){
				.number = SYS_clock_gettime, .argument = {CLOCK_MONOTONIC, 16}, .in_data = 1 << 1};
		else if (kind == &kinds[0])
			calls[i] = (struct tierd_inside_call){.number = SYS_getpid};
		else if (kind != &kinds[1] && i % 2)
			make_write(&calls[i]);
		else
			make_sleep(&calls[i], kind == &kinds[3] ? 300000000 : 1000000);
	}
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* What a quick batch must have said that was made between `before` and now. */
static int right(const struct tierd_inside_call *calls, long process, uint64_t before_ns)
{
	for (int i = 0; i < QUICK; i++) {
		uint64_t said_ns = calls[i].data[2] * 1000000000u + calls[i].data[3];

		if (i % 2 ? calls[i].result || said_ns < before_ns || said_ns > now_ns() : calls[i].result != process)
			return 0;
		if (i % 2)
			before_ns = said_ns;
	}
	return 1;
}

static int run_kind(pid_t tid, uint64_t area, const struct kind *kind, long process, int tell)
{
	struct tierd_inside_call calls[TIERD_CALLS_MAX];
	uint64_t stopped_ns, before_ns = now_ns();
	uint32_t done;
	int error;

	make_batch(kind, calls);
	error = tierd_calls_run(tid, area, calls, kind->count, kind->budget_ns, kind->timeout_ms, &done, &stopped_ns);
	if (tell)
		printf("%d %u %lu\n", error, done, (unsigned long)stopped_ns / 1000);
	if (tell && (error || kind != &kinds[0]))
		return 0;
	if (kind == &kinds[1] && !error)
		return 0;
	if (error || done != kind->count || !right(calls, process, before_ns)) {
		fprintf(stderr, "tierd_calls_run: %s, %u made, first result %ld\n", strerror(-error), done,
			(long)calls[0].result);
		return 1;
	}
	return 0;
}

/* On one CPU with it we mostly interrupt it again before it has run. */
static int starve(pid_t tid, uint64_t area)
{
	struct tierd_inside_call call = {.number = SYS_getpid};
	uint64_t stopped_ns;
	uint32_t done;
	cpu_set_t one;
	int error = 0;

	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	if (sched_setaffinity(0, sizeof(one), &one) || sched_setaffinity(tid, sizeof(one), &one))
		return 1;
	starved = tid;
	for (int i = 0; i < STARVED && (!error || error == -EBUSY); i++)
		error = tierd_calls_run(tid, area, &call, 1, 0, 2000, &done, &stopped_ns);
	printf("%lu\n", (unsigned long)(stack_top - stack_low));
	return error && error != -EBUSY;
}

static int run_blind(pid_t tid, pid_t process, uint64_t area, int error)
{
	struct tierd_inside_call calls[TIERD_CALLS_MAX];
	uint64_t stopped_ns;
	uint32_t done;
	char path[64];
	int mem;

	snprintf(path, sizeof(path), "/proc/%d/mem", process);
	mem = open(path, O_RDWR);
	blind = error;
	make_batch(&kinds[3], calls);
	error = tierd_calls_run(tid, area, calls, kinds[3].count, 2000000, 50, &done, &stopped_ns);
	printf("%d", error);
	do {
		error = tierd_calls_settle(process, mem, area, 10);
		printf(" %d", error);
	} while (error == -ETIMEDOUT);
	printf("\n");
	return mem < 0;
}

static int run_stuck(pid_t tid, uint64_t area, unsigned int ms)
{
	struct tierd_call call = {.number = SYS_getpid};
	struct tierd_inside_call calls[TIERD_CALLS_MAX];
	uint64_t stopped_ns, began_ns = now_ns();
	uint32_t done;
	int error;

	stuck_us = ms * 1000;
	make_batch(&kinds[0], calls);
	error = area ? tierd_calls_run(tid, area, calls, kinds[0].count, 2000000000, 100, &done, &stopped_ns)
		     : tierd_inject(tid, &call, NULL, 0, 100);
	printf("%d %lu\n", error, (unsigned long)(now_ns() - began_ns) / 1000000);
	usleep(stuck_us + 500000); /* it writes, and lets go */
	return 0;
}

static int with_area(pid_t tid, const char *what, uint64_t area, const char *more)
{
	long process = process_of(tid);
	const struct kind *kind = kinds;
	int error;

	if (!strcmp(what, "settle")) {
		printf("%d\n", tierd_calls_settle((int32_t)process, -1, area, (uint32_t)atoi(more)));
		return 0;
	}
	if (!strcmp(what, "destroy")) {
		printf("%d\n", tierd_calls_destroy(tid, area));
		return 0;
	}
	if (!strcmp(what, "starve"))
		return starve(tid, area);
	if (!strcmp(what, "stuck"))
		return run_stuck(tid, area, (unsigned int)atoi(more));
	if (!strcmp(what, "blind"))
		return run_blind(tid, (pid_t)process, area, atoi(more));
	if (!strcmp(what, "for-ever")) {
		error = tierd_calls_settle((int32_t)process, -1, area, 2000);
		if (error)
			fprintf(stderr, "tierd_calls_settle: %s\n", strerror(-error));
		for (int i = 0; !error;
		     i++) /* the second kind is cut by its budget, and is mostly killed in mid-batch */
			error = run_kind(tid, area, &kinds[i % 2], process, 0);
		return 1;
	}
	while (strcmp(kind->name, more))
		if (++kind == kinds + sizeof(kinds) / sizeof(kinds[0]))
			return 2;
	die_at = atoi(what);
	if (!strcmp(what, "stop")) {
		die_at = COMMITTED;
		stop_first = (pid_t)process;
	}
	return run_kind(tid, area, kind, process, 1);
}

static int create(pid_t tid)
{
	uint64_t area;
	int error = tierd_calls_create(tid, &area);

	if (error)
		fprintf(stderr, "tierd_calls_create: %s\n", strerror(-error));
	else
		printf("%lu\n", (unsigned long)area);
	return error != 0;
}

int main(int count, char **arguments)
{
	pid_t tid = count >= 3 ? atoi(arguments[1]) : 0;
	long expected;

	if (!tid)
		return 2;
	if (count > 3)
		return with_area(tid, arguments[2], strtoull(arguments[3], NULL, 10), count > 4 ? arguments[4] : "");
	if (!strcmp(arguments[2], "create"))
		return create(tid);
	if (!strcmp(arguments[2], "naive"))
		return naive(tid);
	die_at = atoi(arguments[2]);
	expected = process_of(tid);
	do {
		struct tierd_call call = {.number = SYS_getpid};
		int error = tierd_inject(tid, &call, NULL, 0, 2000);

		if (error || call.result != expected) {
			fprintf(stderr, "tierd_inject: %s, result %ld\n", strerror(-error), (long)call.result);
			return 1;
		}
	} while (!strcmp(arguments[2], "for-ever"));
	return 0;
}
