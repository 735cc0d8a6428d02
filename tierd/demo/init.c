/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The only program in the demo's guest: fills memory with data that it can check, keeps using a hot part of it, and checks
 * all of it on a timer and when told to. It talks to the host in single lines over the console:
 *
 *	READY used=BYTES zero=BYTES cold=BYTES hot=BYTES	memory is filled
 *	TICK rounds=N wrong=BYTES				once a second: passes over the hot part, bytes found wrong so far
 *	VERIFIED bytes=BYTES wrong=BYTES ms=N			every byte was compared; `wrong` counts all since the start
 *
 * and obeys the lines `verify` and `quit`. Settings are NAME=VALUE words of the kernel's command line, which it hands to us
 * as the environment: USED_PERCENT of the free memory, ZERO_PERCENT and HOT_PERCENT of that, VERIFY_S between verifications
 * and LIFE_S until it quits by itself (0: never). The guest's power goes off when this program ends, however it ends
 * (panic=-1 and -no-reboot).
 */
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/sysinfo.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_WORDS = 512, ROUND_MS = 200 };

struct page {
	uint64_t word[PAGE_WORDS];
};

/* pages [0, zero) are all zeros, [zero, cold_end) are written once, [cold_end, total) are written anew in every round */
static struct page *pages;
static uint64_t zero, cold_end, total;
static uint64_t rounds, wrong_bytes;

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static uint64_t setting(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);

	return text ? strtoull(text, NULL, 10) : otherwise;
}

/* Every page and every round has a sequence of its own, so a page in the wrong place, or an old one, is wrong as well. */
static uint64_t seed(uint64_t page, uint64_t round)
{
	uint64_t x = (page + 1) * 0x9e3779b97f4a7c15u + round * 0xbf58476d1ce4e5b9u;

	x = (x ^ (x >> 30)) * 0x94d049bb133111ebu;
	return (x ^ (x >> 31)) | 1;
}

static uint64_t next(uint64_t x)
{
	x ^= x << 13;
	x ^= x >> 7;
	return x ^ (x << 17);
}

/* Every other page has each word four times, so that it compresses. */
static int repeats(uint64_t page)
{
	return page % 2 ? 4 : 1;
}

static void fill(uint64_t page, uint64_t round)
{
	uint64_t x = seed(page, round);

	for (int i = 0; i < PAGE_WORDS; i++) {
		if (i % repeats(page) == 0)
			x = next(x);
		pages[page].word[i] = x;
	}
}

static void mismatch(uint64_t difference)
{
	for (; difference; difference >>= 8)
		wrong_bytes += (difference & 0xff) != 0;
}

static void check(uint64_t page, uint64_t round)
{
	uint64_t x = seed(page, round);

	for (int i = 0; i < PAGE_WORDS; i++) {
		if (i % repeats(page) == 0)
			x = next(x);
		if (pages[page].word[i] != x)
			mismatch(pages[page].word[i] ^ x);
	}
}

static void check_zero(uint64_t page)
{
	for (int i = 0; i < PAGE_WORDS; i++)
		if (pages[page].word[i])
			mismatch(pages[page].word[i]);
}

static void verify(void)
{
	uint64_t start_ms = now_ms();

	for (uint64_t p = 0; p < zero; p++)
		check_zero(p);
	for (uint64_t p = zero; p < cold_end; p++)
		check(p, 0);
	for (uint64_t p = cold_end; p < total; p++)
		check(p, rounds);
	printf("VERIFIED bytes=%llu wrong=%llu ms=%llu\n", (unsigned long long)(total * sizeof(struct page)),
	       (unsigned long long)wrong_bytes, (unsigned long long)(now_ms() - start_ms));
}

static void use_hot_part(void)
{
	for (uint64_t p = cold_end; p < total; p++) {
		check(p, rounds);
		fill(p, rounds + 1);
	}
	rounds++;
}

static int fill_memory(void)
{
	struct sysinfo info;

	if (sysinfo(&info))
		return -1;
	total = info.freeram * info.mem_unit / 100 * setting("USED_PERCENT", 88) / sizeof(struct page);
	zero = total * setting("ZERO_PERCENT", 8) / 100;
	cold_end = total - total * setting("HOT_PERCENT", 10) / 100;
	pages = mmap(NULL, total * sizeof(struct page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pages == MAP_FAILED)
		return -1;
	memset(pages, 0, zero * sizeof(struct page)); /* written, or the guest's kernel would not allocate them */
	for (uint64_t p = zero; p < total; p++)
		fill(p, 0);
	printf("READY used=%llu zero=%llu cold=%llu hot=%llu\n", (unsigned long long)(total * sizeof(struct page)),
	       (unsigned long long)(zero * sizeof(struct page)),
	       (unsigned long long)((cold_end - zero) * sizeof(struct page)),
	       (unsigned long long)((total - cold_end) * sizeof(struct page)));
	return 0;
}

/* Waits up to ROUND_MS for a command; 0 when it was `quit`. */
static int obey(void)
{
	struct pollfd console = {.fd = STDIN_FILENO, .events = POLLIN};
	char line[64];
	ssize_t bytes;

	if (poll(&console, 1, ROUND_MS) <= 0)
		return 1;
	bytes = read(STDIN_FILENO, line, sizeof(line) - 1); /* the console is in line mode: one line a read */
	if (bytes < 0)
		return 1;
	line[bytes] = 0;
	if (!strncmp(line, "verify", 6))
		verify();
	return strncmp(line, "quit", 4) != 0;
}

static void echo_off(void)
{
	struct termios t;

	if (tcgetattr(STDIN_FILENO, &t))
		return;
	t.c_lflag &= ~(tcflag_t)ECHO;
	tcsetattr(STDIN_FILENO, TCSANOW, &t);
}

int main(void)
{
	uint64_t verify_ms = setting("VERIFY_S", 0) * 1000, life_ms = setting("LIFE_S", 0) * 1000;
	uint64_t tick_ms, verified_ms;

	setvbuf(stdout, NULL, _IOLBF, 0);
	echo_off();
	puts("BOOTED");
	if (fill_memory()) {
		perror("FAILED");
		return 1;
	}
	tick_ms = verified_ms = now_ms();
	do {
		use_hot_part();
		if (now_ms() - tick_ms >= 1000) {
			tick_ms = now_ms();
			printf("TICK rounds=%llu wrong=%llu\n", (unsigned long long)rounds,
			       (unsigned long long)wrong_bytes);
		}
		if (verify_ms && now_ms() - verified_ms >= verify_ms) {
			verify();
			verified_ms = now_ms();
		}
	} while (obey() && !(life_ms && now_ms() >= life_ms));
	puts("BYE");
	tcdrain(STDOUT_FILENO);
	reboot(RB_POWER_OFF);
	return 0;
}
