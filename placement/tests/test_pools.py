"""Pools of the same hardware: measured once, planned each with its own price and inventory."""

from __future__ import annotations

from typing import Any

import pytest

from llmfleet.api import GPUType
from llmfleet.api.gputype import objection
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.performance.hardware import figures_of
from placement_testing.fleets import fleet, gpu_type, rates_profile, replicas, service

HARDWARE = {"memoryBandwidthGbPerSecond": 3350, "denseTflops": 989}


def pool(name: str, price: float, **spec: Any) -> GPUType:
    return gpu_type(name, price, **{"sameHardwareAs": "h100", **spec})


def pools(*types: GPUType, inventory: dict[str, int], **spec: Any) -> PlanInputs:
    """One service that two replicas serve, measured on h100 only."""
    measured = rates_profile({"h100": [2.0, 2.0]})
    return fleet([service(**spec)], [measured], types, inventory=inventory, demand={"s": [4.0, 0.0]})


def test_a_pool_is_planned_by_what_was_measured_on_its_hardware_at_its_own_price() -> None:
    inputs = pools(gpu_type("h100", 5.0), pool("h100-b", 3.0), inventory={"h100": 8, "h100-b": 1})
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"h100": 1, "h100-b": 1}
    assert decided.cost_per_hour == pytest.approx(8.0)
    assert violations(inputs, decided) == []
    assert {route.variant for route in decided.services[0].routes} == {"h100", "h100-b"}


def test_a_type_says_where_its_hardware_was_measured_even_after_that_type_is_gone() -> None:
    inputs = pools(pool("h100-b", 3.0), inventory={"h100-b": 8})
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"h100-b": 2}


def test_what_a_pool_measured_itself_goes_before_what_it_takes_over() -> None:
    measured = rates_profile({"h100": [2.0, 2.0], "h100-b": [4.0, 4.0]})
    types = [gpu_type("h100", 5.0), pool("h100-b", 3.0)]
    inputs = fleet([service()], [measured], types, inventory={"h100": 8, "h100-b": 8}, demand={"s": [4.0, 0.0]})
    assert replicas(plan(inputs, None)[0], "s") == {"h100-b": 1}


def test_figures_and_power_are_those_of_the_hardware_unless_the_pool_says_otherwise() -> None:
    watts = {"idle": 70, "peak": 700}
    first = gpu_type("h100", 5.0, hardware=HARDWARE, watts=watts)
    capped = pool("h100-c", 3.0, watts={"idle": 70, "peak": 400})
    inputs = pools(first, pool("h100-b", 3.0), capped, inventory={})
    _, taken, own = inputs.gpu_types
    assert taken.spec.hardware == first.spec.hardware == own.spec.hardware
    assert taken.spec.watts == first.spec.watts
    assert own.spec.watts is not None
    assert own.spec.watts.peak == 400
    assert figures_of(pool("cheap", 3.0)) == figures_of(gpu_type("h100", 5.0))


def test_taking_over_once_more_changes_nothing() -> None:
    inputs = pools(gpu_type("h100", 5.0), pool("h100-b", 3.0), inventory={})
    assert PlanInputs.model_validate(inputs.model_dump()) == inputs


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (pool("h100-b", 3.0, memory_gib=94), "which has memoryGib 80, and this type has 94"),
        (pool("h100-b", 3.0, sameHardwareAs="h100-c"), "itself a pool of h100: name the type that was measured"),
        (pool("h100-b", 3.0, sameHardwareAs="h100-b"), "the type itself"),
    ],
)
def test_nothing_is_taken_over_from_what_is_not_the_same_and_the_others_go_on(wrong: GPUType, said: str) -> None:
    types = {one.metadata.name: one for one in (gpu_type("h100", 5.0), pool("h100-c", 4.0), wrong)}
    assert said in str(objection(wrong, types))
    inputs = pools(*types.values(), inventory={"h100": 8, "h100-b": 8, "h100-c": 1})
    assert replicas(plan(inputs, None)[0], "s") == {"h100": 1, "h100-c": 1}
    assert all(objection(one, types) is None for one in types.values() if one is not wrong)


def test_a_service_that_may_only_use_such_a_pool_is_told_why_it_cannot() -> None:
    wrong = pool("h100-b", 3.0, memory_gib=94)
    inputs = pools(gpu_type("h100", 5.0), wrong, inventory={"h100": 8, "h100-b": 8}, gpuTypes=["h100-b", "h100"])
    (planned,) = plan(inputs, None)[0].services
    assert any("nor does it take one over: spec.sameHardwareAs is h100" in warning for warning in planned.warnings)
