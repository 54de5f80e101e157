"""Somebody edits an engine Deployment by hand, on a real API server."""

from __future__ import annotations

import json

import pytest

from e2e.operator.objects import gpu_type, profile, service
from e2e.operator.rig import Json, Operator, Rig

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]


def applied(operator: Operator) -> int:
    """How often the operator wrote a Deployment."""
    return sum(line.get("msg") == "applied" and line.get("kind") == "Deployment" for line in operator.lines())


def container(rig: Rig, team: str) -> Json:
    deployment = rig.get("Deployment", "chat-slow", team)
    assert deployment is not None
    found: Json = next(
        part for part in deployment["spec"]["template"]["spec"]["containers"] if part["name"] == "engine"
    )
    return found


def said(rig: Rig, team: str) -> list[str]:
    return [event["message"] for event in rig.list("Event", team) if event["reason"] == "DriftCorrected"]


def test_an_edit_of_a_live_template_is_set_back_and_told_and_what_was_added_stays(rig: Rig, team: str) -> None:
    overlay = {
        "env": [{"name": "EMPTY", "value": ""}, {"name": "LOG", "value": "info"}],
        "resources": {"requests": {"memory": "1024Mi", "cpu": "0.5"}, "limits": {"memory": "2048Mi"}},
        "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "1024Mi"}}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch", "readOnly": False}],
    }
    rig.apply(gpu_type("slow", "example.com/slow", 0.6), profile(team, {"slow": 2.5}))
    rig.apply(service(team, "chat", 3.0, podOverlay=overlay))
    with rig.operator():
        rig.wait_ready(team, "chat")
        before = container(rig, team)

    with rig.operator() as operator:
        rig.wait("it has planned", lambda: operator.said("planned"))
        patch = {
            "spec": {
                "template": {
                    "spec": {
                        "containers": [
                            {"name": "engine", "image": "else:1", "env": [{"name": "ADDED", "value": "theirs"}]},
                        ]
                    }
                }
            }
        }
        rig.cluster.kubectl("patch", "deployment", "chat-slow", "-n", team, "-p", json.dumps(patch))
        assert container(rig, team)["image"] == "else:1"
        rig.wait("the image is set back", lambda: container(rig, team)["image"] == before["image"])
        now = container(rig, team)
        assert {"name": "ADDED", "value": "theirs"} in now["env"]
        assert [entry for entry in now["env"] if entry["name"] != "ADDED"] == before["env"]
        (message,) = rig.wait("an Event says so", lambda: said(rig, team))
        assert "spec.template.spec.containers[engine].image changed by kubectl-patch" in message

        rig.cluster.kubectl("scale", "deployment", "chat-slow", "-n", team, "--replicas=1")
        rig.wait("the replicas are set back", lambda: rig.replicas(team) == {"chat-slow": 2})
        rig.wait("an Event says so too", lambda: any("spec.replicas" in message for message in said(rig, team)))
        rig.wait_ready(team, "chat")
        # One per correction, and none for what the API server itself writes otherwise than it was applied.
        assert applied(operator) <= 3

    with rig.operator() as restarted:
        rig.wait("it has planned", lambda: restarted.said("planned"))
        rig.wait_ready(team, "chat")
        assert applied(restarted) <= 1
        assert len(said(rig, team)) == 2
