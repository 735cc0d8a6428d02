# SPDX-License-Identifier: Apache-2.0
"""The configuration: what is accepted, and what is said about everything that is not."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tierd.config import (
    AGE_S_MAX,
    SAFE_MIN_IDLE_S,
    Config,
    Frozen,
    Policy,
    Tier,
    changes,
)
from tierd.document import ConfigErrors
from tierd.load import load
from tierd.quantities import parse_rate, parse_size, parse_time

ROOT = Path(__file__).resolve().parents[2]
Load = Callable[..., Config]


@pytest.fixture
def loaded(tmp_path: Path) -> Load:
    """Writes the main file, and files of guests.d by name, and loads them."""

    def write_and_load(text: str, **guests_d: str) -> Config:
        (tmp_path / "guests.d").mkdir(exist_ok=True)
        for name, content in guests_d.items():
            (tmp_path / "guests.d" / f"{name}.yaml").write_text(content)
        (tmp_path / "tierd.yaml").write_text(text)
        return load(tmp_path / "tierd.yaml")

    return write_and_load


def wrong(text: str, loaded: Load, **guests_d: str) -> list[tuple[str, int, str, str]]:
    """(file, line, key, message and suggestion) of each error."""
    with pytest.raises(ConfigErrors) as caught:
        loaded(text, **guests_d)
    return [(e.file.name, e.line, e.key, f"{e.message} ({e.suggestion})") for e in caught.value.errors]


# --- quantities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *((0, 0), (4096, 4096), ("4096", 4096), ("1B", 1), ("512MiB", 512 << 20), ("10GiB", 10 << 30)),
        *(("1 TiB", 1 << 40), ("1.5GiB", 3 << 29), ("10GB", 10**10), ("2kB", 2000), ("512mib", 512 << 20)),
        ("999999999999999999", 999999999999999999),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [*("10%", "512M", "5 apples", "", "MiB", "-5MiB", "1e9", "0x10", "٣MiB", "9" * 400 + "GiB"), 1.5, True, None, []],
)
def test_not_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size; write for example 512MiB") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *((0, 0.0), (1.5, 1.5), ("30s", 30.0), ("2min", 120.0), ("500ms", 0.5), ("700ms", 0.7), ("1h", 3600.0)),
        *(("1d", 86400.0), ("0.5h", 1800.0), ("12", 12.0), ("5m", 300.0)),
    ],
)
def test_times(text: object, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["30 secs", "soon", "", "s", "-1s", float("nan"), False, None, {}, "2min 30s", "30S"])
def test_not_times(text: object) -> None:
    with pytest.raises(ValueError, match="is not a time; write for example 30s"):
        parse_time(text)


@pytest.mark.parametrize(("text", "rate"), [("100MiB/s", 100 << 20), ("1 GB/s", 10**9), ("1MiB", 1 << 20), (5, 5)])
def test_rates(text: object, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["100MiB/min", "5%", "/s", None, 1.5])
def test_not_rates(text: object) -> None:
    with pytest.raises(ValueError, match="is not a rate; write for example 100MiB/s"):
        parse_rate(text)


SIZE_UNITS = {
    **{"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    **{"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
}
TIME_UNITS: dict[str, int | Fraction] = {"": 1, "ms": Fraction(1, 1000), "s": 1, "min": 60, "h": 3600, "d": 86400}


@given(number=st.integers(0, 10**12), unit=st.sampled_from(sorted(SIZE_UNITS)), blank=st.sampled_from(["", " "]))
def test_any_size_is_exact(number: int, unit: str, blank: str) -> None:
    assert parse_size(f"{number}{blank}{unit}") == number * SIZE_UNITS[unit]


@given(thousandths=st.integers(0, 10**12), unit=st.sampled_from(sorted(TIME_UNITS)))
def test_any_time_is_the_nearest_float(thousandths: int, unit: str) -> None:
    text = f"{thousandths // 1000}.{thousandths % 1000:03d}{unit}"
    assert parse_time(text) == float(Fraction(thousandths, 1000) * Fraction(TIME_UNITS[unit]))


@given(st.floats(0, 1e15))
def test_a_number_of_seconds_stays_what_it_is(seconds: float) -> None:
    assert parse_time(seconds) == seconds


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{}", "# nothing\n", "api:\nstore:\ndefaults:\nguests:\nmetrics:\nlog:\n", "guests: []"]
)
def test_nothing_given_is_the_defaults(loaded: Load, text: str) -> None:
    assert loaded(text) == Config()


def test_the_safe_defaults() -> None:
    policy = Policy()
    assert policy.min_idle_s == SAFE_MIN_IDLE_S == 120
    assert not policy.unsafe_min_idle
    assert not policy.allow_nested
    assert policy.cold_s == 300
    assert Config().on_stop == "restore"
    assert Config().on_restart == "keep"
    assert Config().metrics.listen is None
    assert Config().api.mode == 0o660
    assert Config().handshake.socket is None
    assert Config().handshake.mode == 0o600


def test_everything(loaded: Load) -> None:
    config = loaded(
        """
        runtime_dir: /dev/shm/tierd
        api: {socket: /dev/shm/tierd/api.sock, mode: 0600, group: kvm}
        handshake: {socket: /dev/shm/tierd/handshake.sock, mode: 0660, group: kvm}
        metrics: {listen: "[::1]:9464"}
        store: {path: /srv/pages, capacity: 10GiB, direct: off, encrypt: true}
        memory: {path: /dev/shm/pools, capacity: 1GiB, codec: zstd}
        stores: {redis: {addresses: ["here:6379"], capacity: 1GiB, encrypt: false, deadline_s: 2s}, other: }
        log: {level: debug, format: json}
        engine: stock
        discover_interval_s: 500ms
        on_stop: keep
        on_restart: restore
        stop_timeout_s: 2min
        guests_dir: guests.d
        defaults:
          {interval_s: 5s, resident_min: 64MiB, evict_rate_max: 100MiB/s, demote_rate_max: 1MiB/s, stored_max: 2GiB,
           tiers: [{name: memory, capacity: 512MiB}, {name: file, min_age_s: 1h}]}
        guests:
          - {name: "web-*", resident_max: 1GiB, dry_run: true}
          - {pid: 17, cmdline: "type=q35", allow_nested: true, min_idle_s: 3, unsafe_min_idle: true, readahead_pages: 1}
        """
    )
    assert config.model_dump(exclude={"defaults", "guests"}) == {
        "stores": (
            {
                "name": "redis",
                "capacity": 1 << 30,
                "encrypt": False,
                "second": None,
                "concurrency": 8,
                "deadline_s": 2.0,
                "addresses": ["here:6379"],
            },
            {"name": "other", "capacity": None, "encrypt": True, "second": None, "concurrency": 8, "deadline_s": 10.0},
        ),
        "runtime_dir": Path("/dev/shm/tierd"),
        "api": {"socket": Path("/dev/shm/tierd/api.sock"), "mode": 0o600, "group": "kvm"},
        "handshake": {"socket": Path("/dev/shm/tierd/handshake.sock"), "mode": 0o660, "group": "kvm"},
        "metrics": {"listen": "[::1]:9464"},
        "store": {"path": Path("/srv/pages"), "capacity": 10 << 30, "direct": "off", "encrypt": True},
        "memory": {"path": Path("/dev/shm/pools"), "capacity": 1 << 30, "codec": "zstd"},
        "log": {"level": "debug", "format": "json"},
        "engine": "stock",
        "discover_interval_s": 0.5,
        "on_stop": "keep",
        "on_restart": "restore",
        "stop_timeout_s": 120.0,
        "guests_dir": Path("guests.d"),
    }
    base = {"interval_s": 5.0, "resident_min": 64 << 20, "evict_rate_max": 100 << 20, "demote_rate_max": 1 << 20}
    base |= {
        "stored_max": 2 << 30,
        "tiers": (Tier(name="memory", capacity=512 << 20), Tier(name="file", min_age_s=3600.0)),
    }
    assert config.defaults == Policy.model_validate(base)
    web, q35 = config.guests
    assert web.policy == Policy.model_validate({**base, "resident_max": 1 << 30, "dry_run": True})
    own = {"allow_nested": True, "min_idle_s": 3, "unsafe_min_idle": True, "readahead_pages": 1}
    assert q35.policy == Policy.model_validate({**base, **own})


@pytest.mark.parametrize(
    ("word", "direct"), [("on", "on"), ("off", "off"), ("yes", "on"), ("'off'", "off"), ("auto", "auto")]
)
def test_yaml_booleans_for_direct(loaded: Load, word: str, direct: str) -> None:
    assert loaded(f"store: {{direct: {word}}}").store.direct == direct


@pytest.mark.parametrize("word", ["0640", "'0640'", "0o640", "'0o640'"])
def test_a_mode_is_octal(loaded: Load, word: str) -> None:
    assert loaded(f"api: {{mode: {word}}}").api.mode == 0o640


@pytest.mark.parametrize("listen", ["127.0.0.1:9464", "localhost:1", ":65535", "[::]:9464", "0.0.0.0:80"])
def test_addresses(loaded: Load, listen: str) -> None:
    assert loaded(f"metrics: {{listen: '{listen}'}}").metrics.listen == listen


@pytest.mark.parametrize(
    ("tiers", "names"), [("memory", ["memory"]), ("[memory, file]", ["memory", "file"]), ("[{name: file}]", ["file"])]
)
def test_tiers(loaded: Load, tiers: str, names: list[str]) -> None:
    assert [tier.name for tier in loaded(f"defaults: {{tiers: {tiers}}}").defaults.tiers] == names
    assert [tier.name for tier in Config().defaults.tiers] == ["file"]


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ("[]", "not a list of tiers"),
        ("{memory: 1}", "not a list of tiers"),
        ("[memroy]", "names a store 'memroy', and there is none; there are file, memory .did you mean memory"),
        ("[Memory]", "tier 1, name: 'Memory': "),
        ("[memory, {name: file, capacity: lots}]", "tier 2, capacity: 'lots': .*not a size"),
        ("[{name: memory, size: 1GiB}]", "tier 1, size: .*known keys are name, capacity, min_age_s"),
        ("[memory, 7]", "tier 2: 7: "),
        ("[file, memory, file]", "a tier stands twice"),
        ("[{name: memory, min_age_s: 2h}, {name: file, min_age_s: 1h}]", "must grow from each to the next"),
        ("[memory, {name: file, min_age_s: 30d}]", "must grow from each to the next, up to 432000 s"),
    ],
)
def test_tiers_that_cannot_be(loaded: Load, tiers: str, words: str) -> None:
    with pytest.raises(ConfigErrors, match=words):
        loaded(f"defaults: {{tiers: {tiers}}}")


def test_frozen(loaded: Load) -> None:
    config = loaded("guests: [{name: a}]")
    with pytest.raises(ValueError, match="frozen"):
        config.guests[0].policy.min_idle_s = 1.0
    assert hash(config) == hash(loaded("guests: [{name: a}]"))


# --- guests -----------------------------------------------------------------------------------------------------------


def intervals(config: Config, *guests: tuple[str, int, str]) -> list[float | None]:
    policies = [config.match(*guest) for guest in guests]
    return [policy.interval_s if policy is not None else None for policy in policies]


def test_the_first_rule_that_matches(loaded: Load) -> None:
    config = loaded(
        """
        guests:
          - {name: web-1, interval_s: 1}
          - {name: "web-*", interval_s: 2}
          - {pid: 70, interval_s: 3}
          - {cmdline: "-m +8G", interval_s: 4}
          - {name: "[ab]?", pid: 71, cmdline: q35, interval_s: 5}
        """
    )
    by_name = intervals(
        config, ("web-1", 1, ""), ("web-2", 1, ""), ("web-1", 70, ""), ("Web-2", 1, ""), ("a/b\n", 1, "")
    )
    assert by_name == [1, 2, 1, None, None]
    assert intervals(config, ("x", 70, "-m 8G"), ("x", 1, "qemu -m  8G"), ("x", 1, "-m 9G")) == [3, 4, None]
    assert intervals(config, ("a1", 71, "type=q35,x"), ("a1", 71, "pc"), ("a1", 72, "q35"), ("c1", 71, "q35")) == [
        *(5, None, None, None)
    ]


def test_guests_d_overrides_the_main_file_in_order_of_the_names(loaded: Load) -> None:
    config = loaded(
        "guests: [{name: '*', interval_s: 1}]\ndefaults: {idle_intervals: 7}",
        b="name: db\ninterval_s: 2",
        a="guests:\n  - {name: 'd*', pid: 5, interval_s: 3}\n  - {name: web, interval_s: 4}",
        c="# nothing",
    )
    assert [rule.whom for rule in config.guests] == ["name: d*, pid: 5", "name: web", "name: db", "name: *"]
    assert {rule.policy.idle_intervals for rule in config.guests} == {7}
    assert intervals(config, ("db", 5, ""), ("db", 6, ""), ("web", 5, ""), ("x", 5, "")) == [3, 2, 4, 1]


def test_other_files_of_guests_d(loaded: Load, tmp_path: Path) -> None:
    (tmp_path / "guests.d").mkdir()
    for name in ("x.yaml.sample", "x.yaml~", ".x.yaml", "README"):
        (tmp_path / "guests.d" / name).write_text("{")
    assert loaded("").guests == ()
    (tmp_path / "guests.d" / "x.yml").write_text("name: x")
    assert wrong("", loaded) == [("x.yml", 0, "", "is not read (rename it to end with .yaml)")]


def test_guests_dir(tmp_path: Path) -> None:
    main = tmp_path / "tierd.yaml"
    main.write_text("")
    assert load(main).guests == ()
    main.write_text("on_stop: keep\nguests_dir: missing")
    with pytest.raises(ConfigErrors, match=r"tierd.yaml:2: guests_dir: .*missing cannot be read: No such file"):
        load(main)
    main.write_text("guests_dir: tierd.yaml")
    with pytest.raises(ConfigErrors, match=r"guests_dir: .* Not a directory"):
        load(main)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.yaml").write_text("name: a")
    main.write_text(f"guests_dir: {tmp_path}/elsewhere")
    assert [rule.name for rule in load(main).guests] == ["a"]


# --- what is not accepted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        # unknown
        ("defalts: {}", "defalts", "is not a known key (did you mean defaults?)"),
        ("store: {pth: /x}", "store.pth", "did you mean path?"),
        ("store: {zzz: 1}", "store.zzz", "known keys: capacity, direct, encrypt, path"),
        ("interval_s: 5", "interval_s", "it belongs under defaults: or into a guest rule"),
        ("listen: ':1'", "listen", "it belongs under metrics:"),
        ("guests: [{name: a, resident_mx: 5}]", "guests[0].resident_mx", "did you mean resident_max?"),
        ("guests: [{name: a, policy: {}}]", "guests[0].policy", "its keys stand directly in the rule"),
        ("? [a, b]\n: c", "(a list or mapping)", "is not a known key"),
        ("<<: {on_stop: keep}", "<<", "is not a known key"),
        # types
        ("api: 5", "api", "must be a mapping"),
        ("guests: {name: a}", "guests", "must be a list of rules"),
        ("guests: [web]", "guests[0]", "must be a mapping with name, pid or cmdline"),
        ("on_stop:", "on_stop", "remove the key, or give it a value"),
        ("defaults: {enabled: 'true'}", "defaults.enabled", "is 'true'; it must be a valid boolean (write true"),
        ("defaults: {enabled: 1}", "defaults.enabled", "is 1; it must be a valid boolean"),
        ("defaults: {idle_intervals: 2.5}", "defaults.idle_intervals", "is 2.5; it must be a valid integer"),
        ("defaults: {idle_intervals: true}", "defaults.idle_intervals", "it must be a valid integer"),
        ("guests: [{name: 7}]", "guests[0].name", "put it in quotes"),
        ("guests: [{name: 2020-01-01}]", "guests[0].name", "put it in quotes"),
        ("guests: [{name: 2020-13-01}]", "guests[0].name", "looks like a number or a date, but is none"),
        ("guests: [{name: a, pid: b}]", "guests[0].pid", "valid integer"),
        # values
        ("on_stop: off", "on_stop", "it must be 'restore' or 'keep' (YAML reads a bare on, off, yes or no as"),
        ("on_stop: restor", "on_stop", "did you mean restore?"),
        ("engine: rfk", "engine", "it must be 'auto', 'rwp', 'rfc' or 'stock'"),
        ("log: {level: warn}", "log.level", "did you mean warning?"),
        ("store: {direct: maybe}", "store.direct", "it must be 'auto', 'on' or 'off'"),
        ("store: {capacity: 10%}", "store.capacity", "'10%' is not a size"),
        ("store: {capacity: -1}", "store.capacity", "greater than or equal to 0"),
        ("store: {capacity: 2000000TiB}", "store.capacity", "less than or equal to"),
        ("store: {path: ''}", "store.path", "'' is not a path"),
        ('store: {path: "/a\\0b"}', "store.path", "is not a path"),
        ('store: {path: "/a\\ud800"}', "", "names half a character"),
        ("api: {socket: /" + "x" * 107 + "}", "api.socket", "at most 107 bytes"),
        ("api: {mode: 660}", "api.mode", "660 is not a file mode; write four octal digits, 0660"),
        ("api: {mode: 432}", "api.mode", "is not a file mode"),
        ("api: {mode: '0888'}", "api.mode", "is not a file mode"),
        ("metrics: {listen: 9464}", "metrics.listen", "write 127.0.0.1:9464 for example"),
        ("metrics: {listen: 'example.org:80'}", "metrics.listen", "is not a numeric address"),
        ("metrics: {listen: '::1:9464'}", "metrics.listen", "is not a numeric address"),
        ("metrics: {listen: '[127.0.0.1]:9464'}", "metrics.listen", "is not a numeric address"),
        ("metrics: {listen: '127.0.0.1:99999'}", "metrics.listen", "is not a numeric address"),
        ("metrics: {listen: '127.0.0.1:0'}", "metrics.listen", "is not a numeric address"),
        ("stop_timeout_s: never", "stop_timeout_s", "'never' is not a time"),
        ("stop_timeout_s: .inf", "stop_timeout_s", "is inf; it must be less than"),
        ("stop_timeout_s: 1" + "0" * 400, "stop_timeout_s", "must be less than"),
        ("stop_timeout_s: 1" + "0" * 5000, "stop_timeout_s", "looks like a number"),
        ("discover_interval_s: 0", "discover_interval_s", "is 0; it must be greater than or equal to 0.1"),
        ("defaults: {interval_s: 0}", "defaults.interval_s", "greater than or equal to 0.1"),
        ("defaults: {readahead_pages: 513}", "defaults.readahead_pages", "less than or equal to 512"),
        ("defaults: {evict_rate_max: 0}", "defaults.evict_rate_max", "greater than 0"),
        ("guests: [{cmdline: '['}]", "guests[0].cmdline", "is not a regular expression"),
        ("guests: [{cmdline: 'a{99999999999999999999}'}]", "guests[0].cmdline", "is not a regular expression"),
        ("guests: [{pid: 0}]", "guests[0].pid", "greater than 0"),
        ("guests: [{name: ''}]", "guests[0].name", "at least 1 character"),
        # combinations
        ("guests: [{}]", "guests[0]", "needs name, pid or cmdline"),
        ("guests: [{interval_s: 3}]", "guests[0]", "needs name, pid or cmdline"),
        ("defaults: {resident_min: 2GiB, resident_max: 1GiB}", "defaults.resident_min", "is above resident_max"),
        ("defaults: {min_idle_s: 119.9s}", "defaults.min_idle_s", "direct I/O"),
        ("defaults: {min_idle_s: 0}", "defaults.min_idle_s", "say `unsafe_min_idle: true` beside it"),
        ("defaults: {min_idle_s: 6d}", "defaults.min_idle_s", "nothing would ever be evicted"),
        ("defaults: {interval_s: 1h, idle_intervals: 121}", "defaults.idle_intervals", "cold after 435600 s"),
        # YAML
        ("on_stop: keep\non_stop: restore", "on_stop", "stands on line 1 already (remove one of them)"),
        ("defaults: {dry_run: true, dry_run: true}", "defaults.dry_run", "stands on line 1 already"),
        ("api: [", "", "is not YAML"),
        ("a: b: c", "", "is not YAML"),
        ("- a", "", "must be a mapping of keys to values (a list of guest rules stands under `guests:`)"),
        ("--- {}\n--- {}", "", "is not YAML"),
        ("\x00", "", "is not YAML: there is a character '\\x00'"),
        ("api: &a {}\nlog: *a", "", "aliases (*name) are not supported"),
        ("store: !!python/object:os.system {}", "", "tags (!name) are not supported"),
        ("on_stop: !!int ''", "", "tags (!name) are not supported"),
        ("[" * 5000, "", "is nested too deeply"),
        ("stop_timeout_s: 0b_", "stop_timeout_s", "looks like a number"),
        ("defaults: {interval_s: 86400}", "defaults.interval_s", "nothing would ever be evicted"),  # once hung
    ],
)
def test_one_thing_wrong(loaded: Load, text: str, key: str, says: str) -> None:
    errors = wrong(text, loaded)
    assert says in " | ".join(error[3] for error in errors)
    assert {error[2] for error in errors} == {key}
    assert all("\n" not in part for error in errors for part in error if isinstance(part, str))


def test_all_that_is_wrong_at_once_with_file_and_line(loaded: Load) -> None:
    errors = wrong(
        """on_stop: kep
