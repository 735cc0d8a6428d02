# SPDX-License-Identifier: Apache-2.0
"""What stores that trio asks have in common: how their keys are read, and what they call this host."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from tierd.store import StoreError

# One word that names this host among those that share a place, in a key or a path; the same after a boot.
HostId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]

M = TypeVar("M", bound=BaseModel)


def parse(store: str, model: type[M], given: Mapping[str, object]) -> M:
    """The keys of `store` in the configuration. StoreError names those that are wrong."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        wrong = "; ".join(_told(model, each["loc"], each) for each in error.errors())
        raise StoreError(f"{store}: {wrong}") from None  # the cause shows what was given


def _told(model: type[BaseModel], at: tuple[int | str, ...], error: Any) -> str:
    name = ".".join(map(str, at)) or "options"
    if error["type"] != "extra_forbidden":
        return f"{name}: {error['msg'].removeprefix('Value error, ')}"
    close = difflib.get_close_matches(str(at[-1]), list(model.model_fields), 1)
    return f"{name}: there is no such key" + (f"; did you mean {close[0]}?" if close else "")


def host_id() -> str:
    """This machine's, the same after a boot, another one in a copy of it that runs elsewhere. StoreError."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError as error:
        raise StoreError(
            f"this host has no /etc/machine-id ({error.strerror}); set host_id to a name of its own"
        ) from error
    try:
        hardware = Path("/sys/class/dmi/id/product_uuid").read_text().strip()
    except OSError:  # not every machine has one, and only root may read it
        hardware = ""
    return hashlib.sha256(f"tierd {machine} {hardware}".encode()).hexdigest()[:16]
