# SPDX-License-Identifier: Apache-2.0
"""Clients of the real daemon's API that mean no good, while a guest works: it goes on, and so does the service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.daemon.process import Boot, Daemon, evicted
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, wait_for

CONNECTIONS = 10_000
# Opens as many as it is let, sends what its argument says on each, and waits to be told to end.
CLIENTS = """
import resource, socket, sys
path, count, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 100), hard))
data = {"nothing": b"", "half": b"POST /guests HTTP/1.1\\r\\nHost: x\\r\\nContent-Le", "much": b"x" * (10 << 20)}[kind]
kept, tried = [], 0
while tried < count:
    tried += 1
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    try:
        client.connect(path)
        client.send(data)
    except OSError:  # no place, or closed already
        client.close()
        continue
    kept.append(client)
print(tried, len(kept), flush=True)
sys.stdin.read()
"""


def rss_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def answers(daemon: Daemon) -> bool:
    try:
        return daemon.guests()["web"]["state"] == "active"
    except BlockingIOError:  # those who are gone are still in the queue
        return False


def test_ten_thousand_connections(daemon: Daemon, boot: Boot) -> None:
    """That send nothing, half a request, or 10 MiB. Faults are served, the watchdog is fed, memory stays, and when they are gone
    the next question is answered."""
    vmm = boot("web")
    daemon.start()
    assert daemon.process is not None
    evicted(daemon, "web", vmm)
    vmm.ask("run", 1000, 50)
    before = rss_bytes(daemon.process.pid)
    for kind in ("nothing", "half", "much"):
        command = [sys.executable, "-c", CLIENTS, str(daemon.socket), str(CONNECTIONS), kind]
        clients = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert clients.stdout is not None
            tried, kept = (int(word) for word in clients.stdout.readline().split())
            assert tried == CONNECTIONS
            assert kept > 64, "more than there are places for"
            operations = vmm.stats()["operations"]
            wait_for(lambda n=operations: vmm.stats()["operations"] > n + 200, "the guest goes on")
            for _ in range(3):
                while daemon.notify.recv(4096).decode() != "WATCHDOG=1":
                    pass
            assert rss_bytes(daemon.process.pid) < before + 64 * MIB
        finally:
            clients.kill()
            clients.communicate()
        wait_for(lambda: answers(daemon), "it answers again")
    vmm.ask("stop")
    vmm.verify()