defaults:
  # both of them, and the combination
  interval_s: soon
  idle_intervals: 0

  resident_min: 2GiB
  resident_max: 1GiB
  min_idle_s: 3
guests:
- name: web
- name: db
  intervall_s: 3
- nam: x
stor:
  path: /x
""",
        loaded,
        a="name: a\n\nenabled: 5\npid: -1\n",
        b="guests:\n- name: b\n  resident_max: 5%\nnme: x\n",
        c="x: [",
    )
    assert [error[:3] for error in errors] == [
        ("tierd.yaml", 1, "on_stop"),
        ("tierd.yaml", 4, "defaults.interval_s"),
        ("tierd.yaml", 5, "defaults.idle_intervals"),
        ("tierd.yaml", 7, "defaults.resident_min"),
        ("tierd.yaml", 9, "defaults.min_idle_s"),
        ("tierd.yaml", 13, "guests[1].intervall_s"),
        ("tierd.yaml", 14, "guests[2].nam"),
        ("tierd.yaml", 15, "stor"),
        ("a.yaml", 3, "enabled"),
        ("a.yaml", 4, "pid"),
        ("b.yaml", 3, "guests[0].resident_max"),
        ("b.yaml", 4, "nme"),
        ("c.yaml", 1, ""),
    ]


def test_an_error_is_one_line_that_an_editor_can_jump_to(loaded: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        loaded("api: {}\non_stop: restor")
    said = "on_stop: is 'restor'; it must be 'restore' or 'keep' (did you mean restore?)"
    assert str(caught.value) == str(caught.value.errors[0]) == f"{tmp_path}/tierd.yaml:2: {said}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"on_stop: \xe4")
    for name, says in (
        ("missing", "No such file"),
        (".", "Is a directory"),
        ("latin", "not UTF-8"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(ConfigErrors, match=says):
            load(tmp_path / name)


def test_min_idle_below_the_floor_needs_the_word_beside_it(loaded: Load) -> None:
    unsafe = "unsafe_min_idle: true"
    config = loaded(f"defaults: {{min_idle_s: 3, {unsafe}}}\nguests: [{{name: a}}, {{name: b, min_idle_s: 150}}]")
    assert [rule.policy.min_idle_s for rule in config.guests] == [3, 150]
    for text in (
        f"defaults: {{{unsafe}}}\nguests: [{{name: a, min_idle_s: 3}}]",  # not beside it
        f"defaults: {{min_idle_s: 3, {unsafe}}}\nguests: [{{name: a, unsafe_min_idle: false}}]",  # inherits 3
        f"defaults: {{min_idle_s: 3}}\nguests: [{{name: a, {unsafe}}}]",
    ):
        assert "direct I/O" in wrong(text, loaded)[0][3]


def test_a_combination_with_the_defaults_is_the_rules_error(loaded: Load) -> None:
    text = "defaults: {resident_min: 2GiB}\nguests:\n- name: a\n  resident_max: 1GiB"
    assert [error[:3] for error in wrong(text, loaded)] == [("tierd.yaml", 4, "guests[0].resident_max")]


@pytest.mark.parametrize(
    ("first", "second", "hidden"),
    [
        ("name: a", "name: a", True),
        ("name: 'w*'", "name: web", True),
        ("name: '*'", "name: 'web-*'", True),
        ("name: '*'", "pid: 5", True),
        ("name: '*'", "cmdline: x", True),
        ("name: 'w*', pid: 5", "name: 'w*', pid: 5", True),
        ("name: web", "name: 'w*'", False),
        ("name: 'w?b'", "name: 'w*b'", False),
        ("name: '*', pid: 5", "name: web", False),
        ("pid: 5", "pid: 6", False),
        ("cmdline: '.*'", "name: web", False),
        ("name: 'w*'", "pid: 5", False),
    ],
)
def test_rules_that_would_never_be_used(loaded: Load, first: str, second: str, hidden: bool) -> None:
    text = f"guests:\n- {{{first}}}\n- {{{second}, enabled: false}}"
    if not hidden:
        assert len(loaded(text).guests) == 2
        return
    assert [error[1:3] for error in wrong(text, loaded)] == [(3, "guests[1]")]


def test_a_rule_hidden_by_another_file_names_it(loaded: Load, tmp_path: Path) -> None:
    ((file, line, key, says),) = wrong("guests:\n- name: web", loaded, a="# all\nname: '*'")
    assert (file, line, key) == ("tierd.yaml", 2, "guests[0]")
    assert f"({tmp_path}/guests.d/a.yaml:1)" in says


# --- garbage ----------------------------------------------------------------------------------------------------------


def keys_of(model: type[Frozen]) -> list[str]:
    return [key for name, field in model.model_fields.items() for key in (name, *_fields_of(field.annotation))]


def _fields_of(annotation: object) -> list[str]:
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, Frozen) else []


SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates()),
    st.sampled_from(["512MiB", "10%", "2min", "on", "off", "keep", "web-*", "[", "auto", "0660", "*", "~"]),
    st.just(10**4000),
)
KEYS = st.one_of(st.sampled_from([*keys_of(Config), "name", "pid", "cmdline"]), st.text(max_size=8))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=30
)


def load_bytes(data: bytes) -> Config | None:
    """None: it was refused, properly."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "tierd.yaml")
        file.write_bytes(data)
        try:
            return load(file)
        except ConfigErrors as caught:
            errors = caught.errors
        assert errors
        assert [text for text in map(str, errors) if not text.isprintable()] == []
        return None


