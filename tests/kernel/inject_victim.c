/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject_victim.c: a process whose threads would notice if a call made in them left a trace.
 *
 * Each thread is in a state that an excursion could spoil: general and vector registers full of values, blocked in calls that
 * the kernel restarts or that it does not, handling signals on an alternate stack, inside a restartable sequence. Each checks
 * itself all the time and counts its rounds. One line on stdin, one line with all counters on stdout; a thread that finds
 * something wrong says so and aborts.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 8, RED_WORDS = 15, ALTERNATE_BYTES = 65536 };

static const char *const names[THREADS] = {"compute", "read", "sleep", "futex", "epoll", "signals", "poll", "rseq"};
static _Atomic uint64_t rounds[THREADS];
static int pipes[THREADS][2];
static uint32_t futex_word;

_Noreturn static void wrong(const char *what)
{
	fprintf(stderr, "WRONG %s: %s\n", what, strerror(errno));
	abort();
}

/* --- registers ---------------------------------------------------------------------------------------------------------- */

typedef double lanes __attribute__((vector_size(32)));

static uint64_t work_out(lanes *out)
{
	uint64_t a = 1, b = 2, c = 3, d = 4, e = 5, f = 6, g = 7, h = 8;
	lanes w = {1, 2, 3, 4}, x = {5, 6, 7, 8}, y = {9, 10, 11, 12}, z = {13, 14, 15, 16};

	for (int i = 0; i < 20000; i++) {
		a = a * 6364136223846793005u + b;
		b ^= c >> 7;
		c += d * 3;
		d = d << 5 | d >> 59;
		e ^= a + f;
		f -= g;
		g = g * 31 + h;
		h ^= a >> 3;
		w = w * 0.999 + x;
		x = x * 0.5 + y;
		y = y * 0.25 + z;
		z = z * 0.125 + (lanes){1, 1, 1, 1};
	}
	*out = w + x + y + z;
	return a ^ b ^ c ^ d ^ e ^ f ^ g ^ h;
}

#if defined(__x86_64__)
/* A leaf function may keep values below its stack pointer: the red zone. */
static void check_more_registers(void)
{
	uint64_t ok;

	__asm__ volatile("mov $0x5a5a5a5a5a5a5a5a, %%rax\n"
			 "mov %%rax, -8(%%rsp)\n mov %%rax, -64(%%rsp)\n mov %%rax, -128(%%rsp)\n"
			 "mov $20000, %%ecx\n"
			 "1: dec %%ecx\n jnz 1b\n"
			 "mov -8(%%rsp), %%rcx\n and -64(%%rsp), %%rcx\n and -128(%%rsp), %%rcx\n"
			 "xor %%rax, %%rcx\n mov %%rcx, %0\n"
			 : "=r"(ok)
			 :
			 : "rax", "rcx", "memory", "cc");
	if (ok)
		wrong("red zone");
}
#elif defined(__aarch64__)
/* All registers at once; and what vectors hold beyond 128 bits, where there are such. */
static void check_more_registers(void)
{
	uint64_t bad, lanes_bad = 0;

	__asm__ volatile(
		"stp x18, x29, [sp, #-16]!\n"
		".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,19,20,21,22,23,24,25,26,27,28\n"
		"mov x\\n, #0x100 + \\n\n"
		".endr\n"
		".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
		"movi v\\n\\().16b, #\\n\n"
		".endr\n"
		"mov x30, #20000\n"
		"1: subs x30, x30, #1\n b.ne 1b\n"
		".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,19,20,21,22,23,24,25,26,27,28\n"
		"sub x\\n, x\\n, #0x100 + \\n\n orr x30, x30, x\\n\n"
		".endr\n"
		".irp n, 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
		"eor v0.16b, v0.16b, v\\n\\().16b\n" /* 0 ^ 1 ^ ... ^ 31 is 0 */
		".endr\n"
		"umaxv b0, v0.16b\n fmov w0, s0\n orr x30, x30, x0\n"
		"ldp x18, x29, [sp], #16\n"
		"mov %0, x30\n"
		: "=r"(bad)
		:
		: "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15",
		  "x16", "x17", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30", "v0", "v1",
		  "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16",
		  "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30",
		  "v31", "memory", "cc");
	if (getauxval(AT_HWCAP) & HWCAP_SVE)
		__asm__ volatile(".arch_extension sve\n"
				 "ptrue p0.b\n index z0.b, #3, #1\n mov z31.d, z0.d\n ptrue p7.b\n"
				 "mov w9, #20000\n"
				 "1: subs w9, w9, #1\n b.ne 1b\n"
				 "index z1.b, #3, #1\n"
				 "cmpne p1.b, p7/z, z0.b, z1.b\n cntp %0, p7, p1.b\n"
				 "cmpne p1.b, p0/z, z31.b, z1.b\n cntp x9, p0, p1.b\n add %0, %0, x9\n"
				 "cntp x9, p7, p0.b\n add %0, %0, x9\n cntb x9\n sub %0, %0, x9\n"
				 ".arch_extension nosve\n"
				 : "=&r"(lanes_bad)
				 :
				 : "x9", "v0", "v1", "v31", "cc");
	if (bad || lanes_bad)
		wrong(bad ? "all registers" : "long vectors");
}
#endif

