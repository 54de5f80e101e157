"""The operator dies, objects are bad, CRDs change: it converges all the same."""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Any

import pytest

from e2e.operator.objects import gpu_type, profile, service
from e2e.operator.rig import Json, Rig, is_ready, patience

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]

TAKEOVER_S = 15.0
QUIET_S = 3.0
"""An operator that has logged nothing for so long has nothing more to do, or gets no turn."""


def fleet(team: str, rates: dict[str, float], slow_limit: int | None = None) -> list[Json]:
    """`slow` serves 2 planned requests per second for 0.6, `fast` serves 8 for 4; one service per rate."""
    return [
        gpu_type("fast", "example.com/fast", 4.0),
        gpu_type("slow", "example.com/slow", 0.6, limit=slow_limit),
        profile(team, {"fast": 10.0, "slow": 2.5}),
        *[service(team, name, rate) for name, rate in rates.items()],
    ]


def settled(rig: Rig, team: str) -> Json | None:
    """What the operator made of the specs, without names and times that differ from run to run; None while any
    service is not Ready or an engine beyond the plan is left."""
    services = rig.list("LLMService", team)
    if not all(map(is_ready, services)):
        return None
    if any(variant.get("surplus") for obj in services for variant in obj["status"]["variants"]):
        return None
    deployments = {
        obj["metadata"]["name"]: (obj["spec"]["replicas"], obj["metadata"]["annotations"]["llmfleet.io/inputs"])
        for obj in rig.list("Deployment", team)
    }
    pods: dict[str, int] = {}
    for pod in rig.list("Pod", team):
        labels = pod["metadata"]["labels"]
        name = f"{labels['llmfleet.io/service']}-{labels['llmfleet.io/variant']}"
        pods[name] = pods.get(name, 0) + 1
    if pods != {name: replicas for name, (replicas, _) in deployments.items()}:
        return None
    routing = {
        obj["metadata"]["name"]: [
            {
                key: part
                for key, part in json.loads(obj["data"]["routing.json"]).items()
                if key in ("routes", "variants")
            }
        ]
        for obj in rig.list("ConfigMap", team)
        if "routing.json" in obj.get("data", {})
    }
    statuses = {
        obj["metadata"]["name"]: {
            "replicas": obj["status"]["replicas"],
            "costPerHour": round(obj["status"]["costPerHour"], 6),
            "conditions": sorted((c["type"], c["status"], c["reason"]) for c in obj["status"]["conditions"]),
        }
        for obj in services
    }
    return {"deployments": deployments, "routing": routing, "statuses": statuses}


CHANGES: tuple[tuple[dict[str, float], int | None], ...] = (
    ({"a": 3.0, "b": 3.0}, None),
    ({"a": 7.0, "b": 3.0}, None),
    ({"a": 7.0, "b": 5.0}, 4),
    ({"a": 1.0, "b": 9.0}, 4),
    ({"a": 1.0, "b": 9.0}, None),
    ({"a": 5.0, "b": 3.0}, 2),
    ({"a": 5.0, "b": 7.0}, 8),
)


class Chaos:
    """Kills and restarts the one operator at random points of its work until it is told to stop.

    A point is a number of lines that it has logged since its start: it logs every write, so that reaches from the
    filling of its caches to the middle of a rollout, on a fast machine and on a busy one. Where less than that is left
    to do, it is the moment when nothing more was logged for a while.
    """

    def __init__(self, rig: Rig, seed: int) -> None:
        self._rig = rig
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.operator = rig.start_operator("survivor")
        self.kills = 0

    def __enter__(self) -> Chaos:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        lines, logged, since = self._random.randint(2, 16), 0, time.monotonic()
        while not self._stop.wait(0.02):
            before, logged = logged, self.operator.log.read_bytes().count(b"\n")
            since = since if logged == before else time.monotonic()
            if logged >= lines or (logged >= 2 and time.monotonic() - since > QUIET_S):
                self.operator.kill()
                self.kills += 1
                # Under its own name, as a container of the same pod restarts: it need not wait for its lease.
                self.operator = self._rig.start_operator("survivor")
                lines = self._random.randint(2, 16)


