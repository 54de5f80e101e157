"""One service's life on a real control plane: created, changed, refused, deleted."""

from __future__ import annotations

import base64
import json

import pytest

from e2e.cluster.state import ClusterError
from e2e.operator.launch import NAMESPACE, OPERATOR_ACCOUNT
from e2e.operator.objects import gpu_type, profile, service
from e2e.operator.rig import Json, Operator, PodRecorder, Rig, serves

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]


def two_types(team: str) -> list[Json]:
    """`slow` serves 2 planned requests per second for 0.6, `fast` serves 8 for 4."""
    return [
        gpu_type("fast", "example.com/fast", 4.0),
        gpu_type("slow", "example.com/slow", 0.6),
        profile(team, {"fast": 10.0, "slow": 2.5}),
    ]


def engines(rig: Rig, team: str) -> list[Json]:
    return [pod for pod in rig.list("Pod", team) if serves(pod)]


def test_a_service_gets_engines_and_says_what_they_cost(rig: Rig, operator: Operator, team: str) -> None:
    rig.apply(*two_types(team), service(team, "chat", 7.0))

    status = rig.wait_ready(team, "chat")["status"]

    assert rig.replicas(team) == {"chat-slow": 4}
    assert status["replicas"] == "slow 4/4"
    assert status["costPerHour"] == pytest.approx(2.4)
    assert status["nextBestCostPerHour"] > 2.4
    assert status["costPerMillionTokens"] == pytest.approx(2.4 / (7 * 3600 * (128 + 64)) * 1e6, rel=1e-3)
    columns = rig.cluster.kubectl("get", "llms", "-n", team, "-o", "wide")
    assert columns.splitlines()[0].split() == [
        *("NAME", "READY", "REPLICAS", "COST/H", "COST/MTOK", "REASON", "NEXTBEST/H", "PLAN", "AGE"),
    ]
    assert columns.splitlines()[1].split()[:3] == ["chat", "True", "slow"]


def test_a_gpu_type_says_how_much_of_it_there_is_and_is_used(rig: Rig, operator: Operator, team: str) -> None:
    foreign = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "training", "namespace": team},
        "spec": {
            "containers": [
                {"name": "job", "image": "job", "resources": {"limits": {"example.com/slow": "3"}}},
            ]
        },
    }
    rig.apply(*two_types(team), foreign, service(team, "chat", 7.0))
    rig.wait_ready(team, "chat")

    expected = {"allocatableDevices": 16, "foreignDevices": 3, "fleetDevices": 4, "availableDevices": 13}
    rig.wait(
        f"GPUType slow says {expected}",
        lambda: expected.items() <= ((rig.get("GPUType", "slow") or {}).get("status") or {}).items(),
    )


def test_a_lowered_limit_moves_a_service_without_ever_serving_less(rig: Rig, operator: Operator, team: str) -> None:
    rig.apply(*two_types(team), service(team, "chat", 7.0))
    rig.wait_ready(team, "chat")
    recorder = PodRecorder(rig, team)
    rig.wait("the recorder sees the engines", lambda: len(recorder.states[-1]) == 4 if recorder.states else None)

    rig.apply(gpu_type("slow", "example.com/slow", 0.6, limit=0))

    rig.wait("only the fast engine is left", lambda: rig.replicas(team) == {"chat-fast": 1})
    rig.wait_ready(team, "chat")
    served = {"fast": 8.0, "slow": 2.0}
    # The first states are the watch's own replay of what exists, pod by pod.
    capacities = [
        sum(served[pod["metadata"]["labels"]["llmfleet.io/variant"]] for pod in state.values() if serves(pod))
        for state in recorder.states[3:]
    ]
    assert min(capacities) >= 7.0, f"planned capacity over time, in requests per second: {capacities}"
    assert any("fast" in json.dumps(list(state)) for state in recorder.states)


def test_a_changed_template_reaches_all_engines_and_ready_waits_for_it(rig: Rig, operator: Operator, team: str) -> None:
    rig.apply(*two_types(team), service(team, "chat", 3.0))
    rig.wait_ready(team, "chat")
    before = {pod["metadata"]["uid"] for pod in engines(rig, team)}

    rig.apply(service(team, "chat", 3.0, engine={"args": ["--seed=7"], "terminationGracePeriodSeconds": 1}))

    rig.wait_ready(team, "chat")
    rig.wait("the last engine of the old template is gone", lambda: len(engines(rig, team)) == 2)
    assert not before & {pod["metadata"]["uid"] for pod in engines(rig, team)}
    assert all("--seed=7" in json.dumps(pod["spec"]["containers"]) for pod in engines(rig, team))


