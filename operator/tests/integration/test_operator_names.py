"""Objects that have a name the operator would give: those of others are left alone, its own are found again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from e2e.operator.objects import gpu_type, profile, service
from e2e.operator.rig import Json, Operator, Rig

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]


def one_type(team: str) -> list[Json]:
    return [gpu_type("slow", "example.com/slow", 0.6), profile(team, {"slow": 2.5})]


def somebodys_config_map(team: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "chat-routing", "namespace": team},
        "data": {"mine": "yes"},
    }


def somebodys_deployment(team: str) -> Json:
    # Even the selector is the one that the operator would write, so that the API server itself would accept a merge.
    labels = {"llmfleet.io/component": "engine", "llmfleet.io/service": "chat", "llmfleet.io/variant": "slow"}
    container = {"name": "web", "image": "web"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "chat-slow", "namespace": team},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


@pytest.mark.parametrize("theirs", [somebodys_config_map, somebodys_deployment], ids=["ConfigMap", "Deployment"])
def test_an_object_of_somebody_else_is_named_and_never_touched(
    rig: Rig, operator: Operator, team: str, theirs: Callable[[str], Json]
) -> None:
    obj = theirs(team)
    kind, name = obj["kind"], obj["metadata"]["name"]
    rig.apply(obj)
    before = rig.get(kind, name, team)
    rig.apply(*one_type(team), service(team, "chat", 3.0))

    said = rig.wait(
        "EnginesReady says that the name is taken",
        lambda: (c := rig.condition(team, "chat", "EnginesReady")).get("reason") == "NameTaken" and c,
    )
    assert f"{kind} {team}/{name} exists" in said["message"]
    assert rig.condition(team, "chat", "Ready")["status"] == "False"
    rig.wait("an Event says so too", lambda: "NameTaken" in rig.events(team, "chat"))
    after = rig.get(kind, name, team)
    assert before is not None
    assert after is not None
    assert [entry["manager"] for entry in after["metadata"]["managedFields"] if "llmfleet" in entry["manager"]] == []
    assert after.get("data") == before.get("data")
    assert (after["metadata"].get("labels"), after["metadata"].get("ownerReferences")) == (None, None)
    # Without a table no engine would get a request, so none is started either.
    assert kind == "Deployment" or rig.list("Deployment", team) == []

    rig.delete(kind, name, team)
    rig.wait_ready(team, "chat", 90)
    assert rig.replicas(team) == {"chat-slow": 2}


def test_a_deployment_that_lost_its_labels_is_recognised_by_its_owner(rig: Rig, operator: Operator, team: str) -> None:
    rig.apply(*one_type(team), service(team, "chat", 3.0))
    rig.wait_ready(team, "chat")
    deployment = rig.get("Deployment", "chat-slow", team)
    assert deployment is not None
    rig.cluster.kubectl(
        "label", "-n", team, "deployment", "chat-slow", "llmfleet.io/component-", "llmfleet.io/service-"
    )

    def restored() -> bool:
        meta = (rig.get("Deployment", "chat-slow", team) or {})["metadata"]
        return bool(
            meta["uid"] == deployment["metadata"]["uid"]
            and meta.get("labels", {}).get("llmfleet.io/component") == "engine"
            and meta["labels"].get("llmfleet.io/service") == "chat"
        )

    rig.wait("the labels are back", restored)
    rig.wait_ready(team, "chat")
