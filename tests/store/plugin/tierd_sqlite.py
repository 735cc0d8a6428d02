# SPDX-License-Identifier: Apache-2.0
"""An example of a plug-in: pages in SQLite, a file a guest. Its package names tierd_sqlite:SqliteStore in pyproject.toml."""

import sqlite3
from pathlib import Path

import trio

from tierd.store import StoreError

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
RANGE = "page >= ? AND page < ?"


class SqliteSpace:
    def __init__(self, path):
        self.path, self.lock, self.db = path, trio.Lock(), sqlite3.connect(path, check_same_thread=False)
        self.db.execute("PRAGMA synchronous=FULL")  # a page is on the disk when write returns
        self.db.execute("CREATE TABLE IF NOT EXISTS pages (page INTEGER PRIMARY KEY, record BLOB)")

    async def run(self, execute, sql, values):
        def call():
            try:
                with self.db:  # all or nothing
                    return execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise OSError(f"{self.path}: {error}") from error

        async with self.lock:
            return await trio.to_thread.run_sync(call)  # a cancellation waits: nothing is written after it

    async def write(self, first_page, records):
        await self.run(self.db.executemany, "REPLACE INTO pages VALUES (?, ?)", enumerate(records, first_page))

    async def read(self, first_page, count):
        pages = range(first_page, first_page + count)
        found = dict(await self.run(self.db.execute, f"SELECT * FROM pages WHERE {RANGE}", (pages.start, pages.stop)))
        return [found.get(page) for page in pages]

    async def discard(self, first_page, count):
        await self.run(self.db.execute, f"DELETE FROM pages WHERE {RANGE}", (first_page, first_page + count))

    async def used_bytes(self):
        return int((await self.run(self.db.execute, "SELECT total(length(record)) FROM pages", ()))[0][0])

    async def delete(self):
        await self.aclose()
        self.path.unlink(missing_ok=True)

    async def aclose(self):
        self.db.close()


class SqliteStore:
    def __init__(self, options, context):
        self.path = Path(options["path"])

    async def open(self, key, pages, page_bytes):
        path = self.path / f"{BOOT}.{key}.{pages}.{page_bytes}.pages"
        if any(other != path for other in self.path.glob(f"{BOOT}.{key}.*.pages")):
            raise StoreError(f"{self.path} has a space of {key} that is not {pages} pages of {page_bytes} bytes")
        return SqliteSpace(path)

    async def probe(self):
        if not self.path.is_dir():
            raise StoreError(f"{self.path} is not a directory; make it, or set path")

    async def sweep(self, may_be_needed):
        spaces = [(path, *path.name.split(".")[:2]) for path in self.path.glob("*.pages")]
        gone = {path: key for path, boot, key in spaces if boot != BOOT or not may_be_needed(key)}
        for path in gone:
            path.unlink()
        return sorted(gone.values())

    async def aclose(self): ...
