// SPDX-License-Identifier: Apache-2.0
// The self-test's harness: what a test of one kernel promise needs and no more. The interface is declared here and not
// taken from the system's headers: those of Debian 12 know half of the stock part and none of the two native generations.
#ifndef SELFTEST_H
#define SELFTEST_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/types.h>

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

// ---- the interface: stock

#define LOAD_NS 1000000000ULL // of each kind of memory: how long threads use it while it is changed below them

#define UFFD_API            0xAAULL
#define UFFD_USER_MODE_ONLY 1

struct uffdio_api {
	uint64_t api, features, ioctls;
};
struct uffdio_range {
	uint64_t start, len;
};
struct uffdio_register {
	struct uffdio_range range;
	uint64_t mode, ioctls;
};
struct uffdio_copy {
	uint64_t dst, src, len, mode;
	int64_t copy;
};
struct uffdio_zeropage {
	struct uffdio_range range;
	uint64_t mode;
	int64_t zeropage;
};
struct uffdio_writeprotect {
	struct uffdio_range range;
	uint64_t mode;
};
struct uffdio_continue {
	struct uffdio_range range;
	uint64_t mode;
	int64_t mapped;
};
struct uffdio_poison {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};
struct uffdio_move {
	uint64_t dst, src, len, mode;
	int64_t move;
};
struct uffd_msg {
	uint8_t event, reserved1;
	uint16_t reserved2;
	uint32_t reserved3;
	union {
		struct {
			uint64_t flags, address;
			uint32_t ptid;
		} pagefault;
		struct {
			uint32_t ufd;
		} fork;
		struct {
			uint64_t from, to, len;
		} remap;
		struct {
			uint64_t start, end;
		} remove;
		uint64_t reserved[3];
	} arg;
};
_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg");
struct page_region {
	uint64_t start, end, categories;
};
struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define UFFDIO_REGISTER     _IOWR(0xAA, 0x00, struct uffdio_register)
#define UFFDIO_UNREGISTER   _IOR(0xAA, 0x01, struct uffdio_range)
#define UFFDIO_WAKE         _IOR(0xAA, 0x02, struct uffdio_range)
#define UFFDIO_COPY         _IOWR(0xAA, 0x03, struct uffdio_copy)
#define UFFDIO_ZEROPAGE     _IOWR(0xAA, 0x04, struct uffdio_zeropage)
#define UFFDIO_MOVE         _IOWR(0xAA, 0x05, struct uffdio_move)
#define UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
#define UFFDIO_CONTINUE     _IOWR(0xAA, 0x07, struct uffdio_continue)
#define UFFDIO_POISON       _IOWR(0xAA, 0x08, struct uffdio_poison)
#define UFFDIO_API          _IOWR(0xAA, 0x3F, struct uffdio_api)
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#define PAGEMAP_SCAN        _IOWR('f', 16, struct pm_scan_arg)

#define UFFD_EVENT_PAGEFAULT 0x12
#define UFFD_EVENT_FORK      0x13
#define UFFD_EVENT_REMAP     0x14
#define UFFD_EVENT_REMOVE    0x15
#define UFFD_EVENT_UNMAP     0x16

#define UFFD_FEATURE_PAGEFAULT_FLAG_WP  (1ULL << 0)
#define UFFD_FEATURE_EVENT_FORK         (1ULL << 1)
#define UFFD_FEATURE_EVENT_REMAP        (1ULL << 2)
#define UFFD_FEATURE_EVENT_REMOVE       (1ULL << 3)
#define UFFD_FEATURE_MISSING_HUGETLBFS  (1ULL << 4)
#define UFFD_FEATURE_MISSING_SHMEM      (1ULL << 5)
#define UFFD_FEATURE_EVENT_UNMAP        (1ULL << 6)
#define UFFD_FEATURE_SIGBUS             (1ULL << 7)
#define UFFD_FEATURE_THREAD_ID          (1ULL << 8)
#define UFFD_FEATURE_MINOR_HUGETLBFS    (1ULL << 9)
#define UFFD_FEATURE_MINOR_SHMEM        (1ULL << 10)
#define UFFD_FEATURE_EXACT_ADDRESS      (1ULL << 11)
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1ULL << 12)
#define UFFD_FEATURE_WP_UNPOPULATED     (1ULL << 13)
#define UFFD_FEATURE_POISON             (1ULL << 14)
#define UFFD_FEATURE_WP_ASYNC           (1ULL << 15)
#define UFFD_FEATURE_MOVE               (1ULL << 16)