static void *compute(void *unused)
{
	lanes vector, first_vector;
	uint64_t first = work_out(&first_vector);

	(void)unused;
	prctl(PR_SET_NAME, names[0]);
	for (;; rounds[0]++) {
		if (work_out(&vector) != first || memcmp(&vector, &first_vector, sizeof(vector)))
			wrong("registers");
		check_more_registers();
	}
	return NULL;
}

/* --- blocked ------------------------------------------------------------------------------------------------------------ */

static void *read_pipe(void *unused)
{
	uint64_t expected = 0, got;

	(void)unused;
	prctl(PR_SET_NAME, names[1]);
	for (;; expected++, atomic_fetch_add(&rounds[1], 1))
		if (read(pipes[1][0], &got, sizeof(got)) != sizeof(got) || got != expected)
			wrong("read");
	return NULL;
}

#ifdef __aarch64__
/* Where tierd looks first in a program: with a vdso that has no such place, its call is made by the instruction that is slept in. */
long sleep_in_place(const struct timespec *t, struct timespec *left);
__asm__(".pushsection .text.unlikely, \"ax\"\n"
	".balign 4\n"
	"sleep_in_place: mov x8, #101\n svc #0\n ret\n"
	".popsection\n");
#endif

static int sleep_for(const struct timespec *t)
{
#ifdef __aarch64__
	long result = sleep_in_place(t, NULL);

	errno = (int)-result;
	return result ? -1 : 0;
#else
	return nanosleep(t, NULL);
#endif
}

/* EINTR is what an interrupted sleep says; nothing else is right. */
static void *sleep_a_while(void *unused)
{
	(void)unused;
	prctl(PR_SET_NAME, names[2]);
	for (;; rounds[2]++) {
		struct timespec t = {0, 3000000};

		if (sleep_for(&t) && errno != EINTR)
			wrong("nanosleep");
	}
	return NULL;
}

static void *wait_futex(void *unused)
{
	(void)unused;
	prctl(PR_SET_NAME, names[3]);
	for (;; rounds[3]++) {
		uint32_t seen = __atomic_load_n(&futex_word, __ATOMIC_SEQ_CST);

		if (syscall(SYS_futex, &futex_word, FUTEX_WAIT, seen, NULL, NULL, 0) && errno != EAGAIN &&
		    errno != EINTR)
			wrong("futex");
	}
	return NULL;
}

static void *wait_epoll(void *unused)
{
	int epoll = epoll_create1(0);
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 42};
	uint64_t got;

	(void)unused;
	prctl(PR_SET_NAME, names[4]);
	if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, pipes[4][0], &event))
		wrong("epoll");
	for (;; rounds[4]++) {
		int n = epoll_wait(epoll, &event, 1, -1);

		if (n < 0 && errno == EINTR)
			continue;
		if (n != 1 || event.data.u64 != 42 || read(pipes[4][0], &got, sizeof(got)) != sizeof(got))
			wrong("epoll_wait");
	}
	return NULL;
}

static void *wait_poll(void *unused)
{
	struct pollfd fd = {.fd = pipes[6][0], .events = POLLIN};

	(void)unused;
	prctl(PR_SET_NAME, names[6]);
	for (;; rounds[6]++)
		if (poll(&fd, 1, 3) && errno != EINTR)
			wrong("poll");
	return NULL;
}

/* --- signals on an alternate stack -------------------------------------------------------------------------------------- */

static _Thread_local volatile uint64_t handled;

static void on_alarm(int number)
{
	(void)number;
	handled++;
}

static void *take_signals(void *alternate)
{
	stack_t stack = {.ss_sp = alternate, .ss_size = ALTERNATE_BYTES}, now;
	sigset_t mask, blocked;
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM};
	struct itimerspec every = {{0, 50000}, {0, 50000}};
	timer_t timer;

	prctl(PR_SET_NAME, names[5]);
	event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	if (sigaltstack(&stack, NULL) || pthread_sigmask(SIG_BLOCK, &mask, NULL) ||
	    timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &every, NULL))
		wrong("signals");
	for (;; rounds[5]++) {
		uint64_t before = handled;

		while (handled == before)
			;
		if (sigaltstack(NULL, &now) || now.ss_sp != alternate || now.ss_flags ||
		    pthread_sigmask(SIG_SETMASK, NULL, &blocked) || !sigismember(&blocked, SIGUSR2) ||
		    sigismember(&blocked, SIGUSR1))
			wrong("signal state");
	}
	return NULL;
}