def test_killed_at_random_moments_it_ends_where_an_undisturbed_operator_ends(rig: Rig, team: str) -> None:
    with rig.operator():
        rig.apply(*fleet(team, *CHANGES[-1]))
        undisturbed = rig.wait("the undisturbed fleet settles", lambda: settled(rig, team))
    rig.clean()

    chaos = Chaos(rig, seed=20261121)
    try:
        with chaos:
            for rates, limit in CHANGES:
                before = chaos.kills
                rig.apply(*fleet(team, rates, limit))
                rig.wait("another kill", lambda before=before: chaos.kills > before)  # type: ignore[misc]
        assert rig.wait("the disturbed fleet settles", lambda: settled(rig, team)) == undisturbed
    finally:
        chaos.operator.terminate()


def test_a_standby_takes_over_from_a_killed_leader(rig: Rig, team: str) -> None:
    with rig.operator("first") as first, rig.operator("second") as second:
        rig.apply(*fleet(team, {"chat": 3.0}))
        rig.wait_ready(team, "chat")
        leader, standby = (first, second) if rig.holder() == "first" else (second, first)
        rig.wait("the standby is ready as a standby", lambda: standby.get("/readyz")[0] == 200)
        assert standby.metrics()["llmfleet_operator_leader"] == 0.0

        leader.kill()
        killed_at = time.monotonic()
        rig.apply(*fleet(team, {"chat": 7.0}))

        rig.wait("the standby acts", lambda: rig.replicas(team) == {"chat-slow": 4})
        # Twice the promise: other suites run beside this one. The benchmark's machine is quiet.
        assert time.monotonic() - killed_at < 2 * TAKEOVER_S * patience()
        assert rig.holder() == standby.identity


def test_a_leader_that_is_told_to_end_gives_its_lease_up(rig: Rig, team: str) -> None:
    with rig.operator("first") as first:
        rig.wait("there is a leader", lambda: rig.holder() == "first")
        assert first.terminate() == 0
    assert rig.holder() == ""


def test_a_leader_that_lost_its_lease_ends(rig: Rig, team: str) -> None:
    with rig.operator("first") as first:
        rig.wait("there is a leader", lambda: rig.holder() == "first")
        stolen: Any = {"spec": {"holderIdentity": "somebody-else", "leaseDurationSeconds": 8}}
        rig.cluster.kubectl(
            *("patch", "lease", "llmfleet-operator", "-n", "llmfleet-system", "--type=merge", "-p", json.dumps(stolen))
        )
        rig.wait("it ends", lambda: not first.running)
        assert first.said("no longer leader")


def test_a_crd_is_upgraded_in_place_and_an_object_that_does_not_parse_stops_no_other(rig: Rig, team: str) -> None:
    """The next version's CRD has a field more and accepts more than this operator understands."""
    with rig.operator() as operator:
        rig.apply(*fleet(team, {"chat": 3.0}))
        rig.wait_ready(team, "chat")
        crd = json.loads(rig.cluster.kubectl("get", "crd", "llmservices.llmfleet.io", "-o", "json"))
        spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        spec["shinyNewField"] = {"type": "string"}
        spec["priority"].pop("maximum")
        crd["metadata"] = {"name": crd["metadata"]["name"]}
        crd.pop("status")
        try:
            rig.cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(crd))
            rig.wait("the new field is served", lambda: _accepts(rig, team))

            rig.apply(service(team, "bad", 3.0, priority=5000), service(team, "later", 3.0, shinyNewField="x"))

            rig.wait_ready(team, "later")
            rig.wait("bad says so", lambda: rig.condition(team, "bad", "Planned").get("reason") == "InvalidSpec")
            message = rig.condition(team, "bad", "Planned")["message"]
            assert "priority" in message
            assert "5000" in message
            rig.wait("an Event says so", lambda: "InvalidSpec" in rig.events(team, "bad"))
            assert rig.ready(team, "chat")
            assert operator.running

            rig.apply(service(team, "bad", 3.0, priority=500))
            rig.wait_ready(team, "bad")
        finally:
            rig.clean()
            rig.apply_crds()


def _accepts(rig: Rig, team: str) -> bool:
    """Whether the API server already admits objects by the new schema."""
    rig.apply(service(team, "probe", 0.0, priority=2000, shinyNewField="x"))
    obj = rig.get("LLMService", "probe", team)
    rig.delete("LLMService", "probe", team)
    return obj is not None and obj["spec"].get("shinyNewField") == "x"
