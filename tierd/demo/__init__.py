# SPDX-License-Identifier: Apache-2.0
"""A real virtual machine to try tierd on: a small guest that checks its own memory, and the script of `tierd demo`."""

from tierd.demo.guest import GuestError
from tierd.demo.script import DemoError, run_demo

__all__ = ["DemoError", "GuestError", "run_demo"]