@given(st.dictionaries(KEYS, VALUES, max_size=8))
@example({"guests_dir": "\x1f"})
def test_any_structure_is_a_configuration_or_config_errors(value: dict[str, object]) -> None:
    try:
        text = yaml.safe_dump(value, default_flow_style=True)
    except ValueError:  # Python does not print numbers of that length
        text = "defaults: {resident_min: 1" + "0" * 5000 + "}"
    load_bytes(text.encode("utf-8", "surrogatepass"))


@given(
    st.binary(max_size=200)
    | st.text(st.sampled_from(":-[]{}!&*?|>'\"#%@,\n\t \\ab01x.~<=0_"), max_size=60).map(str.encode)
)
@example(b"guests: [{name: !!timestamp x}]")
@example(b"? !!bool x\n: y")
@example(b'"\\ud800": 1')
@example(b'"a\\nb": 1')
def test_any_bytes_are_a_configuration_or_config_errors(data: bytes) -> None:
    load_bytes(data)


POLICY_RAW = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "dry_run": st.booleans(),
        "interval_s": st.floats(-1, 1e6),
        "idle_intervals": st.integers(-1, 10**6),
        "min_idle_s": st.floats(-1, 1e6),
        "unsafe_min_idle": st.booleans(),
        "resident_min": st.integers(-1, 1 << 61),
        "resident_max": st.none() | st.integers(-1, 1 << 61),
        "evict_rate_max": st.none() | st.integers(-1, 1 << 61),
        "readahead_pages": st.integers(0, 600),
    },
)


