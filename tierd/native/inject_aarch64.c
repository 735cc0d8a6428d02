/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject_aarch64.c: the signal frame of arm64 (arch/arm64/include/uapi/asm/sigcontext.h, ucontext.h).
 *
 * Registers that are seen at our stop are already those of a restarted system call: the kernel sets x0 and pc back before it
 * looks for signals and tracers (arch/arm64/kernel/signal.c). So a call is made again with the arguments it had. For what the kernel
 * would continue by restart_syscall(2), sleeps and waits for a time that is relative, this means all of that time again: that
 * a call was interrupted at all cannot be told from its not having begun.
 */
#ifdef __aarch64__
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>

#include "inject.h"

/* svc #0; ret */
const uint8_t inject_call_pattern[] = {0x01, 0x00, 0x00, 0xd4, 0xc0, 0x03, 0x5f, 0xd6};
const size_t inject_call_bytes = sizeof(inject_call_pattern);
/* mov x8, #139; svc #0: the vdso's */
const uint8_t inject_sigreturn_pattern[] = {0x68, 0x11, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4};
const size_t inject_sigreturn_bytes = sizeof(inject_sigreturn_pattern);
const size_t inject_code_alignment = 4;

enum { /* of ptrace(2): what the C library may not know yet */
       REGSET_SVE = 0x405,
       REGSET_STREAMING_SVE = 0x40b,
       REGSET_ZA = 0x40c,
       REGSET_POE = 0x40f,
       REGSET_GCS = 0x410,
};

enum {
	BELOW_STACK = 128, /* the ABI has no red zone, but nothing is lost by leaving one */
	CODE_32_BIT = 1 << 4,
	BRANCH_TYPE = 3 << 10, /* of pstate: set, the next instruction would have to be a landing pad */
	LINK = 30,
	NUMBER = 8,
	VECTORS_IN_USE = 1,     /* of the header of SVE */
	STACK_UNTOUCHED = 0x7f, /* an invalid ss_flags: rt_sigreturn then leaves the alternate stack alone */
};

enum {
	FPSIMD_MAGIC = 0x46508001,
	SVE_MAGIC = 0x53564501,
	POE_MAGIC = 0x504f4530,
	RECORDS_BYTES = 4096,
	QUADWORD = 16,
	SVE_PER_QUADWORD = 32 * 16 + 16 * 2 + 2, /* Z, P and FFR */
	SVE_QUADWORDS_MAX = 6,                   /* longer vectors would need a record outside of the frame */
};

struct record {
	uint32_t magic, bytes;
};

struct fpsimd_record {
	struct record head;
	uint32_t fpsr, fpcr;
	__uint128_t vregs[32];
};

struct sve_record {
	struct record head;
	uint16_t vector_bytes, flags, reserved[2];
};

struct poe_record {
	struct record head;
	uint64_t por;
};

struct vector_header { /* struct user_sve_header, user_za_header */
	uint32_t bytes, bytes_max;
	uint16_t vector_bytes, vector_bytes_max, flags, reserved;
};

struct gcs_state { /* struct user_gcs */
	uint64_t enabled, locked, pointer;
};

struct rt_sigframe {
	uint8_t info[128];
	uint64_t flags, link;
	struct {
		uint64_t sp;
		uint32_t flags, padding;
		uint64_t bytes;
	} stack;
	uint64_t sigmask, unused[15];
	uint64_t padding, fault_address;
	struct user_regs_struct registers;
	uint64_t padding_of_records;
	uint8_t records[RECORDS_BYTES];
};

_Static_assert(sizeof(struct user_regs_struct) == 34 * 8, "struct user_pt_regs of the kernel");
_Static_assert(offsetof(struct rt_sigframe, sigmask) == 128 + 40, "struct ucontext of the kernel");
_Static_assert(offsetof(struct rt_sigframe, fault_address) == 128 + 176, "struct sigcontext of the kernel");
_Static_assert(offsetof(struct rt_sigframe, records) == 128 + 176 + 288, "struct sigcontext of the kernel");
_Static_assert(sizeof(struct rt_sigframe) == 4688, "struct rt_sigframe of the kernel");
_Static_assert(sizeof(struct fpsimd_record) == 528, "struct fpsimd_context of the kernel");
_Static_assert(sizeof(struct sve_record) == 16 && sizeof(struct vector_header) == 16,
	       "struct sve_context of the kernel");
