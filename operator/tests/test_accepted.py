"""Whether an object was understood: said in its status, once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from e2e.operator.objects import gpu_type, profile, service
from llmfleet.api import Condition
from llmfleet.operator.accepted import AcceptedReporter
from llmfleet.operator.apply import Applier, RefusedError
from llmfleet.operator.cache import Cache, observe

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Json = dict[str, Any]


class Server:
    """Keeps statuses as the API server would, and can refuse to."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.objects: dict[str, Json] = {}
        self.written: list[tuple[str, str, str]] = []
        self.refuses: set[str] = set()

    def put(self, obj: Json, generation: int = 1) -> None:
        name = obj["metadata"]["name"]
        status = self.objects.get(name, {}).get("status", {})
        self._store({**obj, "status": status, "metadata": {**obj["metadata"], "uid": name, "generation": generation}})

    def _store(self, obj: Json) -> None:
        name = obj["metadata"]["name"]
        version = int(self.objects.get(name, {"metadata": {}})["metadata"].get("resourceVersion", "0")) + 1
        self.objects[name] = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(version)}}
        self.cache.apply(observe(obj["kind"], self.objects[name]))

    async def write_accepted(
        self, kind: str, namespace: str | None, name: str, condition: Condition, last_accepted: str | None
    ) -> None:
        if name in self.refuses:
            raise RefusedError("no")
        self.written.append((name, condition.status, condition.reason))
        status = {"conditions": [condition.to_wire()]} | ({"lastAccepted": last_accepted} if last_accepted else {})
        self._store({**self.objects[name], "status": status})

    def accepted(self, name: str) -> Json:
        (condition,) = self.objects[name]["status"]["conditions"]
        return dict(condition)


class Fleet:
    """A cache, a reporter and what it writes to."""

    def __init__(self) -> None:
        self.cache = Cache()
        self.server = Server(self.cache)
        self.now = NOW
        applier: Applier = self.server  # type: ignore[assignment]
        self.reporter = AcceptedReporter(self.cache, applier, lambda: self.now)
        self.cache.on_change = lambda observation, before: self.reporter.mark(observation.kind, observation.key)

    def restarted(self) -> Fleet:
        """Another process, an hour later, that has only what the API server has."""
        other = Fleet()
        other.now = self.now + timedelta(hours=1)
        other.server.objects = dict(self.server.objects)
        for obj in self.server.objects.values():
            other.cache.apply(observe(obj["kind"], obj))
        return other


def policy(name: str = "default", **spec: Any) -> Json:
    return {"apiVersion": "llmfleet.io/v1alpha1", "kind": "FleetPolicy", "metadata": {"name": name}, "spec": spec}


def power_domain(**spec: Any) -> Json:
    spec = {"gpuTypes": ["l4", "moon"], **spec}
    return {"apiVersion": "llmfleet.io/v1alpha1", "kind": "PowerDomain", "metadata": {"name": "rack"}, "spec": spec}


async def test_each_object_is_told_once_that_it_counts_and_a_service_by_its_own_conditions() -> None:
    fleet = Fleet()
    for obj in (gpu_type("l4", "example.com/l4", 1), profile("team", {"l4": 2.0}), policy(), service("team", "s", 1.0)):
        fleet.server.put(obj)
    for _ in range(3):
        await fleet.reporter.report()
    assert sorted(fleet.server.written) == [(name, "True", "Accepted") for name in ("default", "l4", "tiny")]


async def test_an_object_that_stops_parsing_says_why_and_since_when_and_says_when_it_is_mended() -> None:
    fleet = Fleet()
    fleet.server.put(policy())
    await fleet.reporter.report()
    fleet.now += timedelta(hours=1)
    fleet.server.put(policy(utilizationTarget=7), generation=2)
    for _ in range(3):
        await fleet.reporter.report()
    said = fleet.server.accepted("default")
    assert (said["status"], said["reason"], said["observedGeneration"]) == ("False", "InvalidSpec", 2)
    assert "utilizationTarget" in said["message"]
    assert said["message"].endswith("until it parses generation 1, the last that did, stays in force")
    assert said["lastTransitionTime"] == "2026-01-01T01:00:00Z"

    fleet.now += timedelta(hours=1)
    for generation in (3, 4):
        fleet.server.put(policy(utilizationTarget=0.7), generation)
        await fleet.reporter.report()
    assert [status for _, status, _ in fleet.server.written] == ["True", "False", "True", "True"]
    said = fleet.server.accepted("default")
    assert (said["observedGeneration"], said["lastTransitionTime"]) == (4, "2026-01-01T02:00:00Z")


async def test_a_restarted_operator_says_the_same_without_moving_the_time_or_writing_it_again() -> None:
    fleet = Fleet()
    fleet.server.put(gpu_type("l4", "example.com/l4", 1))
    await fleet.reporter.report()
    fleet.server.put(gpu_type("l4", "example.com/l4", -1), generation=2)
    await fleet.reporter.report()
    before = fleet.server.accepted("l4")
    assert "generation 1, the last that did, stays in force" in before["message"]

    restarted = fleet.restarted()
    await restarted.reporter.report()
    assert restarted.server.accepted("l4") == before
    assert restarted.server.written == []


async def test_where_no_version_ever_parsed_it_is_said_what_is_not_begun() -> None:
    fleet = Fleet()
    domain = power_domain(budgetWatts=-1)
    for obj in (policy(utilizationTarget=7), gpu_type("l4", "example.com/l4", -1), domain):
        fleet.server.put(obj)
    await fleet.reporter.report()
    assert fleet.server.accepted("default")["message"].endswith(
        "plans are shown and not applied: no version that did is known"
    )
    assert fleet.server.accepted("rack")["message"].endswith(
        "services get no more devices of l4, moon than they have: no version that did is known"
    )
    assert fleet.server.accepted("l4")["message"].endswith("and keeps its plan; its devices are nobody's")


