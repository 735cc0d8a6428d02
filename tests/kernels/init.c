/* SPDX-License-Identifier: Apache-2.0 */
/*
 * init.c: process 1 of a kernel under test. Loads /modules/ in the order of their names, mounts the host's file system read-only
 * from 9p and a scratch disk, and runs /command there with the second serial port as its output, which ends with the line
 * "exit N".
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char command[65536];

static void give_up(const char *what)
{
	printf("init: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	reboot(RB_POWER_OFF);
	_exit(1);
}

static void must_mount(const char *from, const char *to, const char *type, unsigned long flags, const char *options)
{
	if (mount(from, to, type, flags, options))
		give_up(to);
}

static int not_hidden(const struct dirent *entry)
{
	return entry->d_name[0] != '.';
}

static void load_modules(void)
{
	struct dirent **names;
	int count = scandir("/modules", &names, not_hidden, alphasort);

	for (int i = 0; i < count; i++) {
		char path[512];
		int fd;

		snprintf(path, sizeof(path), "/modules/%s", names[i]->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
			give_up(path);
		close(fd);
	}
}

static void read_command(void)
{
	int fd = open("/command", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || read(fd, command, sizeof(command) - 1) <= 0)
		give_up("/command");
	close(fd);
}

/* The checkout ("tree=" of the kernel's command line) may lie in a directory that is scratch in here. */
static void show_again(int tree, char *path)
{
	char source[64];

	if (!access(path, F_OK))
		return;
	for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = 0;
		mkdir(path, 0755);
		*slash = '/';
	}
	mkdir(path, 0755);
	snprintf(source, sizeof(source), "/proc/self/fd/%d", tree);
	must_mount(source, path, NULL, MS_BIND, NULL);
}

static void enter_host_root(void)
{
	static const char *const scratch[] = {"/tmp", "/run", "/dev/shm"};
	char *path = getenv("tree");
	int tree;

	mkdir("/root", 0755);
	must_mount("root", "/root", "9p", MS_RDONLY, "trans=virtio,version=9p2000.L,cache=loose,msize=262144");
	if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		give_up("the host's file system");
	must_mount("dev", "/dev", "devtmpfs", 0, NULL);
	must_mount("proc", "/proc", "proc", 0, NULL);
	must_mount("sys", "/sys", "sysfs", 0, NULL);
	mkdir("/dev/shm", 01777);
	tree = path ? open(path, O_PATH | O_CLOEXEC) : -1;
	for (size_t i = 0; i < sizeof(scratch) / sizeof(scratch[0]); i++)
		must_mount("scratch", scratch[i], "tmpfs", 0, NULL);
	must_mount("/dev/vda", "/var/tmp", "ext4", 0, NULL);
	chmod("/var/tmp", 01777);
	chmod("/tmp", 01777);
	if (tree >= 0)
		show_again(tree, path);
}

static void loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd >= 0 && ioctl(fd, SIOCSIFFLAGS, &request))
		perror("init: lo");
	close(fd);
}

static int run_command(void)
{
	int output = open("/dev/ttyS1", O_RDWR | O_NOCTTY), status;
	pid_t child, ended;

	if (output < 0)
		give_up("/dev/ttyS1");
	child = fork();
	if (!child) {
		setsid();
		dup2(open("/dev/null", O_RDONLY), STDIN_FILENO);
		dup2(output, STDOUT_FILENO);
		dup2(output, STDERR_FILENO);
		execl("/bin/bash", "bash", "-c", command, NULL);
		_exit(127);
	}
	while ((ended = wait(&status)) != child) /* orphans of the command are ours */
		if (ended < 0)
			give_up("wait");
	status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
	dprintf(output, "exit %d\n", status);
	ioctl(output, TCSBRK, 1);
	return status;
}

int main(void)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/tmp", 1);
	read_command();
	load_modules();
	enter_host_root();
	loopback_up();
	run_command();
	umount("/var/tmp");
	reboot(RB_POWER_OFF);
	return 1;
}
