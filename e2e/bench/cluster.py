"""How long a cluster takes to be ready, and its programs to be built.

From built binaries to the moment at which `Cluster.start` returns: API server ready, controllers and scheduler at
work, and in the node profile the node Ready. Each run is a new cluster, ended before the next begins. The cold build
is measured only with `FULL=1` (with a build cache and a binaries directory of its own; Go's module downloads are
kept); otherwise the figure is the one recorded when this machine built its binaries, if it did so from nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from e2e.bench.report import Report
from e2e.cluster.binaries import PROGRAMS, ensure_binaries, recorded_cold_build_s
from e2e.cluster.cluster import Cluster
from e2e.cluster.state import Profile

_RUNS: dict[Profile, int] = {"control-plane": 5, "node": 3}
_NAMES: dict[Profile, tuple[str, float]] = {
    "control-plane": ("control_plane_ready", 6.0),
    "node": ("node_ready", 20.0),
}
_COLD_BUILD_TARGET_S = 720.0


def main() -> None:
    report = Report("cluster")
    ensure_binaries(PROGRAMS, lambda line: print(line, flush=True))
    for profile, (name, target_s) in _NAMES.items():
        if profile == "node" and os.geteuid() != 0:
            report.add(name, "s", [], target=target_s, note="not measured: needs root")
            continue
        with Cluster.start(profile):
            pass  # packages installed, page cache filled: the runs below measure the start alone
        runs = []
        for run in range(_RUNS[profile]):
            print(f"{profile} run {run + 1} of {_RUNS[profile]} ...", flush=True)
            runs.append(_start_s(profile))
        report.add(name, "s", runs, target=target_s)
    _cold_build(report)
    report.write()


def _start_s(profile: Profile) -> float:
    begun = time.monotonic()
    with Cluster.start(profile):
        return time.monotonic() - begun


def _cold_build(report: Report) -> None:
    if os.environ.get("FULL") == "1":
        print("building everything from an empty build cache ...", flush=True)
        report.add("cold_build", "s", [_cold_build_s()], target=_COLD_BUILD_TARGET_S)
        return
    recorded = recorded_cold_build_s()
    if recorded is None:
        note = "this machine's binaries were not built from an empty cache: FULL=1 measures"
        report.add("cold_build", "s", [], note=note)
    else:
        note = "recorded when this machine built its binaries"
        report.add("cold_build", "s", [recorded], target=_COLD_BUILD_TARGET_S, note=note)


def _cold_build_s() -> float:
    with tempfile.TemporaryDirectory(prefix="llmfleet-cold-build-") as scratch:
        # Without KUBEBUILDER_ASSETS: a binary that is found is not one that is built.
        kept = {name: value for name, value in os.environ.items() if name != "KUBEBUILDER_ASSETS"}
        environment = kept | {"LLMFLEET_CACHE": f"{scratch}/cache", "GOCACHE": f"{scratch}/go-build"}
        begun = time.monotonic()
        subprocess.run([sys.executable, "-m", "e2e.cluster", "build"], env=environment, check=True)
        return time.monotonic() - begun


if __name__ == "__main__":
    main()