/* --- restartable sequences ---------------------------------------------------------------------------------------------- */

/*
 * One sequence, rseq(2), in which the thread spends nearly all of its time. Whoever leaves it in the middle must come back to the
 * abort handler. The kernel forgets a sequence that it finds left: so one that is still there at the end was never left.
 */
#ifdef __x86_64__
static void run_sequence(struct rseq *abi, uint64_t *committed)
{
	__asm__ goto volatile(".pushsection __rseq_cs, \"aw\"\n"
			      ".balign 32\n"
			      "3: .long 0, 0\n"
			      ".quad 1f, 2f - 1f, 4f\n"
			      ".popsection\n"
			      "lea 3b(%%rip), %%rax\n"
			      "mov %%rax, %[section]\n"
			      "1: mov $20000, %%ecx\n"
			      "5: dec %%ecx\n"
			      "jnz 5b\n"
			      "cmpq $0, %[section]\n"
			      "je %l[left]\n"
			      "incq %[committed]\n"
			      "2:\n"
			      ".pushsection .text.rseq, \"ax\"\n"
			      ".byte 0x0f, 0xb9, 0x3d\n"
			      ".long 0x53053053\n" /* RSEQ_SIG */
			      "4: jmp %l[aborted]\n"
			      ".popsection\n"
			      :
			      : [section] "m"(abi->rseq_cs), [committed] "m"(*committed)
			      : "rax", "rcx", "memory", "cc"
			      : left, aborted);
aborted:
	return;
left:
	errno = 0;
	wrong("a restartable sequence went on after it had been left");
}
#elif defined(__aarch64__)
static void run_sequence(struct rseq *abi, uint64_t *committed)
{
	__asm__ goto volatile(".pushsection __rseq_cs, \"aw\"\n"
			      ".balign 32\n"
			      "3: .long 0, 0\n"
			      ".quad 1f, 2f - 1f, 4f\n"
			      ".popsection\n"
			      "adrp x9, 3b\n"
			      "add x9, x9, :lo12:3b\n"
			      "str x9, %[section]\n"
			      "1: mov w9, #20000\n"
			      "5: subs w9, w9, #1\n"
			      "b.ne 5b\n"
			      "ldr x9, %[section]\n"
			      "cbz x9, %l[left]\n"
			      "ldr x9, %[committed]\n"
			      "add x9, x9, #1\n"
			      "str x9, %[committed]\n"
			      "2:\n"
			      ".pushsection .text.rseq, \"ax\"\n"
			      ".inst 0xd428bc00\n" /* RSEQ_SIG */
			      "4: b %l[aborted]\n"
			      ".popsection\n"
			      :
			      : [section] "m"(abi->rseq_cs), [committed] "m"(*committed)
			      : "x9", "memory", "cc"
			      : left, aborted);
aborted:
	return;
left:
	errno = 0;
	wrong("a restartable sequence went on after it had been left");
}
#endif

static void *run_sequences(void *unused)
{
	struct rseq *abi = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	uint64_t committed = 0;

	(void)unused;
	prctl(PR_SET_NAME, names[7]);
	for (;; rounds[7]++) {
		if (__rseq_size)
			run_sequence(abi, &committed);
		if (rounds[7] > 100000 && __rseq_size && !committed)
			wrong("no sequence is ever committed");
	}
	return NULL;
}

/* --- the main thread keeps the others going ----------------------------------------------------------------------------- */

int main(void)
{
	void *(*const run[THREADS])(void *) = {compute,    read_pipe,    sleep_a_while, wait_futex,
					       wait_epoll, take_signals, wait_poll,     run_sequences};
	struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_ONSTACK | SA_RESTART};
	struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
	pthread_t thread;
	uint64_t number = 0;

	if (sigaction(SIGALRM, &action, NULL))
		return 1;
	for (int i = 0; i < THREADS; i++)
		if (pipe(pipes[i]) || pthread_create(&thread, NULL, run[i], malloc(ALTERNATE_BYTES)))
			return 1;
	for (;; number++) {
		int n = poll(&input, 1, 2);

		if (n > 0) {
			char line[64];

			if (read(STDIN_FILENO, line, sizeof(line)) <= 0)
				return 0;
			for (int i = 0; i < THREADS; i++)
				printf("%s=%lu ", names[i], (unsigned long)rounds[i]);
			printf("\n");
			fflush(stdout);
		}
		if (write(pipes[1][1], &number, sizeof(number)) != sizeof(number) ||
		    write(pipes[4][1], &number, sizeof(number)) != sizeof(number))
			wrong("write");
		__atomic_add_fetch(&futex_word, 1, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, &futex_word, FUTEX_WAKE, 1, NULL, NULL, 0);
	}
}
