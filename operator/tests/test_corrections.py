"""What engines were seen to do is learnt step by step; the profile's status is the only memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from e2e.operator.objects import gpu_type, profile, service
from llmfleet.api import Buckets, Condition, Correction, Learnt, ModelProfile, ObservedCell, ObservedVariant
from llmfleet.operator.apply import Applier, FencedError, ObjectRef, RefusedError
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.corrections import CONDITION_UP_TO_DATE, CorrectionKeeper, up_to_date
from llmfleet.operator.metrics import Metrics
from llmfleet.operator.observations import EngineObserver
from llmfleet.operator.planner import PlannerError
from llmfleet.operator.planner_protocol import Learn, Put
from llmfleet.operator.planner_worker import Planner

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TPOT_MS = 10.0
Json = dict[str, Any]


class Cluster:
    """The API server's objects, the cache, the planner process's own part, and who learns."""

    def __init__(self, *profiles: str) -> None:
        self.cache = Cache()
        self.planner = Planner()
        self.observer = EngineObserver()
        self.now = NOW
        self.version = 0
        self.objects: dict[str, Json] = {}
        self.written: list[str] = []
        self.events: list[tuple[str, str, str]] = []
        self.refuses: set[str] = set()
        self.leading = self.planning = True
        applier: Applier = self  # type: ignore[assignment]
        self.keeper = CorrectionKeeper(self.cache, self.observer, self, applier, lambda: self.now)
        self.store(gpu_type("slow", "example.com/slow", 1.0))
        for name in profiles:
            self.store(profile("team", {"slow": 2.5}, name))
            self.store(service("team", f"uses-{name}", 1.0, profile_name=name))

    def store(self, obj: Json) -> None:
        self.version += 1
        name = obj["metadata"]["name"]
        meta = {**obj["metadata"], "uid": name, "generation": 1, "resourceVersion": str(self.version)}
        self.objects[name] = {**obj, "metadata": meta}
        self.cache.apply(observe(obj["kind"], self.objects[name]))
        key = f"team/{name}" if "namespace" in meta else name
        self.planner.put(Put(kind=obj["kind"], key=key, object=self.objects[name]))

    async def learn(
        self, observed: Sequence[ObservedVariant], corrections: Mapping[str, Sequence[Correction]], at: float
    ) -> list[Learnt]:
        if not self.planning:
            raise PlannerError("no planner")
        message = Learn(observed=list(observed), corrections={k: list(c) for k, c in corrections.items()}, at=at)
        return self.planner.learn(Learn.model_validate_json(message.model_dump_json())).profiles

    async def write_profile_status(
        self, namespace: str, name: str, corrections: Sequence[Correction], condition: Condition | None
    ) -> None:
        if not self.leading:
            raise FencedError("no lease")
        if name in self.refuses:
            raise RefusedError("no")
        self.written.append(name)
        wire = [one.to_wire() for one in corrections]
        conditions = [] if condition is None else [condition.to_wire()]
        self.store({**self.objects[name], "status": {"corrections": wire, "conditions": conditions}})

    def emit(self, ref: ObjectRef, type_: str, reason: str, message: str) -> None:
        self.events.append((f"{ref.kind} {ref.name}", reason, message))

    def profile(self, name: str = "tiny") -> ModelProfile:
        return self.cache.profiles[f"team/{name}"]

    def see(self, factor: float, name: str = "tiny", *, variant: str = "slow", requests: int = 300) -> None:
        """Requests of the smallest bucket, with 2 in flight, on engines so many times as slow as measured."""
        cell = ObservedCell(0, requests, 2.0, 128 * requests, 30.0 * requests, 50 * requests, 0.0)
        cell = cell._replace(decode_ms=cell.decoded_tokens * TPOT_MS * factor)
        edges: Buckets = self.profile(name).spec.buckets
        self.observer.give_back(
            [ObservedVariant(service=f"team/uses-{name}", variant=variant, buckets=edges, cells=[cell])]
        )

    async def step(self) -> None:
        self.now += timedelta(minutes=15)
        await self.keeper.step()

    def condition(self, name: str = "tiny") -> str:
        [found] = [one for one in self.profile(name).status.conditions if one.type == CONDITION_UP_TO_DATE]
        return f"{found.status} {found.reason}"


class Watched:
    """What metrics are read from: a replica that knows the profiles of a cluster."""

    leading, queue_depth, planning, newest_plan = True, 0, None, None

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def services(self) -> Any:
        return iter(())

    def profiles(self) -> Any:
        return iter(self.cluster.cache.profiles.values())


async def test_a_metric_shows_how_far_engines_are_off_for_a_day() -> None:
    cluster = Cluster("tiny")
    metrics = Metrics(Watched(cluster), lambda: cluster.now)
    cluster.see(2.0)
    await cluster.step()
    labels = {"namespace": "team", "profile": "tiny", "gpu_type": "slow", "tensor_parallel": "1"}
    labels |= {"pipeline_parallel": "1", "configuration": "default"}

    def shown(metric: str) -> float | None:
        return metrics.registry.get_sample_value("llmfleet_profile_observed_latency_ratio", labels | {"metric": metric})

    assert shown("tpot") == pytest.approx(2.0)
    assert shown("ttft") is None
    cluster.now += timedelta(days=1, minutes=1)
    assert shown("tpot") is None


async def test_what_was_seen_is_in_the_status_and_is_learnt_once() -> None:
    cluster = Cluster("tiny")
    cluster.see(1.1)
    await cluster.step()
    [correction] = cluster.profile().status.corrections
    assert (correction.gpu_type, round(correction.tpot[0].log_ratio, 3)) == ("slow", 0.095)
    assert cluster.condition() == "True EnginesAsMeasured"
    await cluster.step()
    assert cluster.written == ["tiny"]
    assert cluster.events == []


async def test_another_operator_goes_on_where_this_one_was() -> None:
    cluster = Cluster("tiny")
    cluster.see(1.2)
    await cluster.step()
    successor = Cluster()
    successor.now = cluster.now
    for obj in cluster.objects.values():
        successor.store(obj)
    for one in (cluster, successor):
        one.see(1.3)
        await one.step()
    assert successor.profile().status == cluster.profile().status
    assert cluster.profile().status.corrections[0].tpot[0].weight > 300


async def test_an_outdated_profile_says_so_once_and_until_its_engines_are_near_what_was_measured() -> None:
    cluster = Cluster("tiny")
    said = []
    for factor in (1.2, *[1.6] * 4, *[1.15] * 8, *[1.0] * 8):
        cluster.see(factor)
        await cluster.step()
        said.append(cluster.condition())
    changes = [now for before, now in zip(["", *said], said, strict=False) if now != before]
    assert changes == ["True EnginesAsMeasured", "False ProfileOutdated", "True EnginesAsMeasured"]
    assert said[12] == "False ProfileOutdated", "1.15 is nearer than 1.25, but not near"
    [(about, reason, message)] = cluster.events
    assert (about, reason) == ("ModelProfile tiny", "ProfileOutdated")
    assert "slow tp1 pp1, configuration default: TPOT is 1.25 times what was measured, around 2 requests" in message
    [condition] = cluster.profile().status.conditions
    assert condition.last_transition_time > NOW + timedelta(minutes=90)


async def test_few_requests_or_old_ones_make_no_profile_outdated() -> None:
    cluster = Cluster("tiny")
    cluster.see(2.0, requests=20)
    await cluster.step()
    assert cluster.profile().status.corrections
    assert cluster.profile().status.conditions == []
    cluster.see(2.0)
    await cluster.step()
    found = cluster.profile()
    assert up_to_date(found, found.status.corrections, cluster.now) is not None
    assert up_to_date(found, found.status.corrections, cluster.now + timedelta(days=2)) is None


async def test_what_cannot_be_is_said_in_an_event_and_forgotten() -> None:
    cluster = Cluster("tiny")
    cluster.see(1.0, variant="b200")
    cluster.see(0.1)
    await cluster.step()
    assert [reason for _, reason, _ in cluster.events] == ["ObservationDropped"] * 2
    assert "not learnt from: what was seen of variant b200 of LLMService team/uses-tiny" in cluster.events[0][2]
    assert "more than 4 times as fast" in cluster.events[1][2]
    assert cluster.written == []
    await cluster.step()
    assert len(cluster.events) == 2


async def test_a_profile_whose_status_is_refused_keeps_no_other_from_learning_and_learns_later() -> None:
    cluster = Cluster("bad", "tiny")
    cluster.refuses = {"bad"}
    cluster.see(1.2, "bad")
    cluster.see(1.2, "tiny")
    await cluster.step()
    assert cluster.written == ["tiny"]
    cluster.refuses = set()
    await cluster.step()
    assert cluster.written == ["tiny", "bad"]


@pytest.mark.parametrize("lost", ["leading", "planning"])
async def test_without_lease_or_planner_nothing_that_was_seen_is_lost(lost: str) -> None:
    cluster = Cluster("one", "two")
    setattr(cluster, lost, False)
    for name in ("one", "two"):
        cluster.see(1.2, name)
    with pytest.raises((FencedError, PlannerError)):
        await cluster.step()
    setattr(cluster, lost, True)
    await cluster.step()
    assert cluster.written == ["one", "two"]
