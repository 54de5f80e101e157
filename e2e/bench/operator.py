"""How fast the operator turns services into Deployments and tokens, and what it costs to keep a large fleet.

    node profile            apply to first token (`operator_first_token`)
    control plane, kwok     apply to Deployments --> a leader is killed --> the fleet --> its leader is killed

The real operator runs beside the cluster as its service account. On the control plane first one service at a time,
from the start of `kubectl apply` to the moment at which its Deployments exist. Then a thousand (`operator_fleet`):
what it takes to apply them, and what it costs to keep them. A leader is killed before that and after it, when a
standby has to take a thousand services over.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

from e2e.bench import operator_first_token, operator_fleet
from e2e.bench.operator_fleet import NAMESPACE, TYPES
from e2e.bench.report import Report
from e2e.cluster.cluster import Cluster
from e2e.operator.objects import gpu_type, profile, service
from e2e.operator.rig import Operator, Rig, RigError

_FULL = os.environ.get("FULL") == "1"
FIRST_TOKEN_RUNS = 3 if _FULL else 1
SINGLE_RUNS = 25
TAKEOVER_RUNS = 3
NODES = 70
DEVICES_PER_NODE = 16


def main() -> None:
    report = Report("operator")
    with tempfile.TemporaryDirectory(prefix="llmfleet-bench-operator-") as directory:
        scratch = Path(directory)
        _first_token(report, scratch)
        print("starting a control plane with kwok nodes ...", flush=True)
        with Cluster.start("control-plane") as cluster:
            rig = Rig(cluster, scratch)
            cluster.add_kwok_nodes(
                NODES, allocatable={f"example.com/{name}": str(DEVICES_PER_NODE // len(TYPES)) for name in TYPES}
            )
            with contextlib.closing(rig), contextlib.ExitStack() as operators:
                _control_plane(report, rig, operators, scratch)
    report.write()


def _first_token(report: Report, scratch: Path) -> None:
    runs: list[operator_first_token.FirstToken] = []
    note = "not measured: a real node needs root"
    if os.geteuid() == 0:
        logs = scratch / "node"
        logs.mkdir()
        runs = operator_first_token.measure(logs, FIRST_TOKEN_RUNS)
        before, after = ([getattr(run, part) for run in runs] for part in ("before_s", "after_s"))
        note = (
            f"{min(before):.2f} to {max(before):.2f} s before the engine, {min(after):.2f} to {max(after):.2f} s after"
        )
    report.add("apply_to_first_token_overhead", "s", [run.overhead_s for run in runs], target=3.0, note=note)
    report.add("engine_start", "s", [run.engine_start_s for run in runs])


def _control_plane(report: Report, rig: Rig, operators: contextlib.ExitStack, scratch: Path) -> None:
    rig.apply(*[gpu_type(name, f"example.com/{name}", 1.0 + number) for number, name in enumerate(TYPES)])
    rig.apply(profile(NAMESPACE, dict.fromkeys(TYPES, 10.0)))
    leader = operators.enter_context(rig.operator())
    rig.wait("the operator has made a plan", lambda: leader.said("planned"))
    runs = [_apply_to_deployment_s(rig, scratch, run) for run in range(SINGLE_RUNS)]
    report.add("apply_to_deployments", "s", runs, target=1.0, note="from the start of kubectl apply")

    runs = []
    for run in range(TAKEOVER_RUNS):
        took_s, leader = _takeover_s(rig, operators, leader, f"takeover-{run}")
        runs.append(took_s)
    report.add(
        "standby_takeover", "s", runs, target=15.0, note="SIGKILL of the leader to the standby's first Deployment"
    )
    rig.wait("the single services are gone", lambda: not rig.list("Deployment", NAMESPACE), 120)

    operator_fleet.measure(report, rig, leader)
    took_s, leader = _takeover_s(rig, operators, leader, "takeover-fleet")
    report.add("fleet_1000_standby_takeover", "s", [took_s], target=15.0)


def _apply_to_deployment_s(rig: Rig, scratch: Path, run: int) -> float:
    name, gpu = f"single-{run}", TYPES[run % len(TYPES)]
    path = scratch / f"{name}.json"
    path.write_text(json.dumps(service(NAMESPACE, name, 3.0, gpu_types=(gpu,))))
    began = time.monotonic()
    rig.cluster.kubectl("apply", "-f", path)
    _wait_for_deployment(rig, f"{name}-{gpu}", began)
    took_s = time.monotonic() - began
    print(f"apply to Deployment, run {run + 1} of {SINGLE_RUNS}: {took_s:.3f} s", flush=True)
    rig.delete("LLMService", name, NAMESPACE)
    return took_s


def _takeover_s(rig: Rig, operators: contextlib.ExitStack, leader: Operator, name: str) -> tuple[float, Operator]:
    """Kills the leader; returns how long it took until a standby had acted, and the standby."""
    standby = operators.enter_context(rig.operator())
    rig.wait("the standby waits for the lease", lambda: standby.said("waiting for the lease"))
    assert rig.holder() == leader.identity
    leader.kill()
    began = time.monotonic()
    rig.apply(service(NAMESPACE, name, 3.0, gpu_types=TYPES[:1]))
    _wait_for_deployment(rig, f"{name}-{TYPES[0]}", began)
    took_s = time.monotonic() - began
    print(f"{name}: the standby has acted {took_s:.1f} s after the leader was killed", flush=True)
    rig.delete("LLMService", name, NAMESPACE)
    return took_s, standby


def _wait_for_deployment(rig: Rig, name: str, began: float) -> None:
    while rig.get("Deployment", name, NAMESPACE) is None:
        if time.monotonic() - began > 60:
            raise RigError(f"Deployment {name} does not exist after 60 s")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