_Static_assert(sizeof(struct rt_sigframe) % 16 == 0, "the stack pointer stays aligned");

/* Bytes that are there; 0: not on this machine, or too old a kernel to know. */
static size_t get_set(pid_t tid, uintptr_t set, void *to, size_t bytes)
{
	struct iovec v = {to, bytes};

	return ptrace(PTRACE_GETREGSET, tid, (void *)set, &v) ? 0 : v.iov_len;
}

static int get_registers(pid_t tid, struct user_regs_struct *r)
{
	struct iovec v = {r, sizeof(*r)};

	if (ptrace(PTRACE_GETREGSET, tid, (void *)NT_PRSTATUS, &v))
		return -errno;
	return v.iov_len == sizeof(*r) && !(r->pstate & CODE_32_BIT) ? 0 : -ENOTSUP;
}

static int set_registers(pid_t tid, struct user_regs_struct *r)
{
	struct iovec v = {r, sizeof(*r)};

	r->pstate &= ~(uint64_t)BRANCH_TYPE;
	return ptrace(PTRACE_SETREGSET, tid, (void *)NT_PRSTATUS, &v) ? -errno : 0;
}

/* What a frame of ours does not bring back: streaming mode, the ZA matrix, a shadow stack that a `ret` of ours would not fit. */
static bool has_more_state(pid_t tid)
{
	struct vector_header streaming, matrix;
	struct gcs_state gcs;

	if (get_set(tid, REGSET_STREAMING_SVE, &streaming, sizeof(streaming)) == sizeof(streaming) &&
	    streaming.flags & VECTORS_IN_USE)
		return true;
	if (get_set(tid, REGSET_ZA, &matrix, sizeof(matrix)) == sizeof(matrix) && matrix.bytes > sizeof(matrix))
		return true;
	return get_set(tid, REGSET_GCS, &gcs, sizeof(gcs)) == sizeof(gcs) && gcs.enabled;
}

static int add_fpsimd(pid_t tid, uint8_t **at)
{
	struct user_fpsimd_struct state;
	struct fpsimd_record *record = (struct fpsimd_record *)*at;

	if (get_set(tid, NT_PRFPREG, &state, sizeof(state)) <
	    offsetof(struct user_fpsimd_struct, fpcr) + sizeof(state.fpcr))
		return -ENOTSUP;
	record->head = (struct record){FPSIMD_MAGIC, sizeof(*record)};
	record->fpsr = state.fpsr;
	record->fpcr = state.fpcr;
	memcpy(record->vregs, state.vregs, sizeof(record->vregs));
	*at += sizeof(*record);
	return 0;
}

/* Any system call drops what vector registers hold beyond 128 bits. A thread that is in one has nothing there. */
static int add_sve(pid_t tid, uint8_t **at)
{
	struct {
		struct vector_header header;
		uint8_t registers[SVE_PER_QUADWORD * SVE_QUADWORDS_MAX];
	} __attribute__((aligned(QUADWORD))) state; /* the kernel takes whole ones only */
	struct sve_record *record = (struct sve_record *)*at;
	size_t got = get_set(tid, REGSET_SVE, &state, sizeof(state)), bytes;

	if (got < sizeof(state.header) || !(state.header.flags & VECTORS_IN_USE))
		return 0;
	bytes = state.header.vector_bytes / QUADWORD * SVE_PER_QUADWORD;
	if (bytes > sizeof(state.registers) || got < sizeof(state.header) + bytes)
		return -ENOTSUP;
	record->head = (struct record){SVE_MAGIC, (uint32_t)(sizeof(*record) + bytes + 15) & ~15u};
	record->vector_bytes = state.header.vector_bytes;
	memcpy(record + 1, state.registers, bytes);
	*at += record->head.bytes;
	return 0;
}

