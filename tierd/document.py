# SPDX-License-Identifier: Apache-2.0
"""YAML files of a configuration, with the line of every key; and what is wrong in them, for the person who wrote them."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tierd.quantities import shown

FILE_BYTES_MAX = 128 << 10  # YAML is slow to read: seconds at the most, whatever is in it

# --- errors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigError:
    """One thing that is wrong, for the person who wrote it."""

    file: Path
    line: int  # from 1; 0: no line
    key: str  # dotted
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else str(self.file)
        key = f" {self.key}:" if self.key else ""
        text = f"{place}:{key} {self.message}" + (f" ({self.suggestion})" if self.suggestion else "")
        return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


class ConfigErrors(Exception):
    """All that is wrong with a configuration; nothing of it is in force."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = tuple(errors)


# --- reading ----------------------------------------------------------------------------------------------------------

KeyPath = tuple[str | int, ...]


@dataclass
class Document:
    """A parsed file and the line of every key in it."""

    file: Path
    value: Any
    lines: dict[KeyPath, int]
    errors: list[ConfigError]  # of the whole configuration

    def wrong(self, path: KeyPath, message: str, suggestion: str = "") -> None:
        at = path
        while at and at not in self.lines:
            at = at[:-1]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        key = key if key.isprintable() else shown(key)
        self.errors.append(ConfigError(self.file, self.lines.get(at, 0), key, message, suggestion))


class _Loader(yaml.SafeLoader):
    """YAML without the parts that nobody needs in a configuration, and that hide lines or blow up."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: yaml.Mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not supported", mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "tags (!name) are not supported", mark)
        if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
            raise yaml.composer.ComposerError(None, None, "a \\u escape names half a character", mark)
        return super().compose_node(parent, index)


def _plain(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    """The Python value of a node; notes lines, and finds keys given twice."""
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(a list or mapping)"
            before = document.lines.get((*path, key))
            document.lines[(*path, key)] = key_node.start_mark.line + 1
            if before is not None:
                document.wrong((*path, key), f"stands on line {before} already", "remove one of them")
            found[key] = _plain(value_node, (*path, key), document)
        return found
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            document.lines[(*path, i)] = item.start_mark.line + 1
        return [_plain(item, (*path, i), document) for i, item in enumerate(node.value)]
    if node.tag == "tag:yaml.org,2002:int" and re.fullmatch(r"0[0-7]+", node.value):
        return node.value  # only a file mode is octal; _parse_mode wants to see the 0
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, IndexError, OverflowError):
        document.wrong(path, f"{shown(node.value)} looks like a number or a date, but is none", "put it in quotes")
        return node.value


def _text_of(file: Path) -> str:
    """Never waits for the other end of a FIFO, and reads no more than anybody writes."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as opened:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        data = opened.read(FILE_BYTES_MAX + 1)
    if len(data) > FILE_BYTES_MAX:
        raise OSError(errno.EFBIG, f"it has more than {FILE_BYTES_MAX >> 10} KiB")
    return data.decode()


def read(file: Path, errors: list[ConfigError]) -> Document | None:
    """None: there is nothing to judge in it, `errors` says why."""
    try:
        text = _text_of(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        errors.append(ConfigError(file, 0, "", f"cannot be read: {reason}", "check its path and mode"))
        return None
    document = Document(file, {}, {}, errors)
    try:
        node = _Loader(text).get_single_node()
        value = _plain(node, (), document) if node is not None else None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        errors.append(ConfigError(file, line, "", f"is not YAML: there is a character {shown(chr(error.character))}"))
        return None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        errors.append(ConfigError(file, line, "", f"is not YAML: {error.problem}", "check the indentation"))
        return None
    except RecursionError:
        errors.append(ConfigError(file, 0, "", "is nested too deeply"))
        return None
    document.value = {} if value is None else value
    if not isinstance(document.value, dict):
        document.wrong((), "must be a mapping of keys to values", "a list of guest rules stands under `guests:`")
        return None
    return document
