/* SPDX-License-Identifier: Apache-2.0 */
/* inject_x86_64.c: the signal frame of x86-64 (arch/x86/include/uapi/asm/sigcontext.h, ucontext.h). */
#ifdef __x86_64__
#define _GNU_SOURCE
#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>

#include "inject.h"

/* syscall; ret */
const uint8_t inject_call_pattern[] = {0x0f, 0x05, 0xc3};
const size_t inject_call_bytes = sizeof(inject_call_pattern);
/* mov $15, %rax; syscall: libc's restorer */
const uint8_t inject_sigreturn_pattern[] = {0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05};
const size_t inject_sigreturn_bytes = sizeof(inject_sigreturn_pattern);
const size_t inject_code_alignment = 1;

enum {
	RED_ZONE = 128,
	FXSAVE_BYTES = 512,
	XSTATE_HEADER = 512, /* offset of xstate_bv in the XSAVE image */
	XSTATE_BYTES_MAX = 16384,
	SOFTWARE_BYTES = 464, /* offset of struct _fpx_sw_bytes in the image */
	MAGIC1 = 0x46505853,
	MAGIC2 = 0x46505845,
	FEATURE_SHADOW_STACK = 11, /* CET_U */
	FEATURE_TILE_CONFIG = 17,
	FEATURE_TILE_DATA = 18,
	UC_FLAGS = 7,           /* FP_XSTATE, SIGCONTEXT_SS, STRICT_RESTORE_SS */
	STACK_UNTOUCHED = 0x7f, /* an invalid ss_flags: rt_sigreturn then leaves the alternate stack alone */
};

/* errno values that only the kernel sees: a system call that is to be restarted */
enum { ERESTARTSYS = 512, ERESTARTNOINTR = 513, ERESTARTNOHAND = 514, ERESTART_RESTARTBLOCK = 516 };

struct sigcontext_64 {
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, flags;
	uint16_t cs, gs, fs, ss;
	uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
};

struct ucontext_64 {
	uint64_t flags, link;
	struct {
		uint64_t sp;
		uint32_t flags, padding;
		uint64_t size;
	} stack;
	struct sigcontext_64 mcontext;
	uint64_t sigmask;
};

struct rt_sigframe {
	uint64_t return_address; /* of the `syscall; ret`: the restorer */
	struct ucontext_64 uc;
};

_Static_assert(sizeof(struct sigcontext_64) == 256, "struct sigcontext_64 of the kernel");
_Static_assert(offsetof(struct ucontext_64, mcontext) == 40, "struct ucontext of the kernel");

/* What the kernel would have done by itself with an interrupted system call, as there is no signal to deliver. */
static void after_restart(struct user_regs_struct *r)
{
	int64_t result = (int64_t)r->rax;

	if (result == -ERESTARTSYS || result == -ERESTARTNOINTR || result == -ERESTARTNOHAND) {
		r->rax = r->orig_rax;
		r->rip -= 2;
	} else if (result == -ERESTART_RESTARTBLOCK) {
		r->rax = (uint64_t)-EINTR;
	}
}

/* Bytes of the XSAVE image in standard format that the features need (CPUID leaf 0xd). */
static size_t xstate_bytes(uint64_t features)
{
	size_t most = FXSAVE_BYTES + 64;

	for (unsigned int i = 2; i < 63; i++) {
		unsigned int size, offset, c, d;

		if (!(features >> i & 1))
			continue;
		__cpuid_count(0xd, i, size, offset, c, d);
		if (offset + size > most)
			most = offset + size;
	}
	return most;
}

/* The FP state as the kernel lays it on a signal frame: the image, its description in the software bytes, a second magic. */
static int describe_xstate(uint8_t *image, size_t got, size_t *bytes)
{
	uint64_t features, in_use;

	memcpy(&features, image + SOFTWARE_BYTES, sizeof(features)); /* XCR0, as the regset gives it */
	memcpy(&in_use, image + XSTATE_HEADER, sizeof(in_use));
	if (in_use >> FEATURE_TILE_DATA & 1)
		return -ENOTSUP;
	features &= ~(1ull << FEATURE_TILE_CONFIG | 1ull << FEATURE_TILE_DATA | 1ull << FEATURE_SHADOW_STACK);
	*bytes = xstate_bytes(features);
	if (*bytes > got || *bytes > XSTATE_BYTES_MAX)
		return -ENOTSUP;
	in_use &= features;
	memcpy(image + XSTATE_HEADER, &in_use, sizeof(in_use));
	memset(image + SOFTWARE_BYTES, 0, 48);
	memcpy(image + SOFTWARE_BYTES, &(uint32_t[]){MAGIC1, (uint32_t)*bytes + 4}, 8);
	memcpy(image + SOFTWARE_BYTES + 8, &features, 8);
	memcpy(image + SOFTWARE_BYTES + 16, &(uint32_t){(uint32_t)*bytes}, 4);
	memcpy(image + *bytes, &(uint32_t){MAGIC2}, 4);
	return 0;
}

