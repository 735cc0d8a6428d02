# SPDX-License-Identifier: Apache-2.0
"""Everything that others write and tierd reads: parsed, or refused as it should be, in bounded time. TIERD_EXAMPLES: more."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import fuzz
from tierd import load as loading
from tierd.attach import Refused
from tierd.attach.procfs import (
    NAME_BYTES_MAX,
    clean_name,
    name_of,
    option_values,
    parse_maps,
    ram_regions,
    split_options,
)
from tierd.config import Config
from tierd.document import FILE_BYTES_MAX, ConfigErrors
from tierd.load import load
from tierd.systemd import Notifier, listen_fds, watchdog_interval_s

SECONDS_MAX = 20.0  # of CPU: the machine does other things as well

# --- configuration ------------------------------------------------------------------------------------------------------------

WORDS = r"""
guests: defaults: api: store: log: name: cmdline: pid: interval_s: min_idle_s: path: socket: mode: listen: '*' web
[ ] { } - ? & &a *a ! !!int !!python/object:os.system << | > %YAML
# " ' \u0000 \ud800 ~ null on 0x 0b 1:1:1 .inf .nan 1e999 2026-02-30 0777
512MiB 30s --- ...
"""
PIECES = st.sampled_from(WORDS.split()) | st.sampled_from(
    ["\n", "\n  ", "\n    ", " ", ", ", "\t", "\r\n", "\ufeff", "\x85", "\u2028"]
)


def judged(data: bytes, name: str = "tierd.yaml") -> None:
    """A Config or ConfigErrors, each of them one line that can be printed."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "guests.d").mkdir()
        Path(directory, "tierd.yaml").write_bytes(b"")
        Path(directory, name).write_bytes(data)
        began = time.process_time()
        try:
            assert isinstance(load(Path(directory, "tierd.yaml")), Config)
        except ConfigErrors as caught:
            assert caught.errors
            assert all(str(error).isprintable() for error in caught.errors)
            assert len(caught.errors) <= loading.ERRORS_MAX + 1
        assert time.process_time() - began < SECONDS_MAX


@fuzz
@given(st.lists(PIECES, max_size=40).map("".join).map(str.encode), st.sampled_from(["tierd.yaml", "guests.d/a.yaml"]))
@example(b"defaults: {resident_min: 0x" + b"f" * 5000 + b"}", "tierd.yaml")
@example(b"log: {level: 0x" + b"f" * 5000 + b"}", "tierd.yaml")
@example(b"pid: 0x" + b"f" * 5000, "guests.d/a.yaml")
def test_any_text_is_a_configuration_or_config_errors(data: bytes, name: str) -> None:
    judged(data, name)