async def test_a_version_too_large_to_be_kept_counts_and_says_what_that_means() -> None:
    fleet = Fleet()
    large = profile("team", {f"type-{number}": 1.0 for number in range(64)})
    for measurement in large["spec"]["measurements"]:
        points = measurement["points"]
        measurement["points"] = [point | {"concurrency": 100 + step} for point in points for step in range(8)]
    fleet.server.put(large)
    await fleet.reporter.report()
    told = fleet.server.accepted("tiny")
    assert (told["status"], told["reason"]) == ("True", "TooLargeToKeep")
    assert "more than 524,288 bytes" in told["message"]
    assert "fewer points of spec.measurements" in told["message"]
    assert "lastAccepted" not in fleet.server.objects["tiny"]["status"]

    fleet.server.put(profile("team", {"l4": 1.0}), generation=2)
    await fleet.reporter.report()
    assert fleet.server.accepted("tiny")["reason"] == "Accepted"
    assert fleet.server.objects["tiny"]["status"]["lastAccepted"].startswith('{"generation":2,')


async def test_one_that_is_refused_keeps_no_other_waiting() -> None:
    fleet = Fleet()
    for name in ("a", "b", "c"):
        fleet.server.put(gpu_type(name, f"example.com/{name}", 1))
    fleet.server.refuses = {"a"}
    with pytest.raises(RefusedError):
        await fleet.reporter.report()
    assert [name for name, *_ in fleet.server.written] == ["b", "c"]


async def test_a_policy_of_another_name_says_that_it_has_no_effect() -> None:
    fleet = Fleet()
    fleet.server.put(policy("mine"))
    await fleet.reporter.report()
    assert fleet.server.written == [("mine", "False", "NameIgnored")]


async def test_a_power_domain_names_the_types_that_it_counts_as_nothing_until_they_have_watts() -> None:
    fleet = Fleet()
    domain = power_domain(budgetWatts=4000)
    l4, moon = gpu_type("l4", "example.com/l4", 1), gpu_type("moon", "example.com/moon", 1)
    for obj in (l4, domain):
        fleet.server.put(obj)
    await fleet.reporter.report()
    said = fleet.server.accepted("rack")
    assert (said["status"], said["reason"]) == ("True", "WattsUnknown")
    assert "GPUType l4 has no spec.watts, moon is no GPUType" in said["message"]

    for obj in (l4, moon):
        obj["spec"]["watts"] = {"idle": 10, "peak": 72}
        fleet.server.put(obj, generation=2)
    for _ in range(3):
        await fleet.reporter.report()
    assert fleet.server.accepted("rack")["reason"] == "Accepted"
    assert [name for name, *_ in fleet.server.written].count("rack") == 2


async def test_a_policy_names_the_types_of_its_limits_that_are_none_until_they_exist() -> None:
    fleet = Fleet()
    limits = [{"namespace": "team", "devices": {"l4": 2, "h10o": 1}, "costPerHour": 9}]
    for obj in (gpu_type("l4", "example.com/l4", 1), policy(namespaceLimits=limits)):
        fleet.server.put(obj)
    await fleet.reporter.report()
    said = fleet.server.accepted("default")
    assert (said["status"], said["reason"]) == ("True", "UnknownGPUType")
    assert said["message"].startswith("spec.namespaceLimits[team].devices: h10o is no GPUType: this limits nothing")

    fleet.server.put(gpu_type("h10o", "example.com/h10o", 1))
    for _ in range(3):
        await fleet.reporter.report()
    assert fleet.server.accepted("default")["reason"] == "Accepted"
    assert [name for name, *_ in fleet.server.written].count("default") == 2


async def test_a_change_while_a_verdict_is_written_is_judged_too() -> None:
    fleet = Fleet()
    fleet.server.put(policy())
    write = fleet.server.write_accepted

    async def slow(*accepted: Any) -> None:
        fleet.server.write_accepted = write  # type: ignore[method-assign]
        await write(*accepted)
        fleet.server.put(policy(utilizationTarget=7), generation=2)

    fleet.server.write_accepted = slow  # type: ignore[assignment, method-assign]
    for _ in range(2):
        await fleet.reporter.report()
    assert [status for _, status, _ in fleet.server.written] == ["True", "False"]


async def test_what_could_not_be_written_is_written_later() -> None:
    fleet = Fleet()
    fleet.server.put(policy())
    fleet.server.refuses = {"default"}
    with pytest.raises(RefusedError):
        await fleet.reporter.report()
    fleet.server.refuses = set()
    await fleet.reporter.report()
    assert fleet.server.written == [("default", "True", "Accepted")]


async def test_a_pool_that_cannot_take_over_what_its_hardware_has_says_so_and_no_more_once_it_can() -> None:
    fleet = Fleet()
    fleet.server.put(gpu_type("b200-spot", "example.com/b200", 1, sameHardwareAs="b200"))
    await fleet.reporter.report()
    assert "b200 is no GPUType" in fleet.server.accepted("b200-spot")["message"]
    fleet.server.put(gpu_type("b200", "example.com/b200", 1, memoryGib=999))
    await fleet.reporter.report()
    assert fleet.server.accepted("b200-spot")["reason"] == "OtherHardware"
    assert "which has memoryGib 999" in fleet.server.accepted("b200-spot")["message"]
    memory_gib = fleet.cache.gpu_types["b200-spot"].spec.memory_gib
    fleet.server.put(gpu_type("b200", "example.com/b200", 1, memoryGib=memory_gib), generation=2)
    await fleet.reporter.report()
    assert fleet.server.accepted("b200-spot")["reason"] == "Accepted"