/* Permissions by protection key: rt_sigreturn(2) of some kernels sets the register even where the frame does not say to what. */
static void add_poe(pid_t tid, uint8_t **at)
{
	struct poe_record *record = (struct poe_record *)*at;
	uint64_t por;

	if (get_set(tid, REGSET_POE, &por, sizeof(por)) != sizeof(por))
		return;
	*record = (struct poe_record){{POE_MAGIC, sizeof(*record)}, por};
	*at += sizeof(*record);
}

_Static_assert(sizeof(struct fpsimd_record) + sizeof(struct sve_record) + SVE_PER_QUADWORD * SVE_QUADWORDS_MAX + 15 +
			       sizeof(struct poe_record) + 16 <=
		       RECORDS_BYTES,
	       "the records fit, and zeros after them");

int inject_prepare(pid_t tid, uint64_t return_address, const void *scratch, size_t scratch_bytes,
		   struct inject_frame *frame)
{
	struct rt_sigframe *sigframe = (struct rt_sigframe *)frame->data;
	uint8_t *records = sigframe->records;
	struct user_regs_struct registers;
	uint64_t pc;
	int error = get_registers(tid, &registers);

	(void)return_address; /* is in a register, not on the stack */
	if (error)
		return error;
	if (has_more_state(tid))
		return -ENOTSUP;
	pc = registers.pc;
	error = inject_leave_section(tid, &pc); /* no system call is in one */
	if (error)
		return error;
	registers.pc = pc;

	/* from the top: what is below the stack pointer, scratch, frame */
	frame->scratch = (registers.sp - BELOW_STACK - INJECT_SCRATCH_MAX) & ~63ull;
	frame->address = frame->scratch - sizeof(*sigframe);
	frame->bytes = sizeof(*sigframe) + scratch_bytes;
	memset(sigframe, 0, sizeof(*sigframe));
	sigframe->stack.flags = STACK_UNTOUCHED;
	sigframe->registers = registers;
	if (ptrace(PTRACE_GETSIGMASK, tid, (void *)sizeof(sigframe->sigmask), &sigframe->sigmask))
		return -errno;
	error = add_fpsimd(tid, &records);
	if (!error)
		error = add_sve(tid, &records);
	if (error)
		return error;
	add_poe(tid, &records);
	if (scratch_bytes)
		memcpy(frame->data + sizeof(*sigframe), scratch, scratch_bytes);
	return 0;
}

_Static_assert(sizeof(struct rt_sigframe) + INJECT_SCRATCH_MAX <= INJECT_FRAME_MAX, "a frame fits");

/*
 * For a thread that was interrupted in a call made by the very instruction that we use: finding it there again, the kernel may
 * make its restart_syscall(2) of ours. So it gets there by an rt_sigreturn(2) of its own, from a second frame below the other.
 */
static int detour(pid_t tid, const struct inject_code *code, const struct inject_frame *frame,
		  struct user_regs_struct *r)
{
	struct rt_sigframe first;
	struct iovec from = {&first, sizeof(first)},
		     to = {(void *)(uintptr_t)(frame->address - sizeof(first)), sizeof(first)};

	memcpy(&first, frame->data, sizeof(first));
	first.registers = *r;
	first.registers.pstate &= ~(uint64_t)BRANCH_TYPE;
	first.sigmask = ~0ull;
	if (process_vm_writev(tid, &from, 1, &to, 1, 0) != (ssize_t)sizeof(first))
		return -EFAULT;
	r->pc = code->sigreturn;
	r->sp = frame->address - sizeof(first);
	return 0;
}