#define UFFDIO_REGISTER_MODE_MISSING (1ULL << 0)
#define UFFDIO_REGISTER_MODE_WP      (1ULL << 1)
#define UFFDIO_REGISTER_MODE_MINOR   (1ULL << 2)

#define UFFD_PAGEFAULT_FLAG_WRITE (1ULL << 0)
#define UFFD_PAGEFAULT_FLAG_WP    (1ULL << 1)
#define UFFD_PAGEFAULT_FLAG_MINOR (1ULL << 2)

#define UFFDIO_COPY_MODE_DONTWAKE         (1ULL << 0)
#define UFFDIO_COPY_MODE_WP               (1ULL << 1)
#define UFFDIO_ZEROPAGE_MODE_DONTWAKE     (1ULL << 0)
#define UFFDIO_WRITEPROTECT_MODE_WP       (1ULL << 0)
#define UFFDIO_WRITEPROTECT_MODE_DONTWAKE (1ULL << 1)
#define UFFDIO_CONTINUE_MODE_DONTWAKE     (1ULL << 0)
#define UFFDIO_CONTINUE_MODE_WP           (1ULL << 1)
#define UFFDIO_POISON_MODE_DONTWAKE       (1ULL << 0)
#define UFFDIO_MOVE_MODE_DONTWAKE         (1ULL << 0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES  (1ULL << 1)

#define PAGE_IS_WPALLOWED  (1ULL << 0)
#define PAGE_IS_WRITTEN    (1ULL << 1)
#define PAGE_IS_FILE       (1ULL << 2)
#define PAGE_IS_PRESENT    (1ULL << 3)
#define PAGE_IS_SWAPPED    (1ULL << 4)
#define PAGE_IS_PFNZERO    (1ULL << 5)
#define PAGE_IS_HUGE       (1ULL << 6)
#define PAGE_IS_SOFT_DIRTY (1ULL << 7)
#define PAGE_IS_GUARD      (1ULL << 8)

#define PM_SCAN_WP_MATCHING   (1ULL << 0)
#define PM_SCAN_CHECK_WPASYNC (1ULL << 1)

#define PM_UFFD_WP (1ULL << 57) // of a /proc/PID/pagemap entry: "tracked by uffd"
#define PM_FILE    (1ULL << 61)
#define PM_SWAP    (1ULL << 62)
#define PM_PRESENT (1ULL << 63)

// ---- the interface: both native generations, and each of them

struct uffdio_set_mode {
	uint64_t enable, disable;
};
#define UFFDIO_SET_MODE _IOW(0xAA, 0x0A, struct uffdio_set_mode)

#define UFFD_FEATURE_MINOR_ANON  (1ULL << 17) // rfc
#define UFFD_FEATURE_MINOR_ASYNC (1ULL << 18)
#define UFFDIO_DEACTIVATE        _IOR(0xAA, 0x09, struct uffdio_range)
#define PAGE_IS_UFFD_DEACTIVATED (1ULL << 9)

struct uffdio_rwprotect { // rwp
	struct uffdio_range range;
	uint64_t mode;
};
#define UFFD_FEATURE_RWP               (1ULL << 17)
#define UFFD_FEATURE_RWP_ASYNC         (1ULL << 18)
#define UFFDIO_RWPROTECT               _IOWR(0xAA, 0x09, struct uffdio_rwprotect)
#define UFFDIO_RWPROTECT_MODE_RWP      (1ULL << 0)
#define UFFDIO_RWPROTECT_MODE_DONTWAKE (1ULL << 1)
#define UFFDIO_REGISTER_MODE_RWP       (1ULL << 3)
#define UFFD_PAGEFAULT_FLAG_RWP        (1ULL << 3)
#define PAGE_IS_ACCESSED               (1ULL << 9)

// ---- tests

// The kinds of memory a test runs on: one run per bit, named test/kind; 0 runs once, without a kind, as test.
enum kind {
	NONE = 0,
	ANON = 1 << 0,            // private anonymous, 4 KiB pages for certain (MADV_NOHUGEPAGE)
	ANON_THP = 1 << 1,        // the same in 2 MiB pages, 2 MiB aligned (fill() skips if the kernel gives none)
	SHMEM = 1 << 2,           // memfd, MAP_SHARED
	SHMEM_THP = 1 << 3,       // the same with 2 MiB pages
	SHMEM_PRIVATE = 1 << 4,   // memfd, MAP_PRIVATE
	HUGETLB = 1 << 5,         // memfd with MFD_HUGETLB, MAP_SHARED
	HUGETLB_PRIVATE = 1 << 6, // the same, MAP_PRIVATE
};
#define ANY_SMALL   (ANON | SHMEM)
#define ANY_HUGETLB (HUGETLB | HUGETLB_PRIVATE)
#define ANY_KIND    (ANON | ANON_THP | SHMEM | SHMEM_THP | HUGETLB | HUGETLB_PRIVATE)

