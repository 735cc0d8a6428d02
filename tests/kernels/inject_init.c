/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject_init.c: process 1 of a kernel of an architecture that is not this machine's: no more than calls inside a VMM
 * (tests/kernel/inject_victim.c and inject_killer.c, as /victim and /killer) are tried in it, by the cases of
 * tests/kernel/test_inject.py. One line for each case; the last is "exit 0" if all went well.
 *
 * On the kernel's command line: "calls=N", in each thread, and "kills=N" at random moments, of single calls and again of batches.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 8, ALIVE_US_MAX = 300000, WAIT_MS = 60000, LOOK_EVERY = 25 };

static const char *const names[THREADS] = {"compute", "read", "sleep", "futex", "epoll", "signals", "poll", "rseq"};
static const int steps[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, batch_steps[] = {1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15};
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static struct {
	pid_t pid, tids[THREADS];
	int ask, answer, complaint;
} victim;
static char area[32];
static uint64_t began_ns;
static int calls = 5, kills = 20;

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

_Noreturn static void end(int status)
{
	printf("exit %d\n", status);
	fflush(stdout);
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

#define MUST(good, ...)                                                                                                \
	do {                                                                                                           \
		if (!(good)) {                                                                                         \
			printf("FAILED, line %d: %s: ", __LINE__, #good);                                              \
			printf(__VA_ARGS__);                                                                           \
			printf("\n");                                                                                  \
			complain();                                                                                    \
		}                                                                                                      \
	} while (0)

_Noreturn static void complain(void)
{
	struct pollfd fd = {victim.complaint, POLLIN, 0};
	char text[4096];
	ssize_t n = victim.complaint && poll(&fd, 1, 1000) > 0 ? read(victim.complaint, text, sizeof(text)) : 0;

	printf("the victim says: %.*s\n", (int)(n > 0 ? n : 0), text);
	end(1);
}

static void passed(const char *what)
{
	printf("%7.1f s: %s\n", (double)(now_ns() - began_ns) / 1e9, what);
	fflush(stdout);
}

static void sleep_us(unsigned int us)
{
	struct timespec t = {us / 1000000, us % 1000000 * 1000};

	nanosleep(&t, NULL);
}

static size_t read_file(const char *path, char *text, size_t bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? 0 : read(fd, text, bytes - 1);

	close(fd);
	text[n > 0 ? n : 0] = 0;
	return strlen(text);
}

/* --- the victim --------------------------------------------------------------------------------------------------------- */

static void find_threads(void)
{
	for (int at = victim.pid, found = 0; found < THREADS; at++) {
		char path[64], name[64];

		MUST(at < victim.pid + 1000, "only %d threads", found);
		snprintf(path, sizeof(path), "/proc/%d/task/%d/comm", victim.pid, at);
		if (!read_file(path, name, sizeof(name)))
			continue;
		name[strcspn(name, "\n")] = 0;
		for (int i = 0; i < THREADS; i++)
			if (!strcmp(name, names[i])) {
				victim.tids[i] = at;
				found++;
			}
	}
}

static void start_victim(void)
{
	int in[2], out[2], err[2];

	MUST(!pipe2(in, O_CLOEXEC) && !pipe2(out, O_CLOEXEC) && !pipe2(err, O_CLOEXEC), "%s", strerror(errno));
	fflush(stdout);
	victim.pid = fork();
	if (!victim.pid) {
		dup2(in[0], 0);
		dup2(out[1], 1);
		dup2(err[1], 2);
		execl("/victim", "victim", NULL);
		_exit(127);
	}
	close(in[0]);
	close(out[1]);
	close(err[1]);
	victim.ask = in[1];
	victim.answer = out[0];
	victim.complaint = err[0];
	sleep_us(1000000);
	find_threads();
}

static void end_victim(void)
{
	kill(victim.pid, SIGKILL);
	waitpid(victim.pid, NULL, 0);
	close(victim.ask);
	close(victim.answer);
	close(victim.complaint);
	victim.complaint = 0;
}

static bool read_rounds(uint64_t *rounds)
{
	struct pollfd fd = {victim.answer, POLLIN, 0};
	char text[1024];
	ssize_t n;

	if (write(victim.ask, "?\n", 2) != 2 || poll(&fd, 1, WAIT_MS) != 1)
		return false;
	n = read(victim.answer, text, sizeof(text) - 1);
	if (n <= 0)
		return false;
	text[n] = 0;
	for (int i = 0; i < THREADS; i++) {
		const char *word = strstr(text, names[i]);

		if (!word)
			return false;
		rounds[i] = strtoull(word + strlen(names[i]) + 1, NULL, 10);
	}
	return true;
}

/* Nobody is stopped or traced, and every thread goes on. */
static bool is_unharmed(void)
{
	uint64_t before[THREADS], now[THREADS], until_ns = now_ns() + WAIT_MS * 1000000ull;
	int on = 0;

	if (!read_rounds(before))
		return false;
	while (on < THREADS) {
		sleep_us(10000);
		if (!read_rounds(now) || now_ns() > until_ns)
			return false;
		on = 0;
		for (int i = 0; i < THREADS; i++)
			on += now[i] > before[i];
	}
	for (int i = 0; i < THREADS; i++) {
		char path[64], text[4096];

		snprintf(path, sizeof(path), "/proc/%d/task/%d/status", victim.pid, victim.tids[i]);
		if (!read_file(path, text, sizeof(text)) || !strstr(text, "TracerPid:\t0\n") ||
		    strcasestr(text, "State:\tT"))
			return false;
	}
	return true;
}

static int bytes_written(void)
{
	struct pollfd fd = {victim.complaint, POLLIN, 0};
	char text[4096];

	return poll(&fd, 1, 0) > 0 ? (int)read(victim.complaint, text, sizeof(text)) : 0;
}

/* --- the killer --------------------------------------------------------------------------------------------------------- */

struct killer {
	pid_t pid;
	int out;
};

static struct killer start_killer(int thread, const char *what, const char *where, const char *more)
{
	struct killer k;
	char tid[16];
	int out[2];

	snprintf(tid, sizeof(tid), "%d", victim.tids[thread]);
	MUST(!pipe2(out, O_CLOEXEC), "%s", strerror(errno));
	k.pid = fork();
	if (!k.pid) {
		dup2(out[1], 1);
		dup2(out[1], 2);
		execl("/killer", "killer", tid, what, where, more, NULL);
		_exit(127);
	}
	close(out[1]);
	k.out = out[0];
	return k;
}

/* Its status as from wait(2), and what it said. */
static int end_killer(struct killer k, char *said, size_t bytes)
{
	size_t have = 0;
	ssize_t n;
	int status;

	while (have + 1 < bytes && (n = read(k.out, said + have, bytes - 1 - have)) > 0)
		have += (size_t)n;
	said[have] = 0;
	close(k.out);
	MUST(waitpid(k.pid, &status, 0) == k.pid, "%s", strerror(errno));
	return status;
}

static char said[1024];

static int run_killer(int thread, const char *what, const char *where, const char *more)
{
	return end_killer(start_killer(thread, what, where, more), said, sizeof(said));
}

static void die_at(int thread, int step, const char *where, const char *kind)
{
	char text[16];
	int status;

	snprintf(text, sizeof(text), "%d", step);
	status = run_killer(thread, text, where, kind);
	MUST(status == SIGKILL, "%s, step %d: status %d, %s", names[thread], step, status, said);
}

/* The number that it printed. */
static int answer(int thread, const char *what, const char *more)
{
	int status = run_killer(thread, what, area, more);

	MUST(!status, "%s %s: status %d, %s", names[thread], what, status, said);
	return atoi(said);
}

static void run_batch(int thread, const char *kind, int error, int made)
{
	int got_error = 1, got_made = -1, status = run_killer(thread, "0", area, kind);

	MUST(!status && sscanf(said, "%d %d", &got_error, &got_made) == 2, "%s: status %d, %s", names[thread], status,
	     said);
	MUST(got_error == error && (got_made == made || made < 0), "%s %s: %s", names[thread], kind, said);
}

static void make_area(int thread)
{
	int status = run_killer(thread, "create", NULL, NULL);

	MUST(!status, "%s: %s", names[thread], said);
	said[strcspn(said, "\n")] = 0;
	snprintf(area, sizeof(area), "%.20s", said);
}

static uint64_t next_random(void)
{
	static uint64_t state = 88172645463325252u;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void kill_at_random(const char *where)
{
	for (int i = 0; i < kills; i++) {
		int thread = (int)(next_random() % THREADS), status;
		struct killer k = start_killer(thread, "for-ever", where, NULL);

		sleep_us((unsigned int)(next_random() % ALIVE_US_MAX));
		kill(k.pid, SIGKILL);
		status = end_killer(k, said, sizeof(said));
		MUST(status == SIGKILL, "kill %d in %s: status %d, %s", i, names[thread], status, said);
		if (i % LOOK_EVERY == LOOK_EVERY - 1)
			MUST(is_unharmed(), "after kill %d", i);
	}
	MUST(is_unharmed(), "after %d kills", kills);
}

/* --- the cases ---------------------------------------------------------------------------------------------------------- */

static void single_calls(void)
{
	for (int i = 0; i < THREADS; i++)
		for (int k = 0; k < calls; k++) {
			int status = run_killer(i, "0", NULL, NULL);

			MUST(!status, "%s: status %d, %s", names[i], status, said);
		}
	MUST(is_unharmed(), "after calls");
	passed("single calls in every thread");
	for (int i = 0; i < THREADS; i++) {
		for (size_t k = 0; k < COUNT(steps); k++)
			die_at(i, steps[k], NULL, NULL);
		MUST(is_unharmed(), "after deaths in %s", names[i]);
	}
	passed("a death at every step of a single call");
	kill_at_random(NULL);
	passed("deaths at random moments of single calls");
}

static void batches(void)
{
	for (int i = 0; i < THREADS; i++) {
		make_area(i);
		run_batch(i, "quick", 0, 40);
		MUST(!answer(i, "destroy", ""), "%s: %s", names[i], said);
		run_batch(i, "quick", -EFAULT, 0);
	}
	MUST(is_unharmed(), "after areas");
	passed("areas come and go");
	make_area(0);
	for (int i = 0; i < THREADS; i++)
		for (int k = 0; k < calls; k++)
			run_batch(i, "quick", 0, 40);
	MUST(is_unharmed(), "after batches");
	passed("batches in every thread");
	for (int i = 0; i < THREADS; i++) {
		for (size_t k = 0; k < COUNT(batch_steps); k++) {
			die_at(i, batch_steps[k], area, "sleeps");
			MUST(!answer(i, "settle", "10000"), "%s, step %d: %s", names[i], batch_steps[k], said);
		}
		MUST(is_unharmed(), "after deaths in %s", names[i]);
		run_batch(i, "quick", 0, 40);
	}
	passed("a death at every step of a batch");
	kill_at_random(area);
	passed("deaths at random moments of batches");
}

static void more_batches(void)
{
	for (int i = 0; i < THREADS; i++) {
		struct killer k = start_killer(i, "for-ever", area, NULL);
		int status;

		sleep_us(500000);
		kill(k.pid, SIGKILL);
		status = end_killer(k, said, sizeof(said));
		MUST(status == SIGKILL && is_unharmed(), "%s: status %d, %s", names[i], status, said);
	}
	passed("batches back to back");
	MUST(answer(0, "starve", "") < 64 << 10 && answer(7, "starve", "") < 64 << 10, "%s", said);
	MUST(is_unharmed(), "after starving");
	passed("batches that come too late do not pile up");
	for (int i = 0; i < THREADS; i++)
		run_batch(i, "sleeps", 0, -1);
	run_batch(0, "long", -EINPROGRESS, 0);
	run_batch(1, "quick", -EBUSY, 0);
	MUST(answer(0, "destroy", "") == -EBUSY && answer(0, "settle", "10") == -ETIMEDOUT &&
		     !answer(0, "settle", "5000"),
	     "%s", said);
	MUST(!bytes_written(), "the write after the sleep was made");
	passed("a batch that does not end is settled later");
	for (int i = 0; i < THREADS; i++) {
		int status = run_killer(i, "stop", area, "writes");

		MUST(status == SIGKILL && !bytes_written(), "%s: status %d, %s", names[i], status, said);
		MUST(!answer(i, "settle", "100"), "%s: %s", names[i], said);
		kill(victim.pid, SIGCONT);
		run_batch(1, "writes", 0, 64);
		MUST(is_unharmed() && bytes_written() == 32, "after %s went on", names[i]);
	}
	passed("what was settled is not made when the thread goes on");
}

static void naive(void)
{
	int harmed = 0;

	for (int i = 0; i < 3; i++) {
		start_victim();
		MUST(run_killer(0, "naive", NULL, NULL) == SIGKILL, "%s", said);
		harmed += !is_unharmed();
		end_victim();
	}
	MUST(harmed, "the victim notices nothing");
	passed("a naive tracer would harm");
}

int main(void)
{
	const char *word;
	struct utsname name;

	if ((word = getenv("calls")))
		calls = atoi(word);
	if ((word = getenv("kills")))
		kills = atoi(word);

	signal(SIGPIPE, SIG_IGN);
	began_ns = now_ns();
	mkdir("/proc", 0755);
	MUST(!mount("proc", "/proc", "proc", 0, NULL), "%s", strerror(errno));
	uname(&name);
	printf("%s, %s, hwcap %lx %lx, %d calls, %d kills\n", name.release, name.machine, getauxval(AT_HWCAP),
	       getauxval(AT_HWCAP2), calls, kills);
	start_victim();
	MUST(is_unharmed(), "before anything");
	single_calls();
	batches();
	more_batches();
	end_victim();
	naive();
	end(0);
}
