"""A share of a core is a share of a core."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from e2e.engine.cpu_quota import cpu_quota

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="CPU shares need root")

SPIN_FOR_A_SECOND = """
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
used, end = time.process_time(), time.monotonic() + 1
while time.monotonic() < end: pass
print(time.process_time() - used)
"""


def test_a_process_in_the_group_gets_no_more_than_its_share_and_the_group_is_removed() -> None:
    with cpu_quota(0.2) as join:
        run = subprocess.run(
            [sys.executable, "-c", SPIN_FOR_A_SECOND, str(join)], check=True, capture_output=True, text=True, timeout=60
        )
    assert float(run.stdout) < 0.4, "seconds of CPU in a second"
    assert not join.parent.exists()
