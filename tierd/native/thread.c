/* SPDX-License-Identifier: Apache-2.0 */
/*
 * thread.c: fault threads and how they wait.
 *
 * After a fault a thread spins for a while, if spinning has paid lately, and then sleeps in the kernel. Where the faulting
 * thread is pinned to one CPU (a tuned VM's vCPU), the fault thread moves there and sleeps: no idle CPU has to be woken for
 * the next fault, and nothing is burnt.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

enum { FOLLOW_EVERY = 64, CREDIT_MAX = 16, STACK_BYTES = 128 << 10 };

struct tierd_thread {
	struct tierd_guest *g;
	struct tierd_worker *worker;
	struct tierd_thread *next;
	pthread_t id;
	void *stack;
	int cpu;    /* the one we follow, or -1 */
	int credit; /* > 0: spinning has paid */
	uint32_t since_follow;
	cpu_set_t allowed; /* where we may run when we follow nobody */
};

static void cpu_relax(void)
{
#ifdef __x86_64__
	__builtin_ia32_pause();
#else
	__asm__ volatile("yield");
#endif
}

/* Looks whether the faulting thread is pinned, and goes where it is. A tid of another pid namespace names some other thread
 * or none: then we are placed badly, never wrong. */
static void follow(struct tierd_thread *t, uint32_t tid)
{
	cpu_set_t set, one;
	int cpu = -1;

	if (!t->g->follow || (t->since_follow++ % FOLLOW_EVERY))
		return;
	if (tid && !sched_getaffinity((pid_t)tid, sizeof(set), &set) && CPU_COUNT(&set) == 1)
		for (cpu = 0; !CPU_ISSET(cpu, &set); cpu++)
			;
	if (cpu == t->cpu)
		return;
	CPU_ZERO(&one);
	if (cpu >= 0)
		CPU_SET(cpu, &one);
	if (!sched_setaffinity(0, sizeof(one), cpu >= 0 ? &one : &t->allowed))
		t->cpu = cpu;
}

/* Spins for as long as it may; true when there may be a message. */
static bool spin(struct tierd_thread *t, uint64_t last_fault_ns)
{
	struct tierd_guest *g = t->g;

	if (t->cpu >= 0 || !g->spin_us_max || t->credit <= 0 || atomic_load(&g->stopping))
		return false;
	cpu_relax();
	if (sys_now_ns() - last_fault_ns < g->spin_us_max * 1000ull)
		return true;
	t->credit--;
	return false;
}

static void *thread_main(void *argument)
{
	struct tierd_thread *t = argument;
	struct tierd_guest *g = t->g;
	struct pollfd fds[2] = {{.fd = g->uffd, .events = POLLIN}, {.fd = g->stop_fd, .events = POLLIN}};
	uint64_t last_fault_ns = 0;
	bool slept = false;

	while (!atomic_load_explicit(&g->stopping, memory_order_relaxed)) {
		uint32_t tid = 0;
		int n = tierd_worker_serve(t->worker, &tid);

		if (n > 0) {
			uint64_t now_ns = sys_now_ns();

			/* it came soon after the last one: spinning pays, or would have */
			if (now_ns - last_fault_ns < g->spin_us_max * 1000ull && t->credit < CREDIT_MAX)
				t->credit += slept ? 2 : 1;
			last_fault_ns = now_ns;
			slept = false;
			follow(t, tid);
			continue;
		}
		if (n != -EAGAIN && n != -EINTR) /* ESRCH and the like: the VMM is gone; Python sees it by its pidfd */
			count_error(g, &g->count.kernel_errors, n);
		if (n == -EAGAIN && spin(t, last_fault_ns))
			continue;
		poll(fds, 2, n == -EAGAIN ? -1 : 100);
		slept = true;
	}
	return NULL;
}

static void thread_free(struct tierd_thread *t)
{
	if (t->worker)
		tierd_worker_destroy(t->worker);
	if (t->stack)
		sys_free(t->stack, STACK_BYTES);
	sys_free(t, sizeof(*t));
}

static int thread_run(struct tierd_thread *t)
{
	pthread_attr_t attributes;
	int error = pthread_attr_init(&attributes);

	if (error)
		return -error;
	error = pthread_attr_setstack(&attributes, t->stack, STACK_BYTES);
	if (!error)
		error = pthread_create(&t->id, &attributes, thread_main, t);
	pthread_attr_destroy(&attributes);
	return -error;
}

int tierd_guest_start(struct tierd_guest *g)
{
	struct tierd_thread *t = sys_alloc(sizeof(*t));
	int error;

	if (!t)
		return -ENOMEM;
	t->g = g;
	t->cpu = -1;
	t->credit = CREDIT_MAX / 2;
	t->stack = sys_alloc(STACK_BYTES);
	error = t->stack ? tierd_worker_create(g, &t->worker) : -ENOMEM;
	if (!error && g->stop_fd < 0) {
		atomic_store(&g->stopping, false);
		g->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		error = g->stop_fd < 0 ? -errno : 0;
	}
	if (!error && sched_getaffinity(0, sizeof(t->allowed), &t->allowed))
		error = -errno;
	if (!error)
		error = thread_run(t);
	if (error) {
		thread_free(t);
		return error;
	}
	t->next = g->threads;
	g->threads = t;
	atomic_fetch_add(&g->thread_count, 1);
	return 0;
}

int threads_stop(struct tierd_guest *g)
{
	uint64_t one = 1;

	if (g->stop_fd < 0)
		return 0;
	atomic_store(&g->stopping, true);
	if (write(g->stop_fd, &one, sizeof(one)) != sizeof(one))
		abort(); /* an eventfd of our own takes a one */
	while (g->threads) {
		struct tierd_thread *t = g->threads;

		pthread_join(t->id, NULL);
		g->threads = t->next;
		thread_free(t);
	}
	atomic_store(&g->thread_count, 0);
	close(g->stop_fd);
	g->stop_fd = -1;
	return 0;
}

void tierd_guest_stop(struct tierd_guest *g)
{
	threads_stop(g);
}

uint64_t threads_busy_since(struct tierd_guest *g)
{
	uint64_t oldest = 0;

	for (struct tierd_thread *t = g->threads; t; t = t->next) {
		uint64_t since = tierd_worker_busy_since(t->worker);

		if (since && (!oldest || since < oldest))
			oldest = since;
	}
	return oldest;
}
