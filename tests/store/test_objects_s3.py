# SPDX-License-Identifier: Apache-2.0
"""The object store on a real S3 server (moto's) on loopback, also a slow, failing and lying one."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import trio

from tests.store.test_objects import KEY, PAGE, PAGES, Given, pages
from tierd.store import PageStore, StoreError
from tierd.store.objects import INDEX_SUFFIX, ObjectSpace, ObjectStore
from tierd.testing import PageStoreContract

DEADLINE_S = 30.0  # whatever else the machine does


class Server:
    """It ends when its input does, so also when we are killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.s3_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{int(self._line())}"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def fault(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        assert self._line() == "ok\n"

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.url,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        running.client("s3").create_bucket(Bucket="cold")
        yield running


@pytest.fixture
def given(server: Server, tmp_path: Path, tmpfs_dir: Path) -> Iterator[Given]:
    path = tmp_path / "credentials"
    path.touch(0o600)
    path.write_text("access_key_id = test\nsecret_access_key = test\n")
    options = {"endpoint": server.url, "bucket": "cold", "region": "us-east-1"}
    yield Given("s3", tmpfs_dir, options, path, deadline_s=DEADLINE_S, retries=2)
    server.fault("none")
    if left := [{"Key": name} for name in names(server)]:
        server.client("s3").delete_objects(Bucket="cold", Delete={"Objects": left})


def names(server: Server) -> list[str]:
    return [entry["Key"] for entry in server.client("s3").list_objects_v2(Bucket="cold").get("Contents", [])]


def run(test: Callable[..., Awaitable[Any]], *args: object) -> Any:
    async def bounded() -> Any:
        with trio.fail_after(240):
            return await test(*args)

    return trio.run(bounded)


async def answered(call: Callable[..., Awaitable[Any]], *args: object) -> Any:
    """What it answers in the end: on a machine that is busy a short deadline is too short now and then."""
    while True:
        try:
            return await call(*args)
        except TimeoutError:
            await trio.sleep(0.1)


async def opened(given: Given, key: str = KEY) -> ObjectSpace:
    return await given.store().open(key, PAGES, PAGE)


class TestS3(PageStoreContract):
    @pytest.fixture(autouse=True)
    def _given(self, given: Given) -> None:
        self.given = replace(given, segment_bytes=8 << 20)

    def make_store(self) -> PageStore:
        return self.given.store()


@pytest.mark.parametrize("index", ["kept", "gone"])
def test_a_guests_life(server: Server, given: Given, index: str) -> None:
    async def test() -> None:
        await given.store().probe()
        space = await opened(given)
        await space.write(0, pages(0, 200))
        await space.write(50, pages(50, 10, 1))
        await space.discard(0, 20)
        await space.discard(100, 90)
        assert len(names(server)) < 12
        assert await space.used_bytes() < 110 * PAGE
        await space.aclose()
        if index == "gone":
            (given.index_dir / f"{KEY}{INDEX_SUFFIX}").unlink()
        again = await opened(given)
        assert await again.read(20, 80) == pages(20, 30) + pages(50, 10, 1) + pages(60, 40)
        assert await again.read(200, 3) == [None] * 3
        await again.aclose()
        assert await given.store().sweep(lambda _: True) == []
        assert await given.store().sweep(lambda _: False) == [KEY]
        assert names(server) == ["host-a/boot-1/lease"]

    run(test)


def test_more_segments_than_one_answer_lists(server: Server, given: Given) -> None:
    async def test() -> None:
        store = given.store()
        await store.each(lambda n: store.bucket.put(f"host-a/boot-1/{KEY}/{n:04d}", b"x"), range(1010))
        assert len(await store.in_thread(store.bucket.entries, f"host-a/boot-1/{KEY}/")) == 1010
        await store.sweep(lambda _: False)
        assert names(server) == ["host-a/boot-1/lease"]

    run(test)


def test_a_bucket_that_is_not_there(given: Given) -> None:
    options = {**given.options, "bucket": "warm"}
    with pytest.raises(StoreError, match=r"the bucket or directory is not there; create it.*NoSuchBucket"):
        run(replace(given, options=options).store().probe)


def test_a_server_that_is_not_there(given: Given) -> None:
    with Server() as other:
        options = {**given.options, "endpoint": other.url}
    with pytest.raises(StoreError, match=r"nobody answers there; is the endpoint right"):
        run(replace(given, options=options).store().probe)


def test_no_credentials(given: Given, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match=r"access is refused; are the credentials right"):
        run(replace(given, credentials=None).store().probe)