int inject_commit(pid_t tid, const struct inject_code *code, const struct tierd_call *call,
		  const struct inject_frame *frame)
{
	struct user_regs_struct r;
	uint64_t was_at;
	int error = get_registers(tid, &r);

	if (error)
		return error;
	was_at = r.pc;
	r.pc = code->call;
	r.sp = frame->address;
	r.regs[LINK] = code->sigreturn;
	r.regs[NUMBER] = (uint64_t)call->number;
	for (int i = 0; i < 6; i++)
		r.regs[i] = call->argument[i];
	if (was_at == code->call)
		error = detour(tid, code, frame, &r);
	return error ? error : set_registers(tid, &r);
}

/*
 * The stub of a batch (calls.c), copied from here and run at the start of the area: mprotect(2), which makes it executable, makes
 * the caches agree about it. Entered with x19: the header; x20: the batch's number; sp: the frame. A system call changes x0 only,
 * and x8 if it is restarted.
 */
__asm__(".pushsection .rodata\n"
	".balign 4\n"
	"inject_stub_start:\n"
	"	add x9, x19, #32\n" /* running */
	"1:	ldxr x10, [x9]\n"
	"	add x10, x10, #1\n"
	"	stxr w11, x10, [x9]\n"
	"inject_stub_begun:\n"
	"	cbnz w11, 1b\n"
	"	dmb ish\n"             /* before the first look at `batch` */
	"2:	ldr x21, [x19, #24]\n" /* done */
	"	ldr x10, [x19, #16]\n" /* count */
	"	cmp x21, x10\n"
	"	b.hs 3f\n"
	"	ldr x10, [x19, #8]\n" /* batch */
	"	cmp x10, x20\n"
	"	b.ne 3f\n"
	"	add x22, x19, x21, lsl #7\n"
	"	add x22, x22, #128\n"
	"	ldr x8, [x22]\n"
	"	ldp x0, x1, [x22, #8]\n"
	"	ldp x2, x3, [x22, #24]\n"
	"	ldp x4, x5, [x22, #40]\n"
	"	svc #0\n"
	"	str x0, [x22, #56]\n"
	"	dmb ish\n" /* what the call wrote, then `done` */
	"	add x21, x21, #1\n"
	"	str x21, [x19, #24]\n"
	"	b 2b\n"
	"3:	dmb ish\n"
	"4:	ldxr x10, [x9]\n"
	"	sub x10, x10, #1\n"
	"	stxr w11, x10, [x9]\n"
	"	cbnz w11, 4b\n"
	"inject_stub_over:\n"
	"	mov x8, #139\n" /* rt_sigreturn */
	"	svc #0\n"
	"inject_stub_end:\n"
	".popsection\n");

extern const uint8_t inject_stub_start[] __attribute__((visibility("hidden")));
extern const uint8_t inject_stub_begun[] __attribute__((visibility("hidden")));
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
	int error = get_registers(tid, &r);

	if (error)
		return error;
	r.pc = stub;
	if (frame)
		r.sp = frame->address;
	r.regs[19] = header;
	r.regs[20] = batch;
	return set_registers(tid, &r);
}

bool inject_has_frame(pid_t tid, uint64_t stub, uint64_t header)
{
	size_t begun = (size_t)(inject_stub_begun - inject_stub_start),
	       over = (size_t)(inject_stub_over - inject_stub_start),
	       end = (size_t)(inject_stub_end - inject_stub_start);
	struct user_regs_struct r;
	uint64_t at;

	if (get_registers(tid, &r) || r.regs[19] != header)
		return false;
	at = r.pc - stub;
	return at < begun || (at >= over && at < end);
}

int inject_where(pid_t tid, uint64_t *address)
{
	struct user_regs_struct r;
	int error = get_registers(tid, &r);

	*address = error ? 0 : r.pc;
	return error;
}

bool inject_in_call(pid_t tid, const struct inject_code *code, const struct inject_frame *frame)
{
	struct user_regs_struct r;

	return !get_registers(tid, &r) && r.pc == code->call + 4 && r.sp == frame->address;
}

int inject_result(pid_t tid, int64_t *result)
{
	struct user_regs_struct r;
	int error = get_registers(tid, &r);

	if (!error)
		*result = (int64_t)r.regs[0];
	return error;
}
#endif