def test_deleting_a_service_removes_all_that_it_owned(rig: Rig, operator: Operator, team: str) -> None:
    rig.apply(*two_types(team), service(team, "chat", 3.0), service(team, "other", 3.0))
    rig.wait_ready(team, "chat")
    rig.wait_ready(team, "other")

    rig.delete("LLMService", "chat", team)

    def left() -> set[str]:
        kinds = ("Deployment", "ConfigMap", "Pod")
        labels = [obj["metadata"].get("labels", {}) for kind in kinds for obj in rig.list(kind, team)]
        return {label["llmfleet.io/service"] for label in labels if "llmfleet.io/service" in label}

    rig.wait("only the other service's objects are left", lambda: left() == {"other"})
    assert rig.ready(team, "other")


@pytest.mark.parametrize(
    ("changes", "reason", "named"),
    [
        ({"gpu_types": ("tpu",)}, "UnknownGPUType", "tpu"),
        ({"profile_name": "absent"}, "ProfileNotFound", "absent"),
    ],
)
def test_a_service_that_cannot_be_planned_says_why_and_stops_no_other(
    rig: Rig, operator: Operator, team: str, changes: Json, reason: str, named: str
) -> None:
    rig.apply(*two_types(team), service(team, "bad", 3.0, **changes), service(team, "good", 3.0))

    rig.wait_ready(team, "good")
    rig.wait(f"bad says {reason}", lambda: rig.condition(team, "bad", "Planned").get("reason") == reason)
    assert named in rig.condition(team, "bad", "Planned")["message"]
    assert rig.condition(team, "bad", "Ready")["status"] == "False"
    rig.wait(f"an Event says {reason}", lambda: reason in rig.events(team, "bad"))
    assert "bad" not in {name.rsplit("-", 1)[0] for name in rig.replicas(team)}


def test_what_the_api_server_refuses_is_said_on_the_service_and_stops_no_other(
    rig: Rig, operator: Operator, team: str
) -> None:
    walled = f"{team}-walled"
    rig.cluster.kubectl("create", "namespace", walled)
    rig.cluster.kubectl("create", "quota", "none", "--hard=count/deployments.apps=0", "-n", walled)
    try:
        rig.apply(*two_types(team), profile(walled, {"slow": 2.5}))
        rig.apply(service(walled, "chat", 3.0), service(team, "chat", 3.0))

        rig.wait_ready(team, "chat")
        rig.wait("the refusal is said", lambda: rig.condition(walled, "chat", "Ready").get("reason") == "ApplyRefused")
        assert "exceeded quota" in rig.condition(walled, "chat", "Ready")["message"]
        rig.wait("the refusal is an Event", lambda: "ApplyRefused" in rig.events(walled, "chat"))

        rig.cluster.kubectl("delete", "quota", "none", "-n", walled)
        rig.wait_ready(walled, "chat")
    finally:
        rig.cluster.kubectl("delete", "namespace", walled, "--wait=false")


def test_rendered_pods_are_admitted_where_restricted_pod_security_is_enforced(
    rig: Rig, operator: Operator, team: str
) -> None:
    rig.apply(*two_types(team), service(team, "chat", 3.0))
    rig.wait_ready(team, "chat")
    (deployment,) = rig.list("Deployment", team)
    template = deployment["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "dry", "namespace": team, "labels": template["metadata"]["labels"]},
        "spec": template["spec"],
    }
    rig.cluster.kubectl("label", "namespace", team, "pod-security.kubernetes.io/enforce=restricted")
    rig.cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))

    pod["spec"] = {**template["spec"], "hostNetwork": True}
    with pytest.raises(ClusterError, match="violates PodSecurity"):
        rig.cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))


def test_services_have_a_peer_key_each_and_share_the_plug_in(rig: Rig, operator: Operator, team: str) -> None:
    def objects(kind: str, component: str) -> list[Json]:
        selector = f"llmfleet.io/component={component}"
        answer = rig.cluster.kubectl("get", kind, "-n", team, "-l", selector, "-o", "json")
        items: list[Json] = json.loads(answer)["items"]
        return items

    rig.apply(*two_types(team), service(team, "chat", 3.0), service(team, "other", 3.0))
    rig.wait_ready(team, "chat")
    rig.wait_ready(team, "other")

    made = {secret["metadata"]["labels"]["llmfleet.io/service"]: secret for secret in objects("secret", "peer-key")}
    assert made.keys() == {"chat", "other"}
    keys = {base64.b64decode(secret["data"]["peer-key"]).decode() for secret in made.values()}
    assert len(keys) == 2
    assert not any(key in operator.log.read_text() or key in json.dumps(rig.list("LLMService", team)) for key in keys)
    (plug_in,) = objects("configmap", "engine-plug-in")
    assert {owner["name"] for owner in plug_in["metadata"]["ownerReferences"]} == {"chat", "other"}
    mounted = json.dumps([pod["spec"]["volumes"] for pod in engines(rig, team)])
    assert plug_in["metadata"]["name"] in mounted
    assert all(secret["metadata"]["name"] in mounted for secret in made.values())
    account = f"system:serviceaccount:{NAMESPACE}:{OPERATOR_ACCOUNT}"
    with pytest.raises(ClusterError, match="cannot list resource"):
        rig.cluster.kubectl("get", "secret", "-n", team, "--as", account)
