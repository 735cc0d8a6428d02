/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvm_vcpu.c: a child with a real KVM vCPU, whose faults are taken in the kernel, not by a thread's own access.
 *
 *   kvm_vcpu [kind=memfd|anonymous] [ARGUMENT...]
 *
 * Guest memory is 1 MiB of a memfd, or private and anonymous (then "-m 1M" tells its size), in one memory slot. A few bytes of
 * real-mode code walk the 240 pages from 64 KiB up: in each they compare the counter in the first word with the number of laps,
 * which is kept in a register, and raise it. The rest of each page is a pattern that `verify` checks. Exits: port 0x10 after each
 * lap, port 0x11 at a wrong counter.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "child.h"

enum {
	GUEST_BYTES = 1 << 20,
	CODE_AT = 0x1000,
	FIRST_BYTE = 0x10000,
	LAP_PORT = 0x10,
	WRONG_PORT = 0x11,
	STOP_MS_MAX = 20000
};

static const uint8_t code[] = {
	0xb8, 0x00,       0x10,             /* start: mov $0x1000, %ax */
	0x8e, 0xd8,                         /* next:  mov %ax, %ds */
	0x66, 0x39,       0x0e, 0x00, 0x00, /*        cmp %ecx, (0) */
	0x75, 0x10,                         /*        jne wrong */
	0x66, 0xff,       0x06, 0x00, 0x00, /*        incl (0) */
	0x05, 0x00,       0x01,             /*        add $0x100, %ax: one page on; wraps to 0 after the last */
	0x75, 0xed,                         /*        jne next */
	0x66, 0x41,                         /*        inc %ecx */
	0xe6, LAP_PORT,                     /*        out %al, $0x10 */
	0xeb, 0xe4,                         /*        jmp start */
	0xe6, WRONG_PORT,                   /* wrong: out %al, $0x11 */
	0xf4,                               /*        hlt */
};

static uint8_t *memory;
static uint64_t page_bytes, pages, pause_between_ns, seed;
static int vcpu;
static struct kvm_run *state;
static _Atomic bool running;
static _Atomic bool resting = true;
static _Atomic uint64_t laps, max_ns;

static uint64_t *page_at(uint64_t page)
{
	return (uint64_t *)(memory + page * page_bytes);
}

static uint64_t first_page(void)
{
	return FIRST_BYTE / page_bytes;
}

/* --- the vCPU's thread -------------------------------------------------------------------------------------------------- */

static void wrong_counter(void)
{
	struct kvm_sregs special;
	struct kvm_regs general;

	if (ioctl(vcpu, KVM_GET_SREGS, &special) || ioctl(vcpu, KVM_GET_REGS, &general))
		die("registers");
	wrong(special.ds.base / page_bytes, 0, *(uint32_t *)(memory + special.ds.base), general.rcx);
}

static void one_lap(void)
{
	uint64_t began = now_ns(), took;

	/* a detach stops every thread for a moment, to see that none is in the area of our calls: EINTR */
	while (ioctl(vcpu, KVM_RUN, 0))
		if (errno != EINTR)
			die("KVM_RUN");
	if (state->exit_reason != KVM_EXIT_IO) {
		say("error exit reason %u", state->exit_reason);
		exit(1);
	}
	if (state->io.port == WRONG_PORT) {
		wrong_counter();
		atomic_store(&running, false);
		return;
	}
	took = now_ns() - began;
	if (took > atomic_load(&max_ns))
		atomic_store(&max_ns, took);
	atomic_fetch_add(&laps, 1);
	if (pause_between_ns)
		pause_ns(pause_between_ns);
}

static void *run_vcpu(void *unused)
{
	(void)unused;
	for (;;) {
		while (!atomic_load(&running)) {
			atomic_store(&resting, true);
			pause_ns(200000);
		}
		one_lap();
	}
	return NULL;
}

/* --- commands ----------------------------------------------------------------------------------------------------------- */

static bool busy(void)
{
	bool is = atomic_load(&running) || !atomic_load(&resting);

	if (is)
		say("error the vCPU runs; stop first");
	return is;
}

/* A new pattern in every page that the vCPU walks; its counters stay. */
static void fill(const uint64_t *a, int count)
{
	(void)a, (void)count;
	if (busy())
		return;
	seed++;
	for (uint64_t page = first_page(); page < pages; page++)
		for (uint64_t i = 1; i < page_bytes / 8; i++)
			page_at(page)[i] = mix(seed << 32 | page << 16 | i);
	say("ok %lu", pages - first_page());
}

