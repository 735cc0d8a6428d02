# SPDX-License-Identifier: Apache-2.0
"""README, alert rules and dashboard speak of metrics, commands and keys that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from tests.daemon.fake import FakeDaemon, FakeGuest, counters
from tests.need import need
from tierd.cli import cli
from tierd.load import load
from tierd.metrics import TierdCollector

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def exported() -> set[str]:
    registry = CollectorRegistry()
    registry.register(TierdCollector(FakeDaemon(FakeGuest("web", 1, "1-1", counters=counters())).status))
    return set(re.findall(r"^(tierd_\w+)", generate_latest(registry).decode(), re.M))


@pytest.mark.parametrize("file", ["README.md", "config/alerts.yaml", "config/grafana-dashboard.json"])
def test_metrics_exist(file: str) -> None:
    text = (ROOT / file).read_text()
    named = set(re.findall(r"\btierd_(?:guest|store|build)_\w+", text))
    assert named
    bases = exported() | {name.removesuffix("_bucket") for name in exported()}
    assert named - bases == set()


def test_every_metric_is_in_the_readme() -> None:
    for name in {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported()}:
        assert name in README


def test_commands_exist() -> None:
    for line in re.findall(r"`tierd ([a-z]+(?: [a-z]+)?)", README):
        first, _, second = line.partition(" ")
        assert first in cli.commands, line
        group = cli.commands[first]
        if second and isinstance(group, click.Group):
            assert second in group.commands, line
    for name in cli.commands:
        assert f"`tierd {name}" in README, f"{name} is not in the README"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^ {4})make ([a-z]+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_policies_of_the_readme_load(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        (tmp_path / "guests.d").mkdir(exist_ok=True)
        (tmp_path / "guests.d" / "one.yaml").write_text(block)
        (tmp_path / "tierd.yaml").write_text("on_stop: keep\n")
        assert load(tmp_path / "tierd.yaml").guests


def test_files_of_the_readme_exist() -> None:
    for name in set(re.findall(r"`((?:config|tests|tierd|systemd)/[\w./-]+\w)`", README)):
        assert (ROOT / name).exists(), name


def test_alert_rules_are_valid() -> None:
    need("promtool", shutil.which("promtool") is not None, "promtool is not installed: run `tests/setup.sh metrics`")
    done = subprocess.run(
        ["promtool", "check", "rules", ROOT / "config" / "alerts.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((ROOT / "config" / "grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(target["expr"] for panel in panels for target in panel["targets"])
