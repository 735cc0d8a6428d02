/* SPDX-License-Identifier: Apache-2.0 */
/*
 * clock.c: preloaded into a daemon, it adds the seconds that stand in the file CLOCK_OFFSET to the time of day, and to no other
 * clock. The machine's own is left alone.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset_s(void)
{
	static int fd = -1;
	char text[32] = "";

	if (fd < 0 && getenv("CLOCK_OFFSET"))
		fd = open(getenv("CLOCK_OFFSET"), O_RDONLY | O_CLOEXEC);
	return fd >= 0 && pread(fd, text, sizeof(text) - 1, 0) > 0 ? atol(text) : 0;
}

int clock_gettime(clockid_t id, struct timespec *t)
{
	int result = (int)syscall(SYS_clock_gettime, id, t);

	if (!result && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
		t->tv_sec += offset_s();
	return result;
}

int gettimeofday(struct timeval *t, void *zone)
{
	int result = (int)syscall(SYS_gettimeofday, t, zone);

	if (!result)
		t->tv_sec += offset_s();
	return result;
}

time_t time(time_t *t)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	if (t)
		*t = now.tv_sec;
	return now.tv_sec;
}
