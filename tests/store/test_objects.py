# SPDX-License-Identifier: Apache-2.0
"""The object store in a directory: what comes back, what a successor finds, what is cleaned up, what is told."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tierd.store.objects import ObjectOptions, ObjectSpace, ObjectStore

PAGE = 4096
PAGES = 2048
KEY = "4711-123456"
SEGMENT = 64 << 10


@pytest.fixture
def options(disk_dir: Path, tmpfs_dir: Path) -> ObjectOptions:
    root = disk_dir / "objects"
    return ObjectOptions("fs", tmpfs_dir, "host-a", "boot-1", {"root": str(root)}, segment_bytes=SEGMENT)


def page(number: int, version: int = 0) -> bytes:
    """Half of it compresses."""
    return random.Random(f"{number} {version}").randbytes(PAGE // 2) + bytes(PAGE // 2)


def pages(first: int, count: int, version: int = 0) -> list[bytes]:
    return [page(number, version) for number in range(first, first + count)]


def run(test: Callable[..., Awaitable[Any]], *args: object) -> Any:
    async def bounded() -> Any:
        with trio.fail_after(60):
            return await test(*args)

    return trio.run(bounded)


async def opened(options: ObjectOptions, key: str = KEY) -> ObjectSpace:
    return await ObjectStore(options).open(key, PAGES, PAGE)


def objects(options: ObjectOptions) -> dict[str, int]:
    root = Path(options.options["root"])
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def test_what_was_written_is_read_by_whoever_comes_next(options: ObjectOptions) -> None:
    async def test() -> None:
        space = await opened(options)
        await space.write(10, pages(10, 40))
        await space.write(12, pages(12, 2, 1))
        await space.discard(20, 5)
        wanted = pages(10, 2) + pages(12, 2, 1) + pages(14, 6) + [None] * 5 + pages(25, 25) + [None]
        assert await space.read(10, 41) == wanted
        assert await space.read(0, 3) == [None] * 3
        assert await space.read(13, 1) == pages(13, 1, 1)
        await space.aclose()
        again = await opened(options)
        assert await again.read(10, 41) == wanted
        assert await again.used_bytes() == sum(objects(options).values())
        await again.aclose()

    run(test)


def test_an_index_that_is_gone_is_rebuilt_and_the_newest_copy_wins(options: ObjectOptions) -> None:
    async def test() -> None:
        space = await opened(options)
        for version in range(5):
            await space.write(0, pages(0, 16, version))
            await space.write(100 + version, pages(100 + version, 1))
        await space.aclose()
        os.unlink(options.index_dir / f"{KEY}.segments")
        again = await opened(options)
        assert await again.read(0, 16) == pages(0, 16, 4)
        assert await again.read(100, 6) == [*pages(100, 5), None]
        await again.write(0, pages(0, 16, 9))
        assert await again.read(0, 16) == pages(0, 16, 9)
        await again.aclose()

    run(test)
