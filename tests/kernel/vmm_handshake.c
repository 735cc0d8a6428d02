/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_handshake.c: the VMM's side of the handshake (README, "Without privileges"), in a thread that touches no guest memory:
 * connect, send the descriptors, keep the connection; when it ends, do the same again, until the guest was left.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "child.h"
#include "vmm.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

enum { MESSAGE_BYTES_MAX = 4096, RECONNECT_NS = 50000000 };

static const char *socket_path;
static int uffd = -1, pagemap = -1;
static char message[MESSAGE_BYTES_MAX];
static size_t message_bytes;
static int descriptors[2 + REGIONS_MAX];
static _Atomic uint64_t accepted, refused, left;

/* Not UFFD_USER_MODE_ONLY: the kernel touches guest memory as well (through_kernel in vmm.c). An ordinary user has such a one from
 * /dev/userfaultfd, which somebody opened for it. */
static int open_userfaultfd(int device)
{
	if (device >= 0)
		return ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	return (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
}

static void make_message(uint64_t region_count, uint64_t region_bytes)
{
	char *at = message, *end = message + sizeof(message);

	at += snprintf(at, (size_t)(end - at), "{\"version\": 1, \"name\": \"handshake\", \"uffd\": %d, \"regions\": [",
		       uffd);
	descriptors[0] = uffd;
	descriptors[1] = pagemap;
	for (uint64_t i = 0; i < region_count; i++) {
		at += snprintf(at, (size_t)(end - at),
			       "%s{\"address\": %lu, \"bytes\": %lu, \"offset\": 0, \"memfd\": %lu}", i ? ", " : "",
			       (uint64_t)page_at(i * region_bytes / page_bytes), region_bytes, i);
		descriptors[2 + i] = memfd[i];
	}
	at += snprintf(at, (size_t)(end - at), "]}");
	message_bytes = (size_t)(at - message);
}

static bool send_message(int fd, size_t descriptor_count)
{
	char control[CMSG_SPACE(sizeof(descriptors))] = {0};
	struct iovec data = {message, message_bytes};
	struct msghdr m = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control};
	struct cmsghdr *c;

	m.msg_controllen = CMSG_SPACE(descriptor_count * sizeof(int));
	c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(descriptor_count * sizeof(int));
	memcpy(CMSG_DATA(c), descriptors, descriptor_count * sizeof(int));
	return sendmsg(fd, &m, MSG_NOSIGNAL) == (ssize_t)message_bytes;
}

/* Returns when the connection has ended. */
static void talk(int fd, size_t descriptor_count)
{
	char answer[MESSAGE_BYTES_MAX];
	ssize_t n;

	if (!send_message(fd, descriptor_count))
		return;
	while ((n = recv(fd, answer, sizeof(answer) - 1, 0)) > 0) {
		answer[n] = 0;
		if (strstr(answer, "\"ok\": true"))
			atomic_fetch_add(&accepted, 1);
		else if (strstr(answer, "\"event\": \"left\""))
			atomic_store(&left, 1);
		else
			atomic_fetch_add(&refused, 1);
	}
}

static void *stay_connected(void *argument)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", socket_path);
	while (!atomic_load(&left)) {
		int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

		if (fd < 0)
			die("socket");
		if (!connect(fd, (struct sockaddr *)&address, sizeof(address)))
			talk(fd, (size_t)argument);
		close(fd);
		pause_ns(RECONNECT_NS);
	}
	return NULL;
}

void start_handshake(const char *path, int device, uint64_t region_count, uint64_t region_bytes)
{
	pthread_t thread;

	socket_path = path;
	uffd = open_userfaultfd(device);
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (uffd < 0 || pagemap < 0)
		die("userfaultfd or pagemap");
	make_message(region_count, region_bytes);
	if (pthread_create(&thread, NULL, stay_connected, (void *)(2 + region_count)))
		die("thread");
}

/* How often it was accepted and refused, and whether it was left. */
void handshake(const uint64_t *a, int count)
{
	(void)a, (void)count;
	say("ok %lu %lu %lu", atomic_load(&accepted), atomic_load(&refused), atomic_load(&left));
}

void close_userfaultfd(const uint64_t *a, int count)
{
	(void)a, (void)count;
	answer(close(uffd));
}
