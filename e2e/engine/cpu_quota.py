"""A share of a core, enforced by the kernel: what makes the demo's cheap engine really slow.

Kubernetes does the same with a container's CPU limit, but hands out the share over 100 ms by default: an engine that
may run 40 ms and then waits 60 ms delivers tokens in bursts. With a short period the delay spreads evenly over the
tokens, as on slower hardware. Needs root, and works with both versions of cgroups.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from e2e.engine.environment import EngineError

PERIOD_US = 10_000
"""As short as tokens are: the kubelet's `cpuCFSQuotaPeriod` of the local cluster is the same."""

_CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def cpu_quota(cores: float) -> Iterator[Path]:
    """A control group that may use `cores` cores; yields the file into which a process writes its id to join.

    Removed at the end, when its processes are gone. Raises EngineError where control groups cannot be made.
    """
    unified = (_CGROUPS / "cgroup.controllers").exists()
    parent = _CGROUPS if unified else _CGROUPS / "cpu"
    group = parent / f"llmfleet-{os.getpid()}-{secrets.token_hex(4)}"
    quota_us = round(cores * PERIOD_US)
    try:
        if unified:
            (parent / "cgroup.subtree_control").write_text("+cpu")
        group.mkdir()
    except OSError as error:
        raise EngineError(f"a CPU share of {cores} needs a control group, which needs root: {error}") from error
    try:
        if unified:
            (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        yield group / "cgroup.procs"
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            return group.rmdir()
        except OSError as error:
            # A process that has just been ended still counts for a moment.
            if time.monotonic() > deadline:
                raise EngineError(f"{group} cannot be removed: {error}") from error
            time.sleep(0.02)
