# SPDX-License-Identifier: Apache-2.0
"""A plug-in for a disk of this host alone: a directory a guest, a file a page. Its package names tierd_plain:PlainStore."""

import shutil
from pathlib import Path

import trio

from tierd.store import StoreError

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # a guest's key comes back after a boot


class PlainSpace:
    def __init__(self, path):
        self.path = path

    async def write(self, first_page, records):
        new = [(self.path / f"{page}.new", self.path / f"{page}", r) for page, r in enumerate(records, first_page)]
        # a page has its old record or its new one; a cancellation waits: nothing is written after it
        await trio.to_thread.run_sync(lambda: [(file.write_bytes(r), file.rename(to)) for file, to, r in new])

    async def read(self, first_page, count):
        files = [self.path / str(page) for page in range(first_page, first_page + count)]
        return await trio.to_thread.run_sync(lambda: [f.read_bytes() if f.exists() else None for f in files])

    async def discard(self, first_page, count):
        await trio.to_thread.run_sync(lambda: [(self.path / str(first_page + n)).unlink(True) for n in range(count)])

    async def used_bytes(self):
        return await trio.to_thread.run_sync(lambda: sum(file.stat().st_size for file in self.path.iterdir()))

    async def delete(self):
        await trio.to_thread.run_sync(shutil.rmtree, self.path)

    async def aclose(self): ...


class PlainStore:
    def __init__(self, options, context):
        self.path = Path(options["path"])

    async def open(self, key, pages, page_bytes):
        path = self.path / f"{BOOT}.{key}.{pages}.{page_bytes}"
        if any(other != path for other in self.path.glob(f"{BOOT}.{key}.*")):
            raise StoreError(f"{self.path} has a space of {key} that is not {pages} pages of {page_bytes} bytes")
        path.mkdir(0o700, exist_ok=True)
        return PlainSpace(path)

    async def probe(self):
        if not self.path.is_dir():
            raise StoreError(f"{self.path} is not a directory; make it, or set path")

    async def sweep(self, may_be_needed):
        spaces = [(path, *path.name.split(".")[:2]) for path in self.path.glob("*.*.*.*")]
        gone = {path: key for path, boot, key in spaces if boot != BOOT or not may_be_needed(key)}
        for path in gone:
            await trio.to_thread.run_sync(shutil.rmtree, path)
        return sorted(gone.values())

    async def aclose(self): ...
