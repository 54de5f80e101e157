"""Tests that share a cluster run in one worker of xdist, or each worker would start one, in silence; and it ends with
the last of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import pytest

@pytest.fixture(scope="session")
def control_plane(): ...

@pytest.mark.parametrize("number", range(6))
def test_shares_a_cluster(control_plane, number): ...

@pytest.mark.xdist_group("named")
@pytest.mark.parametrize("number", range(6))
def test_is_of_a_group(number): ...
"""


def test_a_group_runs_in_one_worker(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
    done = subprocess.run(
        [*command, "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "e2e.cluster.pytest_plugin", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    ran = set(re.findall(r"\[(gw\d)\].*(test_shares_a_cluster|test_is_of_a_group)", done.stdout))
    assert len(ran) == 2, done.stdout + done.stderr
    assert {name for _, name in ran} == {"test_shares_a_cluster", "test_is_of_a_group"}


SHARING = """
import pytest

@pytest.fixture(scope="session")
def control_plane():
    yield
    print("down")

@pytest.fixture(scope="session")
def account(control_plane):
    yield
    print("signed out")

def test_uses(control_plane): print("used")
def test_does_not(): print("idle")
def test_uses_what_it_has(account): print("used")
def test_comes_after(): print("idle")
"""


def test_a_shared_cluster_ends_with_its_last_user_after_all_that_depends_on_it(tmp_path: Path) -> None:
    (tmp_path / "test_sharing.py").write_text(SHARING)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-n0", "-p", "e2e.cluster.pytest_plugin"]
    done = subprocess.run(
        [*command, "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    seen = re.findall("used|idle|signed out|down", done.stdout)
    assert seen == ["used", "used", "signed out", "down", "idle", "idle"], done.stdout
