"""A version that parsed goes on to count when a later one does not, whichever process looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.operator.objects import gpu_type, policy, profile
from llmfleet.api import FleetPolicy, GPUType, ModelProfile, PowerDomain
from llmfleet.operator import last_good
from llmfleet.operator.accepted import verdict
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.invalid import Bound, InvalidObject
from llmfleet.operator.last_good import recall, remember
from llmfleet.operator.parse import EPOCH

Json = dict[str, Any]


def power_domain(watts: float) -> Json:
    spec = {"gpuTypes": ["l4"], "budgetWatts": watts}
    return {"apiVersion": "llmfleet.io/v1alpha1", "kind": "PowerDomain", "metadata": {"name": "rack"}, "spec": spec}


OF_KIND = {
    FleetPolicy.KIND: lambda number: policy(replanIntervalSeconds=number),
    GPUType.KIND: lambda number: gpu_type("l4", "example.com/l4", number),
    ModelProfile.KIND: lambda number: profile("team", {"l4": number}),
    PowerDomain.KIND: power_domain,
}
"""By kind an object that tells its versions apart by a number; of -1 it does not parse."""
MODELS: dict[str, type[Bound]] = {model.KIND: model for model in (FleetPolicy, GPUType, ModelProfile, PowerDomain)}


class Server:
    """One object as the API server has it, and the operator that acts."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.object: Json | None = None
        self.cache = Cache()

    def write(self, number: int, generation: int) -> None:
        before = self.object or {"metadata": {"resourceVersion": "0"}}
        made = OF_KIND[self.kind](number)
        version = str(int(before["metadata"]["resourceVersion"]) + 1)
        meta = {**made["metadata"], "uid": "u", "generation": generation, "resourceVersion": version}
        self.object = {**made, "metadata": meta, "status": before.get("status", {})}
        self.cache.apply(observe(self.kind, self.object))

    def report(self) -> None:
        """What the operator writes into the status soon after it has seen a version."""
        assert self.object is not None
        value = self.cache.find(self.kind, self.key)
        assert isinstance(value, Bound | InvalidObject)
        found = verdict(value, {}, EPOCH)
        if found is None:
            return
        kept = {"lastAccepted": found.last_accepted} if found.last_accepted else {}
        status = {"conditions": [found.condition.to_wire()], **kept}
        version = str(int(self.object["metadata"]["resourceVersion"]) + 1)
        self.object = {
            **self.object,
            "status": status,
            "metadata": {**self.object["metadata"], "resourceVersion": version},
        }
        self.cache.apply(observe(self.kind, self.object))

    def restart(self) -> None:
        self.cache = Cache()
        if self.object is not None:
            self.cache.apply(observe(self.kind, self.object))

    @property
    def key(self) -> str:
        assert self.object is not None
        meta = self.object["metadata"]
        return f"{meta['namespace']}/{meta['name']}" if "namespace" in meta else str(meta["name"])

    def in_force(self) -> Any:
        """The spec that counts; None where none does."""
        value = self.cache.find(self.kind, self.key)
        bound = value.in_force if isinstance(value, InvalidObject) else value
        return bound.spec if isinstance(bound, Bound) else None


@pytest.mark.parametrize("kind", sorted(OF_KIND))
@given(numbers=st.lists(st.sampled_from([-1, 1, 2, 3]), min_size=1, max_size=6), restarts=st.sets(st.integers(0, 5)))
def test_whenever_it_restarts_the_version_in_force_is_that_of_an_operator_that_never_did(
    kind: str, numbers: Sequence[int], restarts: set[int]
) -> None:
    always, restarted = Server(kind), Server(kind)
    for at, number in enumerate(numbers):
        for server in (always, restarted):
            server.write(number, generation=at + 1)
            server.report()
        if at in restarts:
            restarted.restart()
        good = [one for one in numbers[: at + 1] if one != -1]
        expected = MODELS[kind].parse(OF_KIND[kind](good[-1])).spec if good else None
        assert restarted.in_force() == always.in_force() == expected


@pytest.mark.parametrize("kind", sorted(OF_KIND))
def test_what_is_broken_while_no_operator_runs_finds_its_last_version(kind: str) -> None:
    server = Server(kind)
    server.write(2, generation=1)
    server.report()
    server.cache = Cache()
    server.write(-1, generation=2)
    assert server.in_force() == MODELS[kind].parse(OF_KIND[kind](2)).spec
    value = server.cache.find(kind, server.key)
    assert isinstance(value, InvalidObject)
    assert "generation 1, the last that did, stays in force" in value.message


def test_a_version_that_was_not_written_yet_goes_before_an_older_one_that_was() -> None:
    server = Server(PowerDomain.KIND)
    server.write(1, generation=1)
    server.report()
    server.write(2, generation=2)
    server.write(-1, generation=3)
    assert server.in_force().budget_watts == 2
    server.report()
    server.restart()
    assert server.in_force().budget_watts == 2


def test_a_version_of_another_operator_that_this_one_does_not_understand_is_left_for_it() -> None:
    server = Server(PowerDomain.KIND)
    server.write(-1, generation=3)
    assert server.object is not None
    newer = '{"generation":2,"spec":{"budgetMegawatts":1}}'
    server.object["status"] = {"lastAccepted": newer}
    server.restart()
    assert server.in_force() is None
    server.report()
    assert server.object["status"]["lastAccepted"] == newer


@pytest.mark.parametrize("stored", ["", "null", "[]", "{}", '{"generation":1}', '{"generation":1,"spec":{}}', 7])
def test_what_cannot_be_read_back_is_no_version(stored: Any) -> None:
    assert recall(PowerDomain, power_domain(1) | {"status": {"lastAccepted": stored}}) is None


def test_an_object_that_is_being_deleted_binds_no_more() -> None:
    server = Server(PowerDomain.KIND)
    server.write(1, generation=1)
    server.report()
    server.write(-1, generation=2)
    assert server.object is not None
    server.object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    server.restart()
    assert server.in_force() is None


def test_a_spec_that_would_not_fit_beside_itself_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rack = PowerDomain.parse(power_domain(4000))
    kept = remember(rack, None)
    assert kept is not None
    monkeypatch.setattr(last_good, "LARGEST_BYTES", len(kept) - 30)
    assert remember(rack, None) is None
    assert remember(rack, kept) == kept