@given(defaults=POLICY_RAW, own=POLICY_RAW)
@example(defaults={"unsafe_min_idle": True}, own={"min_idle_s": 120.0})
def test_whatever_is_accepted_is_safe(defaults: dict[str, object], own: dict[str, object]) -> None:
    config = load_bytes(yaml.safe_dump({"defaults": defaults, "guests": [{"name": "a", **own}]}).encode())
    if config is None:
        return
    for policy in (config.defaults, config.guests[0].policy):
        assert policy.min_idle_s >= SAFE_MIN_IDLE_S or policy.unsafe_min_idle
        assert policy.min_idle_s <= policy.cold_s <= AGE_S_MAX
        assert policy.interval_s >= 0.1
        assert policy.resident_max is None or policy.resident_min <= policy.resident_max
    if "min_idle_s" in own:
        own = {"unsafe_min_idle": False, **own}  # is not inherited by somebody else's min_idle_s
    assert config.match("a", 1, "") == Policy.model_validate({**defaults, **own})


# --- reload -----------------------------------------------------------------------------------------------------------


def test_nothing_changed(loaded: Load) -> None:
    text = "on_stop: keep\nguests: [{name: a}, {pid: 3}]"
    assert changes(loaded(text), loaded(text)) == []


def test_what_changed(loaded: Load) -> None:
    old = loaded("guests: [{name: a, resident_min: 5}, {name: b}, {name: c}]")
    new = loaded(
        """
        runtime_dir: /x
        api: {socket: /y}
        store: {path: /z, capacity: 5}
        on_stop: keep
        stop_timeout_s: 30s
        defaults: {interval_s: 20, readahead_pages: 17}
        guests: [{name: c}, {name: a, resident_min: 6, resident_max: 7}, {name: d, pid: 3}]
        """
    )
    assert changes(old, new) == [
        "runtime_dir: /run/tierd -> /x (takes effect after a restart)",
        "api.socket: /run/tierd/tierd.sock -> /y (takes effect after a restart)",
        "store.path: /var/lib/tierd -> /z (takes effect after a restart)",
        "store.capacity: none -> 5 (takes effect after a restart)",
        "on_stop: restore -> keep",
        "stop_timeout_s: 300 -> 30",
        "defaults.interval_s: 10 -> 20",
        "defaults.readahead_pages: 16 -> 17",
        "guests: rule for name: b removed",
        "guests: rule for name: d, pid: 3 added",
        "guests: rule for name: c: interval_s: 10 -> 20",
        "guests: rule for name: c: readahead_pages: 16 -> 17",
        "guests: rule for name: a: interval_s: 10 -> 20",
        "guests: rule for name: a: resident_min: 5 -> 6",
        "guests: rule for name: a: resident_max: none -> 7",
        "guests: rule for name: a: readahead_pages: 16 -> 17",
        "guests: the rules stand in another order",
    ]