static bool has_shadow_stack(pid_t tid)
{
#ifndef NT_X86_SHSTK
#define NT_X86_SHSTK 0x204
#endif
	uint64_t ssp = 0;
	struct iovec v = {&ssp, sizeof(ssp)};

	return !ptrace(PTRACE_GETREGSET, tid, (void *)NT_X86_SHSTK, &v) && ssp;
}

static void fill_context(struct sigcontext_64 *c, const struct user_regs_struct *r)
{
	c->r8 = r->r8;
	c->r9 = r->r9;
	c->r10 = r->r10;
	c->r11 = r->r11;
	c->r12 = r->r12;
	c->r13 = r->r13;
	c->r14 = r->r14;
	c->r15 = r->r15;
	c->di = r->rdi;
	c->si = r->rsi;
	c->bp = r->rbp;
	c->bx = r->rbx;
	c->dx = r->rdx;
	c->ax = r->rax;
	c->cx = r->rcx;
	c->sp = r->rsp;
	c->ip = r->rip;
	c->flags = r->eflags;
	c->cs = (uint16_t)r->cs;
	c->ss = (uint16_t)r->ss;
}

int inject_prepare(pid_t tid, uint64_t return_address, const void *scratch, size_t scratch_bytes,
		   struct inject_frame *frame)
{
	uint8_t image[XSTATE_BYTES_MAX + 64] __attribute__((aligned(64)));
	struct user_regs_struct registers;
	struct iovec v = {image, XSTATE_BYTES_MAX};
	struct rt_sigframe *sigframe;
	uint64_t fpstate, context, ip;
	size_t bytes;
	int error;

	if (ptrace(PTRACE_GETREGS, tid, NULL, &registers) || ptrace(PTRACE_GETREGSET, tid, (void *)NT_X86_XSTATE, &v))
		return -errno;
	if (registers.cs != 0x33 || has_shadow_stack(tid)) /* 0x33: 64-bit user code */
		return -ENOTSUP;
	error = describe_xstate(image, v.iov_len, &bytes);
	if (error)
		return error;
	ip = registers.rip;
	if ((int64_t)registers.orig_rax < 0)
		error = inject_leave_section(tid, &ip);
	if (error)
		return error;
	registers.rip = ip;
	if ((int64_t)registers.orig_rax >= 0)
		after_restart(&registers);

	/* from the top: red zone, scratch, FP state (64-byte aligned), ucontext, return address */
	frame->scratch = (registers.rsp - RED_ZONE - INJECT_SCRATCH_MAX) & ~63ull;
	fpstate = (frame->scratch - bytes - sizeof(uint32_t)) & ~63ull;
	context = (fpstate - sizeof(struct ucontext_64)) & ~15ull;
	frame->address = context - sizeof(uint64_t);
	frame->bytes = frame->scratch + scratch_bytes - frame->address;
	if (frame->bytes > sizeof(frame->data))
		return -ENOTSUP;
	sigframe = (struct rt_sigframe *)frame->data;
	sigframe->return_address = return_address;
	sigframe->uc.flags = UC_FLAGS;
	sigframe->uc.stack.flags = STACK_UNTOUCHED;
	fill_context(&sigframe->uc.mcontext, &registers);
	sigframe->uc.mcontext.fpstate = fpstate;
	if (ptrace(PTRACE_GETSIGMASK, tid, (void *)sizeof(sigframe->uc.sigmask), &sigframe->uc.sigmask))
		return -errno;
	memcpy(frame->data + (fpstate - frame->address), image, bytes + sizeof(uint32_t));
	if (scratch_bytes)
		memcpy(frame->data + (frame->scratch - frame->address), scratch, scratch_bytes);
	return 0;
}

