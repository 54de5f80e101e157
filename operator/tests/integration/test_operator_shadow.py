"""Shadow mode on a real control plane: everything is said and nothing is touched, through a restart too."""

from __future__ import annotations

import pytest

from e2e.operator.objects import gpu_type, policy, profile, service
from e2e.operator.rig import Json, Rig
from llmfleet.cli.main import run

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]


def fleet_policy(mode: str) -> Json:
    return policy(mode=mode, replanIntervalSeconds=1, debounceSeconds=0)


def written(rig: Rig, team: str) -> dict[str, str]:
    """Version of every object by which a plan would be carried out, and of the pods' part that the operator writes."""
    objects = {
        f"{kind}/{obj['metadata']['name']}": obj["metadata"]["uid"] + str(obj["metadata"].get("generation", ""))
        for kind in ("Deployment", "Pod")
        for obj in rig.list(kind, team)
    }
    marks = {
        f"marks/{pod['metadata']['name']}": str(pod["metadata"].get("annotations")) for pod in rig.list("Pod", team)
    }
    tables = {
        f"table/{table['metadata']['name']}": table["metadata"]["resourceVersion"]
        for table in rig.list("ConfigMap", team)
        if table["metadata"]["name"].endswith("-routing")
    }
    return objects | marks | tables


def shadow(rig: Rig, team: str, name: str = "chat") -> tuple[str, str]:
    said = rig.condition(team, name, "Shadow")
    return said.get("reason", ""), said.get("message", "")


def test_in_shadow_mode_plans_are_shown_and_not_applied_until_the_mode_is_apply(
    rig: Rig, team: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(rig.cluster.kubeconfig))
    rig.apply(
        fleet_policy("shadow"),
        gpu_type("fast", "example.com/fast", 4.0),
        gpu_type("slow", "example.com/slow", 0.6),
        profile(team, {"fast": 10.0, "slow": 2.5}),
        service(team, "chat", 7.0),
    )
    with rig.operator():
        rig.wait("it is said what would be", lambda: shadow(rig, team)[0] == "PlanNotApplied")
        assert "there would be 4 x slow at 2.4 per hour, not nothing" in shadow(rig, team)[1]
        planned = rig.condition(team, "chat", "Planned")
        assert (planned["status"], planned["reason"]) == ("False", "ShadowMode")
        rig.wait("an Event says so", lambda: {"ShadowMode", "PlanNotApplied"} <= rig.events(team, "chat"))
        assert written(rig, team) == {}
        assert run(["explain", "chat", "-n", team]) == 0
        assert "4 x slow" in capfd.readouterr().out

        rig.apply(fleet_policy("apply"))
        rig.wait_ready(team, "chat")
        assert rig.replicas(team) == {"chat-slow": 4}
        rig.wait("nothing is said of a shadow", lambda: shadow(rig, team)[0] == "")

        rig.apply(fleet_policy("shadow"))
        rig.wait("all would stay", lambda: shadow(rig, team)[0] == "PlanUnchanged")
        before = written(rig, team)
        assert {name.split("/")[0] for name in before} == {"Deployment", "Pod", "marks", "table"}
        rig.apply(gpu_type("slow", "example.com/slow", 0.6, limit=0), service(team, "new", 3.0))
        rig.wait("fast would take over", lambda: "there would be 1 x fast at 4 per hour" in shadow(rig, team)[1])
        rig.wait("a new service would get an engine", lambda: "1 x fast" in shadow(rig, team, "new")[1])
        assert rig.condition(team, "chat", "Ready")["status"] == "True"
        assert written(rig, team) == before
        capfd.readouterr()
        assert run(["explain", "chat", "-n", team]) == 0
        assert "PlanNotApplied: FleetPolicy mode is shadow: there would be 1 x fast" in capfd.readouterr().out

    rig.apply(service(team, "chat", 14.0))
    with rig.operator():
        rig.wait("2 fast would take over", lambda: "there would be 2 x fast at 8 per hour" in shadow(rig, team)[1])
        assert written(rig, team) == before
        ready = rig.condition(team, "chat", "Ready")
        assert (ready["status"], ready["observedGeneration"]) == ("True", 1)

        rig.apply(fleet_policy("apply"))
        rig.wait("the plan is carried out", lambda: rig.replicas(team) == {"chat-fast": 2, "new-fast": 1})
        rig.wait_ready(team, "chat")
        assert shadow(rig, team)[0] == ""
