/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject_killer.c: a tracer that dies.
 *
 *   inject_killer TID STEP         one call in thread TID; SIGKILL to itself at step STEP (0: never)
 *   inject_killer TID for-ever     calls without a pause, to be killed from outside
 *   inject_killer TID naive        the call as a tracer would do it that does not think of its death, which comes in mid-call
 *
 * Compiled together with tierd/native/inject*.c, whose steps it hooks.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "inject_step.h"
#include "tierd.h"

static int die_at;

void inject_step(int n)
{
	if (n == die_at)
		kill(getpid(), SIGKILL);
}

#ifdef __x86_64__
/* Points the thread at a system call, and would put its registers back afterwards. */
static int naive(pid_t tid)
{
	struct user_regs_struct registers, changed;
	int status;

	if (ptrace(PTRACE_SEIZE, tid, NULL, NULL) || ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) ||
	    waitpid(tid, &status, __WALL) != tid || ptrace(PTRACE_GETREGS, tid, NULL, &registers))
		return 1;
	changed = registers;
	changed.rax = SYS_getpid;
	changed.orig_rax = (unsigned long)-1;
	changed.rbx = changed.rdx = changed.rsi = 0x5151515151515151;
	if (ptrace(PTRACE_SETREGS, tid, NULL, &changed))
		return 1;
	return kill(getpid(), SIGKILL); /* before it puts them back */
}
#endif

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

int main(int count, char **arguments)
{
	pid_t tid = count == 3 ? atoi(arguments[1]) : 0;
	long expected;

	if (!tid)
		return 2;
#ifdef __x86_64__
	if (!strcmp(arguments[2], "naive"))
		return naive(tid);
#endif
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