@fuzz
@given(st.binary(max_size=300), st.binary(max_size=4), st.integers(0, 2000), st.integers(0, 50))
def test_a_damaged_configuration(insert: bytes, flip: bytes, at: int, cut: int) -> None:
    good = (Path(__file__).resolve().parents[2] / "config/tierd.yaml").read_bytes()
    at = at * len(good) // 2000
    judged(good[:at] + insert + flip + good[at + cut :])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + before] * 9)}]\n" for before, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "[" * 100_000,
        "{a: " * 20_000,
        "- " * 60_000,
        "? " * 60_000,
        "a: " + "&a " * 40_000,
        "!" * 100_000,
        "1:" * 60_000 + "1",
        "a: " + "1:" * 60_000 + "1",
        "a: 0x" + "f" * 120_000,
        "a: " + "9" * 120_000,
        "\n".join(f"key{i}: {i}" for i in range(9_000)),
        "defaults:\n" + "\n".join(f"  interval_s{i}: {i}" for i in range(6_000)),
        "guests:\n" + "\n".join(f"- name: '*a*b*c{i}'" for i in range(4_000)),
        "guests:\n" + "\n".join(f"- {{name: 'web-{i % 2 * '*'}{i}'}}" for i in range(4_000)),
        "guests:\n" + "- {}\n" * 20_000,
        "guests: [" + "name, " * 20_000,
        "guests: [{name: x, cmdline: '" + "(" * 50_000 + "'}]",
        "guests: [{name: x, cmdline: '(?:a{1000}){1000}{1000}'}]",
        "a" * (FILE_BYTES_MAX + 1),
        "# nothing\n" * 10_000,
        "'" + "\n" * 100_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_configuration_that_would_take_for_ever(text: str) -> None:
    judged(text.encode())


def test_aliases_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tierd.yaml").write_text(BOMB)
    with pytest.raises(ConfigErrors, match="aliases"):
        load(tmp_path / "tierd.yaml")
    assert yaml.safe_load(BOMB.partition("\nb")[0]), "it is YAML"


# --- a directory of rules -------------------------------------------------------------------------------------------------------


def test_a_directory_of_rules_that_is_full_of_other_things(tmp_path: Path) -> None:
    """Each is told by its name, none is waited for."""
    guests = tmp_path / "guests.d"
    guests.mkdir()
    (tmp_path / "tierd.yaml").write_text("")
    (guests / "binary.yaml").write_bytes(os.urandom(5000))
    (guests / "directory.yaml").mkdir()
    (guests / "dangling.yaml").symlink_to("nowhere")
    (guests / "loop.yaml").symlink_to("loop.yaml")
    (guests / "device.yaml").symlink_to("/dev/zero")
    os.mkfifo(guests / "fifo.yaml")
    with (guests / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)
    (guests / ".hidden.yaml").write_bytes(b"\xff")
    (guests / "README").write_bytes(b"\xff")
    (guests / "good.yaml").write_text("name: web")
    with pytest.raises(ConfigErrors) as caught:
        load(tmp_path / "tierd.yaml")
    told = {error.file.name: error.message for error in caught.value.errors}
    assert sorted(told) == sorted(
        f"{name}.yaml" for name in ("binary", "directory", "dangling", "loop", "device", "fifo", "huge")
    )
    assert "not a regular file" in told["fifo.yaml"]
    assert "KiB" in told["huge.yaml"]


def test_ten_thousand_files_of_rules(tmp_path: Path) -> None:
    guests = tmp_path / "guests.d"
    guests.mkdir()
    (tmp_path / "tierd.yaml").write_text("")
    for i in range(10_000):
        (guests / f"{i}.txt").touch()
    assert load(tmp_path / "tierd.yaml").guests == ()
    for i in range(10_000):
        (guests / f"{i}.txt").rename(guests / f"{i}.yaml")
    with pytest.raises(ConfigErrors, match="more than 4096 files"):
        load(tmp_path / "tierd.yaml")


# --- what a VMM says about itself -------------------------------------------------------------------------------------

# everything but the newline, which the kernel escapes (seq_path), and NUL
NAMES = st.binary(max_size=80).map(
    lambda raw: raw.replace(b"\n", b"\\012").replace(b"\0", b"").decode(errors="surrogateescape")
)
ARGUMENTS = st.lists(
    st.sampled_from(["-name", "--name", "--id", "-object", "-mem-path", "-m", "guest=", "mem-path=", ",", ",,"])
    | NAMES
    | st.text(",=abguest", max_size=20),
    max_size=12,
)


@fuzz
@given(NAMES, st.integers(0, (1 << 47) // 4096 - 1), st.integers(1, 1 << 20), st.integers(1, 1 << 40))
@example("/memfd:\x0c00400000-00500000 rw-s 00000000 00:01 7 /memfd:ram (deleted)", 4096, 256, 9)
@example("/memfd:\u2028x", 4096, 256, 9)
def test_a_mappings_name_cannot_look_like_a_mapping(name: str, page: int, pages: int, inode: int) -> None:
    start, end = page * 4096, (page + pages) * 4096
    line = f"{start:08x}-{end:08x} rw-s 00000000 00:01 {inode} "
    found = parse_maps(f"{line:<73}/{name}\n00400000-00401000 r-xp 00000000 fe:01 5    /bin/vmm\n")
    assert [(m.start, m.end, m.inode, m.path) for m in found] == [
        (start, end, inode, f"/{name}"),
        (0x400000, 0x401000, 5, "/bin/vmm"),
    ]
    assert all(region.inode == inode for region in ram_regions(found, ()))


@fuzz
@given(ARGUMENTS, st.integers(1, 1 << 22))
def test_any_command_line_has_a_name_that_can_be_told(arguments: list[str], pid: int) -> None:
    name = name_of(pid, tuple(arguments))
    assert name.isprintable()
    assert 0 < len(name.encode()) <= NAME_BYTES_MAX
    ram_regions([], tuple(arguments))
    option_values(tuple(arguments), "object")


@pytest.mark.parametrize("path", ["", "/"])
def test_a_memory_path_that_is_everything_is_nothing(path: str) -> None:
    maps = parse_maps("10000000-20000000 rw-s 00000000 00:01 7 /dev/shm/other\n")
    assert ram_regions(maps, ("qemu-system-x86_64", "-mem-path", path)) == ()


@fuzz
@given(NAMES)
def test_options_split_and_join(text: str) -> None:
    assert ",".join(part.replace(",", ",,") for part in split_options(text)) == text or text.replace(",,", "").count(
        ","
    )
    assert clean_name(clean_name(text)) == clean_name(text)


@fuzz
@given(st.text())
def test_what_is_told_of_a_refusal_can_be_printed(evidence: str) -> None:
    assert Refused("check", "cause", evidence, "remedy").evidence.isprintable()


# --- environment ------------------------------------------------------------------------------------------------------

VALUES = st.sampled_from(
    ["", "0", "1", "-1", "2", "65536", "9" * 30, "9" * 5000, "1e3", "٣", "²", " 1", str(os.getpid())]
) | st.text(st.characters(exclude_characters="\0", exclude_categories=[]), max_size=20)


@fuzz
@given(st.dictionaries(st.sampled_from(["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"]), VALUES))
@example({"LISTEN_FDS": "1000000000", "LISTEN_PID": str(os.getpid())})
@example({"LISTEN_FDS": "9" * 19, "LISTEN_PID": str(os.getpid())})
@example({"LISTEN_FDS": "²", "LISTEN_PID": str(os.getpid())})
def test_any_passed_descriptors(environment: dict[str, str]) -> None:
    """All of them are open, or none is taken."""
    for name, fd in listen_fds(environment):
        os.fstat(fd)
        assert isinstance(name, str)
    assert environment == {}


@fuzz
@given(
    st.dictionaries(st.sampled_from(["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"]), VALUES | st.just("/nowhere/x"))
)
@example({"NOTIFY_SOCKET": "/" + "x" * 200})
@example({"NOTIFY_SOCKET": "/\udcff"})
@example({"NOTIFY_SOCKET": "vsock:1:2"})
@example({"WATCHDOG_USEC": "9" * 5000})
@example({"WATCHDOG_USEC": "²"})
def test_any_service_manager(environment: dict[str, str]) -> None:
    """It cannot be reached, which is an OSError and nothing else."""
    interval_s = watchdog_interval_s(environment)
    assert interval_s is None or interval_s > 0
    notifier = Notifier.from_environment(environment)
    try:
        assert notifier.send("STATUS=\udcff") is False
    except OSError as error:
        assert str(error)
