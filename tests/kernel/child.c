/* SPDX-License-Identifier: Apache-2.0 */
/* child.c: see child.h */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "child.h"

enum { WRONG_REPORTS_MAX = 32, LINE_MAX_BYTES = 512 };

_Atomic uint64_t wrong_values;

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void pause_ns(uint64_t ns)
{
	struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};

	nanosleep(&t, NULL);
}

/* One line, in one write: lines of several threads never mix. */
void say(const char *format, ...)
{
	char line[LINE_MAX_BYTES];
	va_list args;
	int bytes;

	va_start(args, format);
	bytes = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	if (bytes > (int)sizeof(line) - 2)
		bytes = (int)sizeof(line) - 2;
	line[bytes] = '\n';
	if (write(STDOUT_FILENO, line, (size_t)bytes + 1) < 0)
		return; /* full or closed: the test does not listen */
}

void wrong(uint64_t page, uint64_t word, uint64_t got, uint64_t want)
{
	if (atomic_fetch_add(&wrong_values, 1) < WRONG_REPORTS_MAX)
		say("WRONG page=%lu word=%lu got=%#lx want=%#lx", page, word, got, want);
}

void die(const char *what)
{
	say("error %s: %m", what);
	exit(1);
}

uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15u;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

/* The test is gone when its end of stdin is: go too, even if another thread waits for a page for ever. */
static void *watch_parent(void *unused)
{
	struct pollfd input = {.fd = STDIN_FILENO, .events = 0};

	(void)unused;
	while (poll(&input, 1, -1) < 1 || !(input.revents & (POLLHUP | POLLERR)))
		;
	_exit(3);
}

void start_protocol(void)
{
	pthread_t watcher;

	fcntl(STDOUT_FILENO, F_SETFL, fcntl(STDOUT_FILENO, F_GETFL) | O_NONBLOCK);
	if (pthread_create(&watcher, NULL, watch_parent, NULL))
		die("thread");
}

void obey(const struct command *commands)
{
	char line[LINE_MAX_BYTES];

	while (fgets(line, sizeof(line), stdin)) {
		uint64_t arguments[4] = {0};
		char name[32] = "";
		int count = sscanf(line, "%31s %lu %lu %lu %lu", name, &arguments[0], &arguments[1], &arguments[2],
				   &arguments[3]);
		const struct command *c = commands;

		while (c->name && strcmp(c->name, name))
			c++;
		if (c->name)
			c->run(arguments, count - 1);
		else
			say("error unknown command %s", name);
	}
}

void answer(long result)
{
	if (result < 0)
		say("error %d %s", errno, strerror(errno));
	else
		say("ok %ld", result);
}
