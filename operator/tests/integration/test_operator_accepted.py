"""What the platform team wrote says in its status that it counts, and then rests."""

from __future__ import annotations

import time

import pytest

from e2e.operator.objects import gpu_type, profile
from e2e.operator.rig import Json, Operator, Rig

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]


def test_policy_type_profile_and_power_domain_say_that_they_count_and_are_not_written_again(
    rig: Rig, operator: Operator, team: str
) -> None:
    policy = {"apiVersion": "llmfleet.io/v1alpha1", "kind": "FleetPolicy", "metadata": {"name": "default"}, "spec": {}}
    absent = gpu_type("absent", "example.com/absent", 1.0)
    rack = {
        "apiVersion": "llmfleet.io/v1alpha1",
        "kind": "PowerDomain",
        "metadata": {"name": "rack"},
        "spec": {"gpuTypes": ["slow"], "budgetWatts": 4000},
    }
    rig.apply(policy, rack, gpu_type("slow", "example.com/slow", 0.6), absent, profile(team, {"slow": 2.5}))
    types: list[tuple[str, str, str | None]] = [("GPUType", "slow", None), ("GPUType", "absent", None)]
    objects = [*types, ("FleetPolicy", "default", None), ("ModelProfile", "tiny", team), ("PowerDomain", "rack", None)]

    def conditions(kind: str, name: str, namespace: str | None) -> dict[str, str]:
        found: Json = rig.get(kind, name, namespace) or {}
        return {c["type"]: f"{c['status']} {c['reason']}" for c in found.get("status", {}).get("conditions", [])}

    wanted = [{"Accepted": "True Accepted"} for _ in objects]
    wanted[-1] = {"Accepted": "True WattsUnknown"}
    wanted[0] |= {"Available": "True DevicesAvailable"}
    wanted[1] |= {"Available": "False NoDevices"}
    rig.wait(f"conditions {wanted}", lambda: [conditions(*obj) for obj in objects] == wanted)

    def versions() -> list[str]:
        return [(rig.get(*obj) or {})["metadata"]["resourceVersion"] for obj in objects]

    before = versions()
    time.sleep(5)
    assert versions() == before
