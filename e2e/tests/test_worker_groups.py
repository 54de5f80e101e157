"""Under xdist, tests that share a cluster run in one worker: else each worker would start one, in silence."""

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