def test_wrong_credentials(given: Given, tmp_path: Path) -> None:
    """moto checks signatures of users that its IAM knows."""

    def credentials(name: str, secret: str) -> ObjectStore:
        path = tmp_path / "others"
        path.touch(0o600)
        path.write_text(f"access_key_id = {name}\nsecret_access_key = {secret}\n")
        return replace(given, options={**given.options, "endpoint": strict.url}, credentials=path).store()

    with Server() as strict:
        strict.client("s3").create_bucket(Bucket="cold")
        iam = strict.client("iam")
        iam.create_user(UserName="tierd")
        allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        iam.put_user_policy(UserName="tierd", PolicyName="all", PolicyDocument=policy)
        key = iam.create_access_key(UserName="tierd")["AccessKey"]
        httpx.post(f"{strict.url}/moto-api/reset-auth", content="0").raise_for_status()
        right = credentials(key["AccessKeyId"], key["SecretAccessKey"]).bucket
        right.put(
            "host-a/one", b"x"
        )  # not probe: moto's own signature of a list with a slash in its prefix is another one
        assert right.get("host-a/one", 0, 1) == b"x"
        for name, secret in ((key["AccessKeyId"], "wrong"), ("AKIAIOSFODNN7EXAMPLE", "wrong")):
            with pytest.raises(StoreError, match=r"access is refused; are the credentials right") as caught:
                run(credentials(name, secret).probe)
            assert "wrong" not in str(caught.value)


@pytest.mark.parametrize("fault", ["503 2", "slow 0.1"])
def test_a_server_that_is_slow_or_fails_now_and_then(server: Server, given: Given, fault: str) -> None:
    async def test() -> None:
        space = await opened(given)
        for first in range(0, 64, 16):
            server.fault(fault)
            await space.write(first, pages(first, 16))
            server.fault(fault)
            assert await space.read(first, 16) == pages(first, 16)
        await space.aclose()

    run(test)


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        ("503", errno.EIO),
        ("hang", errno.ETIMEDOUT),
        ("cut", errno.EIO),
        ("flip", errno.EBADMSG),
    ],
)
def test_a_server_that_fails_is_an_error_and_then_all_is_there(
    server: Server, given: Given, fault: str, number: int
) -> None:
    quick = replace(given, retries=0, deadline_s=1.0) if fault == "hang" else given  # a try takes until the deadline

    async def test() -> None:
        space = await answered(opened, quick)
        await answered(space.write, 0, pages(0, 32))
        server.fault(fault)
        with pytest.raises(OSError) as caught:
            await space.read(3, 1)
        assert caught.value.errno == number
        if fault not in ("cut", "flip"):  # which concern reads
            with pytest.raises(OSError) as caught:
                await space.write(0, pages(0, 32, 1))
            assert caught.value.errno == number
            with pytest.raises(StoreError, match="cannot be used"):
                await quick.store().probe()
            with pytest.raises(OSError) as caught:
                await opened(quick)
            assert caught.value.errno == number
        server.fault("none")
        assert await answered(space.read, 0, 32) == pages(0, 32)
        await answered(space.write, 0, pages(0, 32, 2))
        assert await answered(space.read, 0, 32) == pages(0, 32, 2)
        await space.aclose()
        again = await opened(given)
        assert await again.read(0, 32) == pages(0, 32, 2)
        await again.aclose()

    run(test)


def test_a_server_that_is_killed(given: Given) -> None:
    async def test() -> None:
        with Server() as other:
            other.client("s3").create_bucket(Bucket="cold")
            space = await opened(replace(given, options={**given.options, "endpoint": other.url}))
            await space.write(0, pages(0, 16))
            other.process.kill()
            other.process.wait()
            with pytest.raises(OSError):
                await space.read(0, 1)
            await space.aclose()

    run(test)


def test_a_list_that_hangs_stops_no_other_thread(server: Server, given: Given) -> None:
    """The sweep lists, once a minute: meanwhile faults are served, the API answers, and the watchdog is fed."""
    given = replace(given, deadline_s=3.0, retries=0)

    async def test() -> None:
        store, beats = given.store(), 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await trio.sleep(0.01)
                beats += 1

        async with trio.open_nursery() as nursery:
            await trio.to_thread.run_sync(server.fault, "hang")
            nursery.start_soon(beat)
            with pytest.raises(OSError):
                await trio.to_thread.run_sync(store.bucket.entries, f"{store.host}/")
            nursery.cancel_scope.cancel()
        assert beats > 20, "one of trio's rounds or two, where its thread is held"
        await store.aclose()

    run(test)


def test_a_write_that_lands_after_its_guest_was_left_and_attached_again(server: Server, given: Given) -> None:
    """The object has a name that nobody has had."""

    async def test() -> None:
        space = await opened(replace(given, deadline_s=2.0, retries=0))
        server.fault("late")
        with pytest.raises(OSError):
            await space.write(0, pages(0, 4, 1))
        server.fault("none")
        await space.delete()
        await space.aclose()
        again = await opened(given)
        await again.write(0, pages(0, 4, 2))
        await trio.to_thread.run_sync(server.fault, "release")
        assert await again.read(0, 4) == pages(0, 4, 2)
        await again.aclose()

    run(test)
