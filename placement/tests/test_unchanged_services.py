"""What is taken over from the last plan for services that did not change says the same as if it were made anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmfleet.api import Plan
from llmfleet.placement import Demand, PlanInputs, WarmState, plan
from llmfleet.placement.checks import Catalogue
from llmfleet.placement.preparations import Preparations
from placement_testing.fleets import fleet, gpu_type, rates_profile, service, small_fleets

Edit = Callable[[PlanInputs], PlanInputs]
_SETTLED = 5
"""Plans after which lines rise no more where nothing changes."""


def read_anew(inputs: PlanInputs) -> PlanInputs:
    """Equal objects, none of them the same."""
    return PlanInputs.model_validate(inputs.model_dump())


def with_rate(inputs: PlanInputs, factor: float) -> PlanInputs:
    key = inputs.services[0].key
    demand = inputs.demand.get(key, Demand(rps=[1.0] * inputs.profiles[0].spec.buckets.count))
    return inputs.model_copy(
        update={"demand": {**inputs.demand, key: Demand(rps=[factor * rate for rate in demand.rps])}}
    )


def with_price(inputs: PlanInputs, factor: float) -> PlanInputs:
    first, *others = inputs.gpu_types
    price = {"onDemand": factor * first.spec.device_price_per_hour}
    spec = {**first.spec.model_dump(by_alias=True, exclude_none=True), "pricePerHour": price}
    return inputs.model_copy(update={"gpu_types": [gpu_type_with(first, spec), *others]})


def gpu_type_with(one: Any, spec: dict[str, Any]) -> Any:
    return type(one).parse({"metadata": {"name": one.metadata.name}, "spec": spec}, strict=True)


def with_inventory(inputs: PlanInputs, more: int) -> PlanInputs:
    name = inputs.gpu_types[0].metadata.name
    found = max(0, inputs.inventory.get(name, 0) + more)
    return inputs.model_copy(update={"inventory": {**inputs.inventory, name: found}})


def with_objective(inputs: PlanInputs, milliseconds: float) -> PlanInputs:
    first, *others = inputs.services
    spec = {**first.spec.model_dump(by_alias=True, exclude_none=True)}
    spec["objective"] = {"ttft": {"milliseconds": milliseconds}, "tpot": {"milliseconds": 50}}
    changed = type(first).parse({"metadata": {"name": first.metadata.name, "namespace": "team"}, "spec": spec})
    return inputs.model_copy(update={"services": [changed, *others]})


def with_speed(inputs: PlanInputs, factor: float) -> PlanInputs:
    first, *others = inputs.profiles
    spec = first.spec.model_dump(by_alias=True, exclude_none=True)
    for measured in spec["measurements"]:
        for point in measured["points"]:
            point["requestsPerSecond"] *= factor
    changed = type(first).parse({"metadata": {"name": first.metadata.name, "namespace": "team"}, "spec": spec})
    return inputs.model_copy(update={"profiles": [changed, *others]})


def with_policy(inputs: PlanInputs, **update: Any) -> PlanInputs:
    return inputs.model_copy(update={"policy": inputs.policy.model_copy(update=update)})


def chain(inputs: PlanInputs, edits: list[Edit], *, forget: bool) -> list[dict[str, Any]]:
    """Plans one after the other; `forget`: everything is made anew, but for what the solver knows."""
    decided: Plan | None = None
    warm: WarmState | None = None
    found = []
    for edit in [*[read_anew] * _SETTLED, *edits]:
        inputs = edit(inputs)
        if warm is not None and forget:
            warm = replace(warm, made={}, settled={}, written={})
        decided, warm = plan(inputs, decided, warm)
        found.append(decided.model_dump(exclude={"solve_seconds"}))
    return found


EDITS: dict[str, Edit] = {
    "nothing": lambda inputs: inputs,
    "read anew": read_anew,
    "rate": lambda inputs: with_rate(inputs, 1.3),
    "price": lambda inputs: with_price(inputs, 3.0),
    "fewer devices": lambda inputs: with_inventory(inputs, -1),
    "more devices": lambda inputs: with_inventory(inputs, 2),
    "objective": lambda inputs: with_objective(inputs, 50.0),
    "profile": lambda inputs: with_speed(inputs, 0.7),
    "budget": lambda inputs: with_policy(inputs, budget_per_hour=4.0),
    "price of change": lambda inputs: with_policy(inputs, switching_cost_fraction=0.3),
    "service gone": lambda inputs: inputs.model_copy(update={"services": inputs.services[1:] or inputs.services}),
    "steps": lambda inputs: with_policy(inputs, max_starts_per_plan=1),
}


@settings(
    deadline=None,
    max_examples=5,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(small_fleets(optimality_gap=0.01), st.lists(st.sampled_from(sorted(EDITS)), min_size=1, max_size=3))
def test_whatever_changes_the_plan_is_what_it_is_with_all_services_made_anew(
    inputs: PlanInputs, names: list[str]
) -> None:
    edits = [EDITS[name] for name in names]
    assert chain(inputs, edits, forget=False) == chain(inputs, edits, forget=True)


def two_services() -> PlanInputs:
    return fleet(
        [service("a"), service("b")],
        [rates_profile({"small": [4.0, 2.0], "big": [9.0, 5.0]})],
        [gpu_type("small", 1.0), gpu_type("big", 2.5)],
        inventory={"small": 4, "big": 6},
        demand={"a": [3.0, 1.0], "b": [6.0, 4.0]},
    )


@pytest.mark.parametrize("name", [name for name in EDITS if name not in ("nothing", "read anew")])
def test_what_changes_is_seen_in_the_plan(name: str) -> None:
    settled = chain(two_services(), [], forget=False)[-1]
    edits = [EDITS[name], read_anew, read_anew]
    found = chain(two_services(), edits, forget=False)
    assert found == chain(two_services(), edits, forget=True)
    after = found[_SETTLED]
    if name not in ("price of change", "more devices", "steps"):
        assert after["services"] != settled["services"]


def test_services_of_which_nothing_changed_are_the_objects_of_the_last_plan() -> None:
    inputs = two_services()
    decided: Plan | None = None
    warm: WarmState | None = None
    for _ in range(_SETTLED):
        decided, warm = plan(read_anew(inputs), decided, warm)
    assert decided is not None
    again, _ = plan(with_rate(read_anew(inputs), 1.01), decided, warm)
    assert again.service("team/b") is decided.service("team/b")
    assert again.service("team/a") is not decided.service("team/a")


def test_a_settled_service_is_planned_anew_when_the_policy_asks_for_another_utilisation() -> None:
    inputs = with_policy(two_services(), utilization_target=0.5)
    whole = with_policy(inputs, utilization_target=1.0)
    assert (
        chain(inputs, [lambda _: whole], forget=False)[-1]["cost_per_hour"]
        < chain(inputs, [], forget=False)[-1]["cost_per_hour"]
    )


def test_a_service_is_prepared_again_only_where_something_it_was_prepared_from_changed() -> None:
    inputs = two_services()

    def prepared(now: PlanInputs, last: Preparations | None) -> tuple[Preparations, list[object]]:
        found = Preparations(now, Catalogue(now), {} if last is None else last.made)
        return found, [found.of(one) for one in now.services]

    first, before = prepared(inputs, None)
    again, after = prepared(read_anew(inputs), first)
    assert all(new is old for new, old in zip(after, before, strict=True))
    changed = prepared(with_rate(inputs, 2.0), again)[1]
    assert [new is old for new, old in zip(changed, before, strict=True)] == [False, True]
    for edit in ("price", "fewer devices", "profile"):
        assert not any(new is old for new, old in zip(prepared(EDITS[edit](inputs), again)[1], before, strict=True))