int inject_commit(pid_t tid, const struct inject_code *code, const struct tierd_call *call,
		  const struct inject_frame *frame)
{
	struct user_regs_struct r;
	struct iovec v = {&r, sizeof(r)};

	if (ptrace(PTRACE_GETREGS, tid, NULL, &r))
		return -errno;
	r.rip = code->call;
	r.rsp = frame->address;
	r.orig_rax = (uint64_t)-1; /* no restart on top of ours */
	r.rax = (uint64_t)call->number;
	r.rdi = call->argument[0];
	r.rsi = call->argument[1];
	r.rdx = call->argument[2];
	r.r10 = call->argument[3];
	r.r8 = call->argument[4];
	r.r9 = call->argument[5];
	return ptrace(PTRACE_SETREGSET, tid, (void *)NT_PRSTATUS, &v) ? -errno : 0;
}

/*
 * The stub of a batch (calls.c), copied from here and run at the start of the area. Entered with rbx: the header; r12: the
 * batch's number; rsp: as rt_sigreturn wants it, one word above the frame. rcx, r11 and rax are the system calls'.
 */
__asm__(".pushsection .rodata\n"
	"inject_stub_start:\n"
	"	lock incq 32(%rbx)\n" /* running; a full fence, too: before the first look at `batch` */
	"1:	mov 24(%rbx), %r13\n" /* done */
	"	cmp 16(%rbx), %r13\n" /* count */
	"	jae 2f\n"
	"	cmp 8(%rbx), %r12\n" /* batch */
	"	jne 2f\n"
	"	mov %r13, %r14\n"
	"	shl $7, %r14\n"
	"	lea 128(%rbx,%r14), %r14\n"
	"	mov (%r14), %rax\n"
	"	mov 8(%r14), %rdi\n"
	"	mov 16(%r14), %rsi\n"
	"	mov 24(%r14), %rdx\n"
	"	mov 32(%r14), %r10\n"
	"	mov 40(%r14), %r8\n"
	"	mov 48(%r14), %r9\n"
	"	syscall\n"
	"	mov %rax, 56(%r14)\n"
	"	inc %r13\n"
	"	mov %r13, 24(%rbx)\n"
	"	jmp 1b\n"
	"2:	lock decq 32(%rbx)\n"
	"inject_stub_over:\n"
	"	mov $15, %eax\n" /* rt_sigreturn */
	"	syscall\n"
	"inject_stub_end:\n"
	".popsection\n");

extern const uint8_t inject_stub_start[] __attribute__((visibility("hidden")));
extern const uint8_t inject_stub_over[] __attribute__((visibility("hidden")));
extern const uint8_t inject_stub_end[] __attribute__((visibility("hidden")));

const uint8_t *inject_stub(size_t *bytes)
{
	*bytes = (size_t)(inject_stub_end - inject_stub_start);
	return inject_stub_start;
}

int inject_commit_batch(pid_t tid, uint64_t stub, uint64_t header, uint64_t batch, const struct inject_frame *frame)
{
	struct user_regs_struct r;
	struct iovec v = {&r, sizeof(r)};

	if (ptrace(PTRACE_GETREGS, tid, NULL, &r))
		return -errno;
	r.rip = stub;
	if (frame)
		r.rsp = frame->address + sizeof(uint64_t);
	r.orig_rax = (uint64_t)-1; /* no restart on top of ours */
	r.rbx = header;
	r.r12 = batch;
	return ptrace(PTRACE_SETREGSET, tid, (void *)NT_PRSTATUS, &v) ? -errno : 0;
}

bool inject_has_frame(pid_t tid, uint64_t stub, uint64_t header)
{
	size_t over = (size_t)(inject_stub_over - inject_stub_start),
	       end = (size_t)(inject_stub_end - inject_stub_start);
	struct user_regs_struct r;

	if (ptrace(PTRACE_GETREGS, tid, NULL, &r) || r.rbx != header)
		return false;
	return r.rip == stub || (r.rip - stub >= over && r.rip - stub < end);
}

int inject_where(pid_t tid, uint64_t *address)
{
	struct user_regs_struct r;

	if (ptrace(PTRACE_GETREGS, tid, NULL, &r))
		return -errno;
	*address = r.rip;
	return 0;
}

bool inject_in_call(pid_t tid, const struct inject_code *code, const struct inject_frame *frame)
{
	struct user_regs_struct r;

	return !ptrace(PTRACE_GETREGS, tid, NULL, &r) && r.rip == code->call + 2 && r.rsp == frame->address;
}

int inject_result(pid_t tid, int64_t *result)
{
	struct user_regs_struct r;

	if (ptrace(PTRACE_GETREGS, tid, NULL, &r))
		return -errno;
	*result = (int64_t)r.rax;
	return 0;
}
#endif
