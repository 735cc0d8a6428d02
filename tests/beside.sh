#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# beside.sh "LOW COMMAND" COMMAND...: runs both. LOW has what COMMAND leaves of the machine; what it says is shown at the end.
#
# A session is a group of its own to the scheduler where autogroups are on, and then `nice` means something inside of it only.
set -u
said=$(mktemp)
setsid bash -c '{ echo 19 >/proc/self/autogroup; } 2>/dev/null; exec nice -n 19 $0' "$1" >"$said" 2>&1 &
low=$!
trap 'kill -- -$low 2>/dev/null; rm -f "$said"' EXIT
trap 'exit 130' INT TERM
shift
"$@"
status=$?
wait $low || status=$?
cat "$said"
exit $status
