/* SPDX-License-Identifier: Apache-2.0 */
/*
 * child.h: what both test VMMs share: the line protocol, the report of a wrong value, and an end when the test ends.
 *
 * One command a line on stdin, one answer a line on stdout: "ok ..." or "error ...". A wrong value is reported at once, by
 * whichever thread saw it, as "WRONG page=.. word=.. got=.. want=..". Nothing ever blocks on stdout: what the test does not
 * read is dropped (wrong values are counted all the same).
 */
#ifndef CHILD_H
#define CHILD_H

#include <stdatomic.h>
#include <stdint.h>

extern _Atomic uint64_t wrong_values;

struct command {
	const char *name;
	/* answers with say(); missing numbers are 0, `count` says how many there were */
	void (*run)(const uint64_t *arguments, int count);
};

uint64_t now_ns(void);
void pause_ns(uint64_t ns);
uint64_t mix(uint64_t x);

/* one line, in one write: lines of several threads never mix */
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);
void answer(long result); /* of a system call */
void wrong(uint64_t page, uint64_t word, uint64_t got, uint64_t want);
__attribute__((noreturn)) void die(const char *what);

void start_protocol(void);
void obey(const struct command *commands); /* until the test ends */

#endif