static void verify(const uint64_t *a, int count)
{
	uint64_t before = atomic_load(&wrong_values);

	(void)a, (void)count;
	if (busy())
		return;
	for (uint64_t page = first_page(); page < pages; page++) {
		const uint64_t *words = page_at(page);

		if (words[0] != (uint32_t)atomic_load(&laps))
			wrong(page, 0, words[0], (uint32_t)atomic_load(&laps));
		for (uint64_t i = 1; i < page_bytes / 8 && seed; i++)
			if (words[i] != mix(seed << 32 | page << 16 | i))
				wrong(page, i, words[i], mix(seed << 32 | page << 16 | i));
	}
	if (memcmp(memory + CODE_AT, code, sizeof(code)))
		wrong(CODE_AT / page_bytes, 0, memory[CODE_AT], code[0]);
	say("ok %lu %lu", pages - first_page(), atomic_load(&wrong_values) - before);
}

/* LAPS-PER-SECOND (0: as fast as it can) */
static void run(const uint64_t *a, int count)
{
	(void)count;
	if (busy())
		return;
	pause_between_ns = a[0] ? 1000000000u / a[0] : 0;
	atomic_store(&resting, false);
	atomic_store(&running, true);
	say("ok");
}

static void stop(const uint64_t *a, int count)
{
	uint64_t began = now_ns();

	(void)a, (void)count;
	atomic_store(&running, false);
	while (!atomic_load(&resting)) {
		if (now_ns() - began > STOP_MS_MAX * 1000000u) {
			say("error the vCPU does not come back from a page");
			return;
		}
		pause_ns(100000);
	}
	say("ok %lu %lu", atomic_load(&laps), atomic_load(&wrong_values));
}

static void stats(const uint64_t *a, int count)
{
	(void)a, (void)count;
	say("ok operations=%lu wrong=%lu max_ns=%lu running=%d", atomic_load(&laps), atomic_load(&wrong_values),
	    atomic_exchange(&max_ns, 0), atomic_load(&running));
}

static void quit(const uint64_t *a, int count)
{
	(void)a, (void)count;
	say("ok");
	exit(atomic_load(&wrong_values) ? 2 : 0);
}

static const struct command commands[] = {
	{"fill", fill},   {"verify", verify}, {"run", run}, {"stop", stop},
	{"stats", stats}, {"quit", quit},     {NULL, NULL},
};

/* --- start -------------------------------------------------------------------------------------------------------------- */

/* Between guards, so that no other memory is one with it. */
static void make_memory(bool anonymous)
{
	int memfd = anonymous ? -1 : memfd_create("memory-backend-memfd", MFD_CLOEXEC);

	if (!anonymous && (memfd < 0 || ftruncate(memfd, GUEST_BYTES)))
		die("memfd");
	memory = mmap(NULL, 3 * GUEST_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		die("address space");
	memory = mmap(memory + GUEST_BYTES, GUEST_BYTES, PROT_READ | PROT_WRITE,
		      (anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | MAP_FIXED, memfd, 0);
	if (memory == MAP_FAILED)
		die("guest memory");
}

static void make_machine(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, bytes;
	struct kvm_userspace_memory_region slot = {.memory_size = GUEST_BYTES};
	struct kvm_regs general = {.rip = CODE_AT, .rflags = 2};
	struct kvm_sregs special;

	if (kvm < 0 || (vm = ioctl(kvm, KVM_CREATE_VM, 0)) < 0)
		die("/dev/kvm");
	memcpy(memory + CODE_AT, code, sizeof(code));
	slot.userspace_addr = (uint64_t)memory;
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) || (vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) < 0)
		die("vCPU");
	bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	state = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (state == MAP_FAILED || ioctl(vcpu, KVM_GET_SREGS, &special))
		die("vCPU state");
	special.cs.base = 0;
	special.cs.selector = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &special) || ioctl(vcpu, KVM_SET_REGS, &general))
		die("vCPU registers");
}

int main(int argc, char **argv)
{
	pthread_t thread;

	page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
	pages = GUEST_BYTES / page_bytes;
	start_protocol();
	make_memory(argc > 1 && !strcmp(argv[1], "kind=anonymous"));
	make_machine();
	if (pthread_create(&thread, NULL, run_vcpu, NULL))
		die("thread");
	pthread_setname_np(thread, "CPU 0/KVM");
	say("ok %lu %lu %#lx", pages, page_bytes, (uint64_t)memory);
	obey(commands);
	return 0;
}