# --- the files that we ship -------------------------------------------------------------------------------------------


def test_the_shipped_configuration_is_the_defaults() -> None:
    config = load(ROOT / "config" / "tierd.yaml")
    assert config.model_copy(update={"guests": ()}) == Config()
    assert config.guests, "guests.d/example.yaml was not read"


def test_every_key_is_in_the_shipped_configuration() -> None:
    raw = yaml.safe_load((ROOT / "config" / "tierd.yaml").read_text())
    assert set(raw) == set(Config.model_fields)
    for key, field in Config.model_fields.items():
        if isinstance(field.default, Frozen):
            assert set(raw[key]) == set(type(field.default).model_fields), key


def test_the_example_takes_no_guest_of_anybody_and_weakens_nothing() -> None:
    config = load(ROOT / "config" / "tierd.yaml")
    for rule in config.guests:
        assert rule.name is not None
        assert rule.name.startswith("example-")
        assert rule.policy.min_idle_s >= SAFE_MIN_IDLE_S
    policy = config.match("example-web-1", 1, "")
    assert policy is not None
    assert policy.resident_min == 512 << 20
    assert config.match("web", 1, "") is None


@pytest.mark.parametrize(
    ("key", "section", "choices"),
    [
        ("level", "log", ["debug", "info", "warning", "error"]),
        ("format", "log", ["console", "json", "auto"]),
        ("engine", None, ["auto", "stock"]),
        ("direct", "store", ["auto", "on", "off"]),
        ("on_stop", None, ["restore", "keep"]),
        ("on_restart", None, ["keep", "restore"]),
    ],
)
def test_the_comments_of_the_shipped_configuration_name_real_choices(
    key: str, section: str | None, choices: list[str]
) -> None:
    text = (ROOT / "config" / "tierd.yaml").read_text()
    (comment,) = re.findall(rf"^ *{key}: \w+ +# (.*)$", text, flags=re.MULTILINE)
    for choice in choices:
        assert re.search(rf"\b{choice}\b", comment), f"{key}: {choice} is not explained"
        line = f"{key}: '{choice}'"
        assert load_bytes((f"{section}: {{{line}}}" if section else line).encode()) is not None
