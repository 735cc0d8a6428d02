# SPDX-License-Identifier: Apache-2.0
"""An example of a plug-in: pages in SQLite, a file a guest. Its package says in pyproject.toml:

[project.entry-points."tierd.stores"]
sqlite = "tierd_sqlite:SqliteStore"
"""

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from tierd.store import StoreError

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SqliteSpace:
    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, trio.Lock()
        self.db = sqlite3.connect(path, check_same_thread=False)
        self.db.execute("PRAGMA synchronous=FULL")  # a page is on the disk when write returns
        self.db.execute("CREATE TABLE IF NOT EXISTS pages (page INTEGER PRIMARY KEY, record BLOB)")

    async def run(self, execute: Callable[..., sqlite3.Cursor], sql: str, values: Iterable[Any]) -> list[Any]:
        def call() -> list[Any]:
            try:
                with self.db:  # all or nothing
                    return execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise OSError(f"{self.path}: {error}") from error

        async with self.lock:
            return await trio.to_thread.run_sync(call)  # a cancellation waits: nothing is written after it

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await self.run(self.db.executemany, "REPLACE INTO pages VALUES (?, ?)", enumerate(records, first_page))

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        sql = "SELECT page, record FROM pages WHERE page >= ? AND page < ?"
        found = dict(await self.run(self.db.execute, sql, (first_page, first_page + count)))
        return [found.get(page) for page in range(first_page, first_page + count)]

    async def discard(self, first_page: int, count: int) -> None:
        sql = "DELETE FROM pages WHERE page >= ? AND page < ?"
        await self.run(self.db.execute, sql, (first_page, first_page + count))

    async def used_bytes(self) -> int:
        return int((await self.run(self.db.execute, "SELECT total(length(record)) FROM pages", ()))[0][0])

    async def delete(self) -> None:
        await self.aclose()
        self.path.unlink(missing_ok=True)

    async def aclose(self) -> None:
        self.db.close()


class SqliteStore:
    def __init__(self, options: Mapping[str, object]) -> None:
        self.path = Path(str(options["path"]))

    async def open(self, key: str, pages: int, page_bytes: int) -> SqliteSpace:
        path = self.path / f"{BOOT}.{key}.{pages}.{page_bytes}.pages"
        if any(other != path for other in self.path.glob(f"{BOOT}.{key}.*.pages")):
            raise StoreError(f"{self.path} has a space of {key} that is not {pages} pages of {page_bytes} bytes")
        return SqliteSpace(path)

    async def probe(self) -> None:
        if not self.path.is_dir():
            raise StoreError(f"{self.path} is not a directory; make it, or set path")

    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        spaces = [(path, *path.name.split(".")[:2]) for path in self.path.glob("*.pages")]
        gone = {path: key for path, boot, key in spaces if boot != BOOT or not may_be_needed(key)}
        for path in gone:
            path.unlink()
        return sorted(gone.values())

    async def aclose(self) -> None:
        pass
