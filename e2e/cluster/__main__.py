"""`python -m e2e.cluster up|down|status|kubeconfig|build`: the local cluster for people.

`up` prints what it does on standard error and the kubeconfig's path on standard output, so that
`export KUBECONFIG=$(python -m e2e.cluster up)` works. An interrupt in the middle (or SIGTERM, or the terminal's end)
removes what was begun.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from types import FrameType

from e2e.cluster.binaries import NEEDED, PROGRAMS, ensure_binaries
from e2e.cluster.cluster import Cluster
from e2e.cluster.removal import remove_abandoned, remove_cluster
from e2e.cluster.state import (
    PROFILES,
    ClusterError,
    cache_directory,
    cluster_directory,
    exclusive,
    read_record,
    state_directories,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for a failure said in words, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m e2e.cluster", description="A real local Kubernetes.")
    parser.add_argument("command", choices=["up", "down", "status", "kubeconfig", "build"])
    parser.add_argument("--profile", choices=PROFILES, default=None, help="default: control-plane; build: everything")
    parser.add_argument("--name", default="llmfleet", help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        match chosen.command:
            case "up":
                _up(chosen.name, chosen.profile or "control-plane")
            case "down":
                _down(chosen.name)
            case "status":
                return _status()
            case "kubeconfig":
                print(Cluster.attach(chosen.name).kubeconfig)
            case "build":
                names = NEEDED[chosen.profile] if chosen.profile else tuple(PROGRAMS)
                print(ensure_binaries(names, _report).directory)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    return 0


def _up(name: str, profile: str) -> None:
    begun = time.monotonic()
    cluster = Cluster.start("node" if profile == "node" else "control-plane", name, detached=True, report=_report)
    _report(f"cluster {name} ({cluster.profile}) is ready, {time.monotonic() - begun:.1f} s")
    _report(f"kubectl of the same version: {cluster.binaries['kubectl']}")
    print(cluster.kubeconfig)


def _down(name: str) -> None:
    remove_abandoned()
    directory = cluster_directory(name)
    with exclusive(cache_directory()):
        record = read_record(directory)
        if record is not None and record.owner is not None:
            raise ClusterError(f"cluster {name} belongs to the live process {record.owner.pid}: end that instead")
        if not directory.exists():
            _report(f"no cluster {name} is there")
        remove_cluster(directory)


def _status() -> int:
    """One line per cluster of this cache and one per component; exit code 1 unless all are healthy."""
    directories = state_directories()
    if not directories:
        print("no clusters")
    all_healthy = True
    for directory in directories:
        record = read_record(directory)
        if record is None:
            continue
        if record.phase != "ready" or record.abandoned():
            state = "abandoned; `down` removes it" if record.abandoned() else "starting"
            print(f"{record.name}  {record.profile}  {state}")
            all_healthy = False
            continue
        cluster = Cluster.attach(record.name)
        healthy = cluster.healthy()
        all_healthy = all_healthy and healthy
        print(f"{record.name}  {record.profile}  {'healthy' if healthy else 'broken'}  {cluster.kubeconfig}")
        for component, pids in cluster.components().items():
            print(f"  {component:<24} {'pid ' + str(pids[-1]) if pids else 'ended'}")
    return 0 if all_healthy else 1


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
