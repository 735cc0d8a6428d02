# SPDX-License-Identifier: Apache-2.0
"""Stores of other packages: found by name, loaded when named, kept to the contract."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tierd.store import PageStore, StoreContext, StoreError
from tierd.store.plugins import make_store
from tierd.testing import PAGE, PAGES, PageStoreContract, check

CONTEXT = StoreContext(Path("/nowhere"))
PLUGIN = Path(__file__).parent / "plugin"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a package with an entry point in the group, as pip would."""
    before = set(sys.modules)

    def install(name: str, value: str, code: str | None = None, package: str = "") -> None:
        package = package or f"tierd-{name}"
        place = tmp_path / package
        info = place / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[tierd.stores]\n{name} = {value}\n")
        if code is not None:
            (place / f"{value.partition(':')[0]}.py").write_text(code)
        monkeypatch.syspath_prepend(place)

    yield install
    for module in set(sys.modules) - before:
        del sys.modules[module]


@pytest.fixture
def plain(install: Install, disk_dir: Path) -> Callable[[], PageStore]:
    install("plain", "tierd_plain:PlainStore", (PLUGIN / "tierd_plain.py").read_text())
    return lambda: make_store("plain", {"path": str(disk_dir)}, CONTEXT)


class TestExample(PageStoreContract):
    @pytest.fixture(autouse=True)
    def _example(self, plain: Callable[[], PageStore]) -> None:
        self.make_store = plain  # type: ignore[method-assign]


def test_the_example_stands_in_the_readme() -> None:
    code = (PLUGIN / "tierd_plain.py").read_text().partition("\n")[2]
    readme = (PLUGIN.parents[2] / "README.md").read_text()
    assert f"\n\n{textwrap.indent(code, '    ')}\n" in readme
    lines = [line for line in code.splitlines() if line and not line.lstrip().startswith(('"', "#"))]
    assert f"`tests/store/plugin/tierd_plain.py` is one in {len(lines)} lines of code:" in readme


def test_the_suite_can_be_run_without_pytest(plain: Callable[[], PageStore]) -> None:
    check(plain)


def test_the_example_forgets_guests_of_an_earlier_boot(plain: Callable[[], PageStore], disk_dir: Path) -> None:
    left = disk_dir / f"an-earlier-boot.1-1.{PAGES}.{PAGE}"
    left.mkdir()
    (left / "7").touch()
    assert trio.run(plain().sweep, lambda key: True) == ["1-1"]
    assert not list(disk_dir.iterdir())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("redis", {"addresses": ["127.0.0.1:1"]}),
        ("objects", {"scheme": "s3", "options": {"bucket": "cold", "region": "x", "disable_ec2_metadata": True}}),
    ],
)
def test_ours_are_found_the_same_way(name: str, options: dict[str, object]) -> None:
    store = make_store(name, {**options, "host_id": "test"}, CONTEXT)
    assert type(store).__module__ == f"tierd.store.{name}"


def test_a_name_that_nobody_has(install: Install) -> None:
    install("other", "x:y")
    with pytest.raises(StoreError, match=r"no store 'tape', only objects, other, redis; .* has to be installed"):
        make_store("tape", {}, CONTEXT)


def test_only_what_is_named_is_imported(install: Install, plain: Callable[[], PageStore]) -> None:
    install("broken", "broken_store:make", "raise RuntimeError('imported')")
    trio.run(plain().probe)
    assert "broken_store" not in sys.modules


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("raise RuntimeError('out of order')", "RuntimeError: out of order"),
        ("x = 1", "AttributeError"),
        ("def make(:", "SyntaxError"),
    ],
)
def test_a_plug_in_that_cannot_be_imported_is_named(install: Install, code: str, why: str) -> None:
    install("tape", "tape_store:make", code)
    with pytest.raises(StoreError, match=rf"store 'tape' of tierd-tape 1.2 \(tape_store:make\) cannot be .*{why}"):
        make_store("tape", {}, CONTEXT)


def test_a_plug_in_that_is_no_function(install: Install) -> None:
    install("tape", "tape_store:make", "make = 1")
    with pytest.raises(StoreError, match="is not a function that makes a store"):
        make_store("tape", {}, CONTEXT)


def test_a_plug_in_whose_keys_are_wrong(install: Install, plain: Callable[[], PageStore]) -> None:
    with pytest.raises(StoreError, match=r"store 'plain'.*cannot be made: KeyError: 'path'"):
        make_store("plain", {}, CONTEXT)
    with pytest.raises(
        StoreError, match=r"^redis: addresses: Field required; adresses: .* no such key; did you mean addresses"
    ):
        make_store("redis", {"adresses": []}, CONTEXT)
    with pytest.raises(StoreError, match=r"^objects: segment_bytes: 'big' is not a size"):
        make_store("objects", {"scheme": "fs", "segment_bytes": "big"}, CONTEXT)


def test_two_of_one_name(install: Install) -> None:
    install("tape", "one:make", package="tierd-one")
    install("tape", "two:make", package="tierd-two")
    with pytest.raises(StoreError, match=r"more than one store 'tape'.*tierd-(one|two) .*uninstall one"):
        make_store("tape", {}, CONTEXT)
