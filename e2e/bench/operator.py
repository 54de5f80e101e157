"""How fast the operator turns services into Deployments, and what it costs to keep a large fleet.

A control plane with kwok nodes, the real operator beside it as its service account. First one service at a time, from
the start of `kubectl apply` to the moment at which its Deployments exist. Then a thousand, applied by four clients at
once: six buckets, one allowed type each. When all their engines are Ready, the operator and its planner are left
alone for half a minute, and measured.
"""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2e.bench.report import Report
from e2e.cluster.cluster import Cluster
from e2e.operator.objects import Json, gpu_type, profile, service
from e2e.operator.rig import Operator, Rig, RigError

SINGLE_RUNS = 25
FLEET = 1000
CLIENTS = 4
TYPES = ("a", "b", "c", "d")
NODES = 70
DEVICES_PER_NODE = 16
IDLE_S = 30.0
_MIB = 2**20


def main() -> None:
    report = Report("operator")
    with tempfile.TemporaryDirectory(prefix="llmfleet-bench-operator-") as scratch:
        print("starting a control plane with kwok nodes ...", flush=True)
        with Cluster.start("control-plane") as cluster:
            rig = Rig(cluster, Path(scratch))
            cluster.add_kwok_nodes(
                NODES, allocatable={f"example.com/{name}": str(DEVICES_PER_NODE // len(TYPES)) for name in TYPES}
            )
            try:
                _measure(report, rig, Path(scratch))
            finally:
                rig.close()
    report.write()


def _measure(report: Report, rig: Rig, scratch: Path) -> None:
    namespace = "default"
    rig.apply(*[gpu_type(name, f"example.com/{name}", 1.0 + number) for number, name in enumerate(TYPES)])
    rig.apply(profile(namespace, dict.fromkeys(TYPES, 10.0)))
    with rig.operator() as operator:
        rig.wait("the operator has made a plan", lambda: operator.said("planned"))
        runs = [_apply_to_deployment_s(rig, namespace, scratch, run) for run in range(SINGLE_RUNS)]
        report.add("apply_to_deployments", "s", runs, target=1.0, note="from the start of kubectl apply")
        rig.wait("the single services are gone", lambda: not rig.list("Deployment", namespace), 120)
        _fleet(report, rig, operator, namespace, scratch)


def _apply_to_deployment_s(rig: Rig, namespace: str, scratch: Path, run: int) -> float:
    name = f"single-{run}"
    path = scratch / f"{name}.json"
    path.write_text(json.dumps(service(namespace, name, 3.0, gpu_types=(TYPES[run % len(TYPES)],))))
    expected = f"{name}-{TYPES[run % len(TYPES)]}"
    began = time.monotonic()
    rig.cluster.kubectl("apply", "-f", path)
    while rig.get("Deployment", expected, namespace) is None:
        if time.monotonic() - began > 60:
            raise RigError(f"Deployment {expected} does not exist after 60 s")
        time.sleep(0.01)
    took_s = time.monotonic() - began
    print(f"apply to Deployment, run {run + 1} of {SINGLE_RUNS}: {took_s:.3f} s", flush=True)
    rig.delete("LLMService", name, namespace)
    return took_s


def _fleet(report: Report, rig: Rig, operator: Operator, namespace: str, scratch: Path) -> None:
    services = [
        service(namespace, f"fleet-{number:04}", 3.0 + number % 5, gpu_types=(TYPES[number % len(TYPES)],))
        for number in range(FLEET)
    ]
    cpu_before_s = operator.cpu_s()
    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(rig.apply, services))
    applied_s = time.monotonic() - began
    print(f"{FLEET} services are applied after {applied_s:.1f} s", flush=True)
    rig.wait("all are planned and have Deployments", lambda: _all_there(rig, operator, namespace, began), 600)
    took_s = time.monotonic() - began
    cpu_s = operator.cpu_s() - cpu_before_s
    note = (
        f"from the first apply; the last came after {applied_s:.1f} s; operator and planner used {cpu_s:.1f} s of CPU"
    )
    report.add("fleet_1000_applied", "s", [took_s], target=60.0, note=note)

    print("waiting until every engine is Ready and nothing changes ...", flush=True)
    rig.wait("all are Ready", lambda: _ready(rig, namespace) == FLEET, 900)
    time.sleep(15)
    cpu_before_s = operator.cpu_s()
    print(f"leaving it alone for {IDLE_S:.0f} s ...", flush=True)
    time.sleep(IDLE_S)
    idle_percent = (operator.cpu_s() - cpu_before_s) / IDLE_S * 100
    report.add("fleet_1000_idle_cpu", "% of a core", [idle_percent], target=5.0, note="operator and planner")
    peak = f"peak {operator.peak_rss_bytes() / _MIB:.0f} MiB"
    report.add("fleet_1000_operator_rss", "MiB", [operator.rss_bytes() / _MIB], target=250.0, note=peak)
    planner = operator.metrics()["llmfleet_operator_planner_resident_bytes"]
    report.add("fleet_1000_planner_rss", "MiB", [planner / _MIB])


def _all_there(rig: Rig, operator: Operator, namespace: str, began: float) -> bool:
    # Progress is read from the operator's log: to list a thousand objects takes the API server's time from it.
    written = {line["object"] for line in operator.lines() if line.get("kind") == "Deployment"}
    written = {name for name in written if name.startswith(f"{namespace}/fleet-")}
    print(f"{time.monotonic() - began:.0f} s: {len(written)} Deployments", flush=True)
    if len(written) < FLEET:
        time.sleep(0.5)
        return False
    planned = sum(_is(obj, "Planned") for obj in rig.list("LLMService", namespace))
    print(f"{time.monotonic() - began:.0f} s: {planned} planned", flush=True)
    return planned == FLEET and len(rig.list("Deployment", namespace)) == FLEET


def _ready(rig: Rig, namespace: str) -> int:
    ready = sum(_is(obj, "Ready") for obj in rig.list("LLMService", namespace))
    print(f"{ready} of {FLEET} services are Ready", flush=True)
    if ready < FLEET:
        time.sleep(5)
    return ready


def _is(obj: Json, condition: str) -> bool:
    conditions = obj.get("status", {}).get("conditions", [])
    return any(c["type"] == condition and c["status"] == "True" for c in conditions)


if __name__ == "__main__":
    main()
