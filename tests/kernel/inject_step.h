/* SPDX-License-Identifier: Apache-2.0 */
/* inject_step.h: included before inject.h everywhere in the killer, so that each step of a call can be its last. */
#ifndef INJECT_STEP_H
#define INJECT_STEP_H

void inject_step(int n);
#define TIERD_INJECT_STEP(n) inject_step(n)

#endif