struct test {
	const char *name; // group.what
	void (*run)(enum kind kind);
	unsigned kinds;
	unsigned seconds; // 0: 10
};
extern const struct test stock_tests[], rwp_tests[], rfc_tests[]; // each ends with a row without a name

// Each ends the test, from whatever thread or child of it: the first verdict counts.
_Noreturn void test_end(int verdict, const char *file, int line, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
#define FAIL(...) test_end(1, __FILE__, __LINE__, __VA_ARGS__)
#define SKIP(...) test_end(2, __FILE__, __LINE__, __VA_ARGS__)
#define CHECK(what)                                                                                                    \
	do {                                                                                                           \
		if (!(what))                                                                                           \
			FAIL("%s", #what);                                                                             \
	} while (0)
// EQUAL(got, want): as CHECK, and shows both.
#define EQUAL(got, want)                                                                                               \
	do {                                                                                                           \
		long long got_ = (long long)(got), want_ = (long long)(want);                                          \
		if (got_ != want_)                                                                                     \
			FAIL("%s is %lld (0x%llx), not %s (%lld)", #got, got_, got_, #want, want_);                    \
	} while (0)
#define MUST(what) /* a call that answers -1 and errno otherwise */                                                    \
	({                                                                                                             \
		__typeof__(what) must_ = (what);                                                                       \
		if ((long)must_ == -1)                                                                                 \
			FAIL("%s: %s", #what, strerror(errno));                                                        \
		must_;                                                                                                 \
	})

extern bool may_change_system; // --system: this is a throw-away machine (sysctls, swap, huge page pool)
bool set_system(const char *path, const char *value); // writes a sysctl or sysfs file if --system allows it
void need_swap(void);                                 // a zram swap device is on, or SKIP
void need_root(void);
// A new disk of 16 MiB, open for O_DIRECT, or SKIP; `id` is for when it is not needed any more.
int zram_disk(char id[16]);
void zram_disk_gone(int fd, const char *id);
// A counter of /proc/vmstat; -1: this kernel has none of that name.
long vmstat(const char *name);
int numa_nodes(void);

// ---- memory

struct memory {
	enum kind kind;
	char *at;
	size_t page;  // bytes of a unit: 4 KiB, or 2 MiB for the huge kinds
	size_t pages; // units
	size_t size;  // bytes
	int fd;       // the memfd, or -1
};
struct memory memory(enum kind kind, size_t pages); // unpopulated; SKIP where the machine has no such memory
void fill(const struct memory *m);                  // every 4 KiB of it gets its pattern (fill_word), touched in order
uint64_t fill_word(const struct memory *m, size_t offset);
void check_fill(const struct memory *m,
		const char *at);                   // the pattern is there, read through `at` (m->at or another mapping)
char *unit(const struct memory *m, size_t page);   // its address
void page_out(const struct memory *m);             // PAGEOUT, on each CPU
bool is_huge(const struct memory *m, size_t page); // it is mapped by one PMD (PAGEMAP_SCAN)

// ---- userfaultfd: the try_ forms and xioctl answer 0 or -errno, the others end the test

int xioctl(int fd, unsigned long request, void *argument);
int uffd_create(int flags); // the system call: a descriptor or -errno; O_CLOEXEC is added
int try_api(int uffd, uint64_t features, struct uffdio_api *answer); // answer may be NULL
int uffd_open(uint64_t features); // created with O_NONBLOCK, UFFDIO_API done; SKIP without the right to
uint64_t uffd_features(void);     // what the kernel offers
uint64_t uffd_api_ioctls(void);
int try_register(int uffd, const void *at, size_t size, uint64_t mode, uint64_t *ioctls);
uint64_t uffd_register(int uffd, const void *at, size_t size, uint64_t mode); // answers the ioctls
int try_unregister(int uffd, const void *at, size_t size);
int try_wake(int uffd, const void *at, size_t size);
int try_copy(int uffd, void *to, const void *from, size_t size, uint64_t mode,
	     int64_t *done); // done may be NULL, here and below
int try_zeropage(int uffd, void *at, size_t size, uint64_t mode, int64_t *done);
int try_continue(int uffd, void *at, size_t size, uint64_t mode, int64_t *done);
int try_writeprotect(int uffd, const void *at, size_t size, uint64_t mode);
int try_move(int uffd, void *to, void *from, size_t size, uint64_t mode, int64_t *done);
int try_set_mode(int uffd, uint64_t enable, uint64_t disable);
int try_deactivate(int uffd, const void *at, size_t size);               // rfc
int try_rwprotect(int uffd, const void *at, size_t size, uint64_t mode); // rwp
bool read_message(int uffd, struct uffd_msg *message, int ms);           // false: none within ms
// The next message is a page fault at this unit's address with exactly these flags.
void expect_fault(int uffd, const void *at, uint64_t flags, const char *file, int line);
#define EXPECT_FAULT(uffd, at, flags) expect_fault(uffd, at, flags, __FILE__, __LINE__)
#define EXPECT_SILENCE(uffd)                                                                                           \
	do {                                                                                                           \
		struct uffd_msg message_;                                                                              \
		if (read_message(uffd, &message_, 100))                                                                \
			FAIL("a message came: event 0x%x flags 0x%llx", message_.event,                                \
			     (unsigned long long)message_.arg.pagefault.flags);                                        \
	} while (0)

// ---- accesses that may block

struct touch {
	pthread_t thread;
	void *at;
	bool write; // of `value`; a read puts it there
	uint64_t value;
	atomic_int done;
	pid_t tid;
};
void touch(struct touch *t, void *at); // starts a thread that reads 8 bytes
void touch_write(struct touch *t, void *at, uint64_t value);
bool touch_done(struct touch *t, int ms); // it finished within ms
uint64_t touch_value(struct touch *t);    // waits (the test's alarm is the limit), joins
#define EXPECT_BLOCKED(t)                                                                                              \
	do {                                                                                                           \
		if (touch_done(t, 150))                                                                                \
			FAIL("%s is not blocked", #t);                                                                 \
	} while (0)
#define EXPECT_DONE(t)                                                                                                 \
	do {                                                                                                           \
		if (!touch_done(t, 5000))                                                                              \
			FAIL("%s is still blocked", #t);                                                               \
	} while (0)
// The same for any call that may block: function(argument) in a thread; the answer in `answer`, its errno in `error`.
struct call {
	pthread_t thread;
	long (*function)(void *argument);
	void *argument;
	long answer;
	int error;
	atomic_int done;
};
void call(struct call *c, long (*function)(void *), void *argument);
bool call_done(struct call *c, int ms);
int signal_of(volatile void *at, bool write); // accesses 8 bytes here and now: 0, or the SIGSEGV or SIGBUS it raised

// ---- looking

int pagemap(pid_t pid); // /proc/PID/pagemap; 0 is oneself
// PAGEMAP_SCAN: the number of regions or -errno. `walk_end` may be NULL.
long scan(int fd, const void *at, size_t size, uint64_t mask, uint64_t inverted, uint64_t anyof, uint64_t returned,
	  struct page_region *to, size_t regions, uint64_t flags, uint64_t *walk_end);
// How many units of it a scan with these masks matches; `which`, if not NULL, gets one bool each. Needs PAGEMAP_SCAN.
size_t count(const struct memory *m, uint64_t mask, uint64_t inverted, uint64_t anyof, bool *which);
uint64_t categories(const void *at); // of one page: all raw categories this kernel knows (bit 9 if it does); 0 for none
uint64_t pagemap_entry(const void *at);
bool vm_flag(const void *at, const char *two_letters);                // in smaps' VmFlags
long smaps_kib(const void *at, const char *field);                    // e.g. "AnonHugePages"
bool is_cached(const struct memory *m, size_t page);                  // the file holds it (SEEK_DATA)
int punch(const struct memory *m, size_t page, size_t pages);         // 0 or -errno
long process_read(pid_t pid, const void *at, void *to, size_t size);  // process_vm_readv: bytes or -errno
long proc_mem_read(pid_t pid, const void *at, void *to, size_t size); // /proc/PID/mem: bytes or -errno
void sleep_ms(int ms);
uint64_t now_ns(void);
pid_t fork_child(void);         // a child that dies with the test
int wait_child(pid_t pid);      // its exit status, or 128 + the signal
int take_fd(pid_t pid, int fd); // a copy of another process's descriptor (pidfd_getfd)
#endif
