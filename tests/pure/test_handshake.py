# SPDX-License-Identifier: Apache-2.0
"""The message of a VMM that connects: what is said of one that is wrong, and garbage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import fuzz
from tierd.attach.handshake import MESSAGE_BYTES_MAX, Announcement, Malformed, parse
from tierd.native import REGIONS_MAX

PAGE = 4096


def region(address: int = PAGE, **changes: Any) -> dict[str, Any]:
    return {"address": address, "bytes": PAGE, "offset": 0, "memfd": 0} | changes


def message(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "name": "vm", "uffd": 5, "regions": [region()]} | changes


def parsed(descriptors: int = 3, **changes: Any) -> Announcement:
    return parse(json.dumps(message(**changes)).encode(), descriptors)


def test_a_message() -> None:
    said = parsed(4, regions=[region(memfd=1), region(3 * PAGE, bytes=2 * PAGE, offset=PAGE), region(8 * PAGE)])
    assert (said.name, said.uffd) == ("vm", 5)
    assert [(r.address, r.bytes, r.offset, r.memfd) for r in said.regions] == [
        (PAGE, PAGE, 0, 1),
        (3 * PAGE, 2 * PAGE, PAGE, 0),
        (8 * PAGE, PAGE, 0, 0),
    ]
    assert parse(b'{"version": 1, "uffd": 0, "regions": [{"address": 0, "bytes": 4096, "offset": 0, "memfd": 0}]}', 3)


def test_the_message_of_the_readme() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (raw,) = re.findall(r'^    (\{"version": .*)$', text, re.MULTILINE)
    assert parse(raw.encode(), 3).name == "web"


def test_the_largest_fits_into_a_message() -> None:
    regions = [region((1 << 46) + i * (1 << 30), bytes=1 << 30, offset=1 << 40, memfd=i) for i in range(REGIONS_MAX)]
    largest = message(name="\u00e9" * 255, uffd=(1 << 31) - 1, regions=regions)
    assert len(json.dumps(largest)) < MESSAGE_BYTES_MAX
    assert len(parse(json.dumps(largest).encode(), 2 + REGIONS_MAX).regions) == REGIONS_MAX


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 0}, "version: Input should be greater than or equal to 1"),
        ({"version": True}, "version: "),
        ({"fd": 5}, "fd: Extra inputs are not permitted"),
        ({"uffd": -1}, "uffd: "),
        ({"uffd": True}, "uffd: "),
        ({"uffd": 5.0}, "uffd: "),
        ({"name": "x" * 256}, "name: "),
        ({"regions": {}}, "regions: "),
        ({"regions": []}, "regions: "),
        ({"regions": [region(i * PAGE) for i in range(REGIONS_MAX + 1)]}, "regions: "),
        ({"regions": [region(1)]}, "regions.0.address: "),
        ({"regions": [region(1 << 63)]}, "regions.0.address: "),
        ({"regions": [region(bytes=0)]}, "regions.0.bytes: "),
        ({"regions": [region(offset=-PAGE)]}, "regions.0.offset: "),
        ({"regions": [region(memfd=REGIONS_MAX)]}, "regions.0.memfd: "),
        ({"regions": [region(memfd=1)]}, "3 descriptors came; 2 (userfaultfd, pagemap) and one for each memfd"),
        ({"regions": [region(), region()]}, "0x1000 and 0x1000 overlap"),
        ({"regions": [region(), region(0, bytes=2 * PAGE)]}, "0x0 and 0x1000 overlap"),
    ],
)
def test_what_is_wrong_is_told(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Malformed) as caught:
        parsed(**changes)
    assert says in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
KEYS = st.sampled_from(["version", "name", "uffd", "regions", "address", "bytes", "offset", "memfd", "more"])
GARBAGE = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
NESTED = st.sampled_from([b"[" * 10_000, b'{"a":' * 3_000, b'{"uffd": ' + b"9" * 10_000 + b"}"])


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    whole = message(regions=[region(i * PAGE) for i in range(draw(st.integers(1, 3)))])
    where = draw(st.sampled_from([whole, whole["regions"][0]]))
    where[draw(KEYS)] = draw(JSON | st.integers(-1, 1 << 64))
    return json.dumps(whole).encode()


@fuzz
@given(GARBAGE | NESTED | nearly_right(), st.integers(0, 5))
def test_garbage_is_refused_or_right(raw: bytes, descriptors: int) -> None:
    try:
        said = parse(raw, descriptors)
    except Malformed as error:
        assert 0 < len(str(error)) < 4000
        return
    assert said.regions
    assert {region.memfd for region in said.regions} == set(range(descriptors - 2))
    assert all(region.address % PAGE == region.bytes % PAGE == region.offset % PAGE == 0 for region in said.regions)
