"""What bounds the fleet parses no more and the operator is replaced: the bound holds, and its status says which."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from e2e.operator.objects import gpu_type, policy, profile, service
from e2e.operator.rig import Json, Rig

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]


SHORT = "InsufficientCapacity"
BOUNDS = (("PowerDomain", "rack"), ("FleetPolicy", "default"))
BY_VERSION = "generation 1, the last that did, stays in force"


def power_domain(name: str, gpu: str, watts: float) -> Json:
    spec = {"gpuTypes": [gpu], "budgetWatts": watts}
    return {"apiVersion": "llmfleet.io/v1alpha1", "kind": "PowerDomain", "metadata": {"name": name}, "spec": spec}


@pytest.fixture(scope="module", autouse=True)
def newer_crds(operator_cluster: Rig) -> Iterator[None]:
    """CRDs of a version that accepts more than this operator understands."""
    kubectl = operator_cluster.cluster.kubectl
    for plural, field in (("powerdomains", "budgetWatts"), ("fleetpolicies", "budgetPerHour")):
        crd = json.loads(kubectl("get", "crd", f"{plural}.llmfleet.io", "-o", "json"))
        spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        for limit in ("minimum", "exclusiveMinimum"):
            spec["properties"][field].pop(limit, None)
        crd["metadata"] = {"name": crd["metadata"]["name"]}
        crd.pop("status")
        kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(crd))
    yield
    operator_cluster.apply_crds()


def accepted(rig: Rig, kind: str, name: str) -> tuple[str, str]:
    """(reason, message)"""
    conditions = (rig.get(kind, name) or {}).get("status", {}).get("conditions", [])
    return next(((c["reason"], c["message"]) for c in conditions if c["type"] == "Accepted"), ("", ""))


def available(rig: Rig, name: str) -> str:
    conditions = (rig.get("GPUType", name) or {}).get("status", {}).get("conditions", [])
    return next((c["reason"] for c in conditions if c["type"] == "Available"), "")


def test_power_domain_and_policy_bind_by_their_last_version_after_a_takeover_and_a_restart(rig: Rig, team: str) -> None:
    """A device of `slow` draws 100 W and serves 2 planned requests per second for 0.6 an hour."""
    slow = gpu_type("slow", "example.com/slow", 0.6)
    slow["spec"]["watts"] = {"idle": 10, "peak": 100}
    broken = (power_domain("rack", "slow", -1), policy(budgetPerHour=-1))
    with rig.operator("first") as first, rig.operator("second") as second:
        rig.apply(slow, profile(team, {"slow": 2.5}), power_domain("rack", "slow", 300), policy(budgetPerHour=1.3))
        rig.apply(service(team, "chat", 3.0))
        rig.wait_ready(team, "chat")
        assert rig.replicas(team) == {"chat-slow": 2}
        rig.wait("the new schema is served", lambda: _applied(rig, *broken))
        rig.wait("they say which version binds", lambda: all(BY_VERSION in accepted(rig, *one)[1] for one in BOUNDS))

        leader, standby = (first, second) if rig.holder() == "first" else (second, first)
        leader.kill()
        rig.wait("the standby acts", lambda: rig.holder() == standby.identity)
        rig.apply(service(team, "chat", 30.0))
        rig.wait("it is short", lambda: rig.condition(team, "chat", "Planned").get("reason") == SHORT)
        # The domain's watts are enough for three replicas, the policy's money for two.
        assert "budgetPerHour" in rig.condition(team, "chat", "Planned")["message"]
        assert rig.replicas(team) == {"chat-slow": 2}

    rig.delete("FleetPolicy", "default")
    with rig.operator("third"):
        rig.wait("a third replica", lambda: rig.replicas(team) == {"chat-slow": 3})
        rig.wait("the domain binds", lambda: "budgetWatts" in rig.condition(team, "chat", "Planned")["message"])


def test_what_never_parsed_lets_nothing_begin(rig: Rig, team: str) -> None:
    with rig.operator():
        rig.apply(gpu_type("slow", "example.com/slow", 0.6), profile(team, {"slow": 2.5}), service(team, "chat", 3.0))
        rig.wait_ready(team, "chat")
        rig.wait("the new schema is served", lambda: _applied(rig, power_domain("rack", "slow", -1)))
        rig.wait("the type says so", lambda: available(rig, "slow") == "LimitUnknown")
        rig.apply(service(team, "chat", 7.0))
        rig.wait("it is short", lambda: rig.condition(team, "chat", "Planned").get("reason") == SHORT)
        assert rig.replicas(team) == {"chat-slow": 2}

        rig.apply(policy(budgetPerHour=-1))
        rig.wait("nothing is applied", lambda: accepted(rig, "FleetPolicy", "default")[0] == "InvalidSpec")
        rig.delete("PowerDomain", "rack")
        shadow = "there would be 4 x slow"
        rig.wait("it is only shown", lambda: shadow in rig.condition(team, "chat", "Shadow").get("message", ""))
        assert rig.replicas(team) == {"chat-slow": 2}
        rig.apply(policy(budgetPerHour=100))
        rig.wait("the plan is carried out", lambda: rig.replicas(team) == {"chat-slow": 4})


def _applied(rig: Rig, *objects: Json) -> bool:
    """True, once the API server takes the objects: it learns of a schema a little later, and `Rig.wait` tries again."""
    rig.apply(*objects)
    return True
