#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# beside.sh NICE "OTHER COMMAND" COMMAND...: runs both, OTHER at that niceness: at 19 it has what COMMAND leaves of the machine. What it
# says is shown at the end.
#
# A session is a group of its own to the scheduler where autogroups are on, and then `nice` means something inside of it only.
set -u
said=$(mktemp)
setsid bash -c '{ echo $0 >/proc/self/autogroup; } 2>/dev/null; exec nice -n $0 $1' "$1" "$2" >"$said" 2>&1 &
other=$!
trap 'kill -- -$other 2>/dev/null; rm -f "$said"' EXIT
trap 'exit 130' INT TERM
shift 2
"$@"
status=$?
wait $other || status=$?
cat "$said"
exit $status
