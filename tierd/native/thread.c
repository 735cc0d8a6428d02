/* SPDX-License-Identifier: Apache-2.0 */
/*
 * thread.c: fault threads and how they wait.
 *
 * After a fault a thread spins for a while, if spinning has paid lately, and then sleeps in the kernel. Where the faulting
 * thread is pinned to one CPU (a tuned VM's vCPU), the fault thread moves there and sleeps: no idle CPU has to be woken for
 * the next fault, and nothing is burnt.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

enum { FOLLOW_EVERY = 64, CREDIT_MAX = 16, IDLE_MS_MAX = 10000, FAILED_MS = 100 };
enum { KICK_SIGNAL = SIGURG, KICK_EVERY_US = 1000 };
#ifdef __SANITIZE_THREAD__
enum { STACK_BYTES = 2 << 20 }; /* the sanitizer's own share is most of a mebibyte */
#else
enum { STACK_BYTES = 128 << 10 };
#endif

struct tierd_thread {
	struct tierd_guest *g;
	struct tierd_worker *worker;
	struct tierd_thread *next;
	pthread_t id;
	void *stack;
	bool ended; /* by itself; to be joined. Under the lock */
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

/* Whether we get time beside it on its CPU: not beside a real-time vCPU that polls, and then the others would wait for us. */
static bool gives_way(pid_t tid)
{
	int policy = sched_getscheduler(tid);

	return policy >= 0 && (policy & ~SCHED_RESET_ON_FORK) != SCHED_FIFO &&
	       (policy & ~SCHED_RESET_ON_FORK) != SCHED_RR;
}

/* Looks whether the faulting thread is pinned, and goes where it is. A tid of another pid namespace names some other thread
 * or none: then we are placed badly, never wrong. */
static void follow(struct tierd_thread *t, uint32_t tid)
{
	cpu_set_t set, one;
	int cpu = -1;

	if (!t->g->follow || (t->since_follow++ % FOLLOW_EVERY))
		return;
	if (tid && !sched_getaffinity((pid_t)tid, sizeof(set), &set) && CPU_COUNT(&set) == 1 && gives_way((pid_t)tid))
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

/* Idle for long, and somebody else is there for the next fault: true, once. */
static bool retire(struct tierd_thread *t)
{
	struct tierd_guest *g = t->g;
	bool other = false;

	pthread_mutex_lock(&g->threads_lock);
	for (struct tierd_thread *o = g->threads; o; o = o->next)
		other |= o != t && !o->ended && !tierd_worker_busy_since(o->worker);
	t->ended = other;
	if (other)
		atomic_fetch_sub(&g->thread_count, 1);
	pthread_mutex_unlock(&g->threads_lock);
	return other;
}

/* Until a message comes, the guest is left, Python has answered, or a parked fault is due; true when nothing of it happened for IDLE_MS_MAX. */
static bool wait_idle(struct tierd_thread *t, uint64_t due_ns, bool failed)
{
	struct tierd_guest *g = t->g;
	struct pollfd fds[] = {{.fd = g->uffd, .events = POLLIN},
			       {.fd = g->stop_fd, .events = POLLIN},
			       {.fd = g->answer_fd, .events = POLLIN}};
	uint64_t now_ns = due_ns ? sys_now_ns() : 0, rung;
	int ready;
	int ms = atomic_load(&g->thread_count) > 1 ? IDLE_MS_MAX : -1;

	if (failed)
		ms = FAILED_MS;
	else if (due_ns)
		ms = due_ns > now_ns ? (int)((due_ns - now_ns) / 1000000) + 1 : 0;
	ready = poll(fds, sizeof(fds) / sizeof(fds[0]), ms);
	if (ready > 0 && fds[2].revents && read(g->answer_fd, &rung, sizeof(rung)) < 0 && errno != EAGAIN)
		abort(); /* another thread may have taken it, and deals with all answers */
	return !ready && ms == IDLE_MS_MAX;
}

void ring(int eventfd)
{
	uint64_t one = 1;

	if (eventfd >= 0 && write(eventfd, &one, sizeof(one)) != sizeof(one) && errno != EAGAIN)
		abort(); /* EAGAIN: it has been rung 2^64 times */
}

/*
 * O_NONBLOCK belongs to the open file, which the VMM shares: it can clear the flag at any time, and then a fault thread may
 * sleep in read(2), where neither stop_fd nor a parked fault reaches it. A signal does: its handler does nothing, and without
 * SA_RESTART read ends with EINTR. It may come just before the read; whoever needs the thread sends it again.
 */
static void kick(struct tierd_thread *t)
{
	if (!tierd_worker_busy_since(t->worker)) /* not into its I/O */
		pthread_kill(t->id, KICK_SIGNAL);
}

static void on_kick(int number)
{
	(void)number;
}

int tierd_guest_keep_nonblocking(struct tierd_guest *g)
{
	int flags = fcntl(g->uffd, F_GETFL);

	if (flags < 0 || (!(flags & O_NONBLOCK) && fcntl(g->uffd, F_SETFL, flags | O_NONBLOCK)))
		return -errno;
	if ((flags & O_NONBLOCK) && !atomic_load(&g->parked_pages) && !atomic_load(&g->answers))
		return 0;
	pthread_mutex_lock(&g->threads_lock);
	for (struct tierd_thread *t = g->threads; t; t = t->next)
		if (!t->ended)
			kick(t);
	pthread_mutex_unlock(&g->threads_lock);
	return 0;
}

static void *thread_main(void *argument)
{
	struct tierd_thread *t = argument;
	struct tierd_guest *g = t->g;
	uint64_t last_fault_ns = 0;
	bool slept = false;
	sigset_t kicks;

	sigemptyset(&kicks);
	sigaddset(&kicks, KICK_SIGNAL);
	pthread_sigmask(SIG_UNBLOCK, &kicks, NULL);
	while (!atomic_load_explicit(&g->stopping, memory_order_relaxed)) {
		uint64_t due_ns = 0;
		uint32_t tid = 0;
		int n = tierd_worker_serve(t->worker, &tid);

		if (atomic_load_explicit(&g->answers, memory_order_relaxed))
			tierd_worker_answers(t->worker);
		if (atomic_load_explicit(&g->parked_pages, memory_order_relaxed))
			tierd_worker_retry(t->worker, &due_ns);
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
		if (wait_idle(t, due_ns, n != -EAGAIN) && retire(t))
			break;
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

static void join_one(struct tierd_thread *t)
{
	kick(t);
	while (pthread_tryjoin_np(t->id, NULL) == EBUSY) {
		sys_pause_us(KICK_EVERY_US);
		kick(t);
	}
}

static void join(struct tierd_thread *threads)
{
	while (threads) {
		struct tierd_thread *t = threads;

		threads = t->next;
		join_one(t);
		thread_free(t);
	}
}

/* Out of the guest's list: those that ended by themselves. */
static struct tierd_thread *take_ended(struct tierd_guest *g)
{
	struct tierd_thread **at = &g->threads, *taken = NULL;

	while (*at) {
		struct tierd_thread *t = *at;

		if (!t->ended) {
			at = &t->next;
			continue;
		}
		*at = t->next;
		t->next = taken;
		taken = t;
	}
	return taken;
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
	struct sigaction action = {.sa_handler = on_kick};
	int error;

	if (!t)
		return -ENOMEM;
	sigaction(KICK_SIGNAL, &action, NULL);
	t->g = g;
	t->cpu = -1;
	t->credit = CREDIT_MAX / 2;
	t->stack = sys_alloc(STACK_BYTES);
	error = t->stack ? tierd_worker_create(g, &t->worker) : -ENOMEM;
	if (!error)
		error = tierd_guest_keep_nonblocking(g);
	pthread_mutex_lock(&g->threads_lock);
	join(take_ended(g));
	if (!error && g->stop_fd < 0) {
		atomic_store(&g->stopping, false);
		g->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		error = g->stop_fd < 0 ? -errno : 0;
	}
	if (!error && g->asking && g->answer_fd < 0) {
		g->answer_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		error = g->answer_fd < 0 ? -errno : 0;
	}
	if (!error && sched_getaffinity(0, sizeof(t->allowed), &t->allowed))
		error = -errno;
	if (!error)
		error = thread_run(t);
	if (!error) {
		t->next = g->threads;
		g->threads = t;
		atomic_fetch_add(&g->thread_count, 1);
	}
	pthread_mutex_unlock(&g->threads_lock);
	if (error)
		thread_free(t);
	return error;
}

int threads_stop(struct tierd_guest *g)
{
	struct tierd_thread *threads;
	uint64_t one = 1;

	if (g->stop_fd < 0)
		return 0;
	atomic_store(&g->stopping, true);
	if (write(g->stop_fd, &one, sizeof(one)) != sizeof(one))
		abort(); /* an eventfd of our own takes a one */
	pthread_mutex_lock(&g->threads_lock);
	threads = g->threads;
	g->threads = NULL;
	pthread_mutex_unlock(&g->threads_lock);
	join(threads);
	atomic_store(&g->thread_count, 0);
	close(g->stop_fd);
	g->stop_fd = -1;
	if (g->answer_fd >= 0)
		close(g->answer_fd);
	g->answer_fd = -1;
	return 0;
}

void tierd_guest_stop(struct tierd_guest *g)
{
	threads_stop(g);
}

void tierd_guest_health(struct tierd_guest *g, uint64_t hung_ns, struct tierd_health *ret)
{
	uint64_t io_since_ns = atomic_load(&g->worker_io_since_ns), now_ns, answered_ns;

	for (unsigned int lane = 0; lane < STORING_LANES; lane++) {
		uint64_t since_ns = atomic_load(&g->storing_since_ns[lane]);

		if (since_ns && (!io_since_ns || since_ns < io_since_ns))
			io_since_ns = since_ns;
	}
	now_ns = sys_now_ns(); /* after that of whoever began just now */
	*ret = (struct tierd_health){.parked_pages = atomic_load(&g->parked_pages),
				     .asked_pages = atomic_load(&g->asked_pages),
				     .overdue_ns = parking_overdue_ns(g, now_ns),
				     .worker_io_ns = io_since_ns ? now_ns - io_since_ns : 0,
				     .pages_lost = atomic_load(&g->count.pages_lost),
				     .spent_pages = atomic_load(&g->spent_pages)};
	asking_ages(g, now_ns, ret->asked_ns, &answered_ns);
	if (answered_ns > ret->overdue_ns)
		ret->overdue_ns = answered_ns;
	pthread_mutex_lock(&g->threads_lock);
	for (struct tierd_thread *t = g->threads; t; t = t->next) {
		uint64_t since_ns = tierd_worker_busy_since(t->worker);
		uint64_t busy_ns = since_ns && now_ns > since_ns ? now_ns - since_ns : 0;

		ret->fault_threads += !t->ended;
		ret->hung_threads += busy_ns > hung_ns;
		if (busy_ns > ret->oldest_busy_ns)
			ret->oldest_busy_ns = busy_ns;
	}
	pthread_mutex_unlock(&g->threads_lock);
}
