"""The demo keeps its claims, and leaves nothing behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster.processes import marked_processes
from e2e.cluster.removal import host_link
from e2e.cluster.state import cache_directory, state_directories
from e2e.demo.session import RESULT, down

NAME = "demo-test"
DEADLINE_S = 900

pytestmark = [pytest.mark.timeout(2 * DEADLINE_S)]


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Takes the demo down afterwards, and fails the test if anything of it stays."""
    before = _machine()
    yield
    down(NAME)
    assert _machine() - before == set()
    assert not (cache_directory() / f"session-{NAME}").exists()
    assert not (cache_directory() / "clusters" / NAME).exists()


def _machine() -> set[str]:
    """Network links, routes and mounts of this machine, but for those of other clusters that are up now."""
    found = set(Path("/proc/mounts").read_text().splitlines())
    for show in (["ip", "-brief", "link"], ["ip", "route"]):
        found |= set(subprocess.run(show, capture_output=True, text=True, check=True).stdout.splitlines())
    theirs = [host_link(directory) for directory in state_directories()]
    return {line for line in found if not any(link in line for link in theirs)}


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "e2e.demo", *arguments, "--name", NAME]
    environment = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)


def _claims_hold(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("demo ok: services=1 variants="), done.stdout
    result = json.loads(RESULT.read_text())
    assert result["ok"]
    assert result["failed_requests"] == 0
    assert result["streamed_tokens"] == 96
    assert result["first_plan"] == {"cpu-slow": 2}
    assert result["second_plan"].get("cpu-slow", 0) <= 1
    assert result["background_requests"] > 0


@pytest.mark.node
@pytest.mark.long(130)
@pytest.mark.usefixtures("nothing_left")
def test_the_demo_keeps_every_claim() -> None:
    _claims_hold(_demo("up"))


@pytest.mark.full
@pytest.mark.usefixtures("nothing_left")
def test_the_demo_runs_again_while_it_is_up() -> None:
    _claims_hold(_demo("up"))
    _claims_hold(_demo("up"))


@pytest.mark.full
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("after_s", [2, 15, 40])
def test_an_interrupt_in_the_middle_ends_everything(after_s: float) -> None:
    command = [sys.executable, "-m", "e2e.demo", "up", "--name", NAME]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    time.sleep(after_s)
    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=120) == 130
    for directory in (cache_directory() / f"session-{NAME}", cache_directory() / "clusters" / NAME):
        assert marked_processes(directory) == []
        assert not directory.exists()
