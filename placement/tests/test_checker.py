"""The independent check: sound plans pass it, and every way of breaking one is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfleet.api import Plan
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.violation import Violation
from placement_testing.fleets import fleet, gpu_type, rates_profile, service, small_fleets

pure = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])

Edit = Callable[[Plan], Plan]
"""Breaks a plan; nothing is validated on the way."""


@pure
@given(small_fleets(), small_fleets())
def test_every_plan_passes(inputs: PlanInputs, later: PlanInputs) -> None:
    first, warm = plan(inputs, None)
    assert violations(inputs, first) == []
    dear = later.policy.model_copy(update={"switching_cost_fraction": 0.5})
    for following in (later, later.model_copy(update={"policy": dear})):
        second, _ = plan(following, first, warm)
        assert violations(following, second, first) == []


@pure
@given(small_fleets(), st.data())
def test_a_plan_of_a_service_that_cannot_be_planned_any_more_passes_only_untouched(
    inputs: PlanInputs, data: st.DataObject
) -> None:
    first, _ = plan(inputs, None)
    if not first.services:
        return
    lost = data.draw(st.sampled_from([one.key for one in first.services]))
    later = inputs.model_copy(update={"services": [s for s in inputs.services if s.key != lost], "unreadable": [lost]})
    second, _ = plan(later, first)
    assert violations(later, second, first) == []
    dropped = second.model_copy(update={"kept": []})
    assert named(violations(later, dropped, first)) == {("kept", lost)}
    (part,) = second.kept
    touched = second.model_copy(update={"kept": [part.model_copy(update={"cost_per_hour": -1.0})]})
    assert named(violations(later, touched, first)) == {("kept", lost)}
    assert ("kept", lost) in named(violations(inputs, first.model_copy(update={"kept": [part]}), first))


def named(found: list[Violation]) -> set[tuple[str, str]]:
    return {(violation.constraint, violation.where) for violation in found}


def two_types() -> PlanInputs:
    """`chat` is served by one big and one small, with one of five small devices to spare."""
    return fleet(
        [
            service("chat", profile="chat", gpuTypes=["small", "big"], replicas={"min": 1, "max": 3}),
            service("other", profile="other", replicas={"min": 1}),
        ],
        [
            rates_profile({"small": [4.0, 0.0], "big": [9.0, 3.0], "tiny": [1.0, 1.0]}, name="chat"),
            rates_profile({"small": [1.0, 1.0]}, name="other"),
        ],
        [gpu_type("small", 1.0, watts={"idle": 50, "peak": 300}), gpu_type("big", 3.0), gpu_type("tiny", 0.1)],
        inventory={"small": 5, "big": 2, "tiny": 5},
        demand={"chat": [3.5, 3.0], "other": [1.0, 2.0]},
        optimality_gap=0.01,
        utilization_target=1.0,
    )


def changed(whole: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    step, *rest = path
    if isinstance(whole, list):
        part = whole[int(step)]
        return [changed(part, rest, value) if part is each else each for each in whole]
    return whole.model_copy(update={step: changed(getattr(whole, step), rest, value)})


def change(where: str, value: Any) -> Edit:
    """Sets a value, for example `services.0.variants.1.replicas`."""
    return lambda sound: changed(sound, where.split("."), value)


def replicas(service_index: int, variant_index: int, count: int) -> Edit:
    """More or fewer replicas, with all costs as they should then be."""

    def edit(sound: Plan) -> Plan:
        path = ["services", str(service_index)]
        part = sound.services[service_index]
        one = part.variants[variant_index]
        more = count - one.replicas
        cost, watts = more * one.cost_per_replica_hour, more * (one.watts_per_replica or 0.0)
        broken: Plan = changed(sound, [*path, "variants", str(variant_index), "replicas"], count)
        broken = changed(broken, [*path, "cost_per_hour"], part.cost_per_hour + cost)
        return broken.model_copy(
            update={"cost_per_hour": sound.cost_per_hour + cost, "watts": (sound.watts or 0.0) + watts}
        )

    return edit


def remove_route(sound: Plan) -> Plan:
    broken: Plan = changed(sound, ["services", "0", "routes"], sound.services[0].routes[1:])
    return broken


def repeat_service(sound: Plan) -> Plan:
    return sound.model_copy(update={"services": [*sound.services, sound.services[0]]})


def forget_service(sound: Plan) -> Plan:
    return sound.model_copy(update={"services": sound.services[:1]})


BROKEN: list[tuple[Edit, set[tuple[str, str]]]] = [
    (replicas(0, 1, 3), {("replicas_max", "team/chat"), ("devices", "GPUType small")}),
    (replicas(1, 0, 5), {("devices", "GPUType small")}),
    (replicas(1, 0, 0), {("replicas_min", "team/other"), ("route", "team/other bucket 0 to small")}),
    (replicas(1, 0, 2), {("load", "team/other small")}),
    (change("services.0.variants.0.gpu_type", "tiny"), {("variant", "team/chat big")}),
    (change("services.0.variants.0.gpu_type", "none"), {("variant", "team/chat big")}),
    (change("services.0.variants.0.tensor_parallel", 2), {("variant", "team/chat big")}),
    (change("services.0.variants.0.cost_per_replica_hour", 2.0), {("cost", "team/chat big")}),
    (change("services.0.cost_per_hour", 1.0), {("cost", "team/chat"), ("cost", "fleet")}),
    (change("cost_per_hour", float("nan")), {("cost", "fleet")}),
    (change("watts", 1.0), {("watts", "fleet")}),
    (change("watts", None), {("watts", "fleet")}),
    (remove_route, {("unserved", "team/chat")}),
    (change("services.0.routes.0.fraction", 0.5), {("unserved", "team/chat")}),
    (change("services.0.routes.1.variant", "small"), {("route", "team/chat bucket 1 to small")}),
    (change("services.0.routes.0.bucket", 7), {("route", "team/chat bucket 7")}),
    (change("services.0.routes.0.bucket", 1), {("shares", "team/chat bucket 1")}),
    (change("services.0.routes.0.variant", "tiny"), {("route", "team/chat bucket 0 to tiny")}),
    (change("services.0.unserved_rps", 1.0), {("unserved", "team/chat"), ("status", "fleet")}),
    (change("services.0.demand.0", 9.0), {("demand", "team/chat bucket 0")}),
    (change("services.0.demand", [3.5]), {("buckets", "team/chat")}),
    (change("services.0.variants.0.predicted", None), {("predicted", "team/chat big")}),
    (change("services.0.variants.0.predicted.ttft_ms", 1.0), {("predicted", "team/chat big")}),
    (change("services.0.variants.0.predicted.tpot_attainment", 0.5), {("predicted", "team/chat big")}),
    (change("services.0.variants.0.predicted.source", "prior"), {("predicted", "team/chat big")}),
    (change("gap_cost", 0.2), {("status", "fleet")}),
    (change("gap_cost", -0.1), {("gap", "fleet")}),
    (change("gap_cost", float("nan")), {("gap", "fleet"), ("status", "fleet")}),
    (change("gap_unserved", 1.5), {("gap", "fleet")}),
    (change("gap_unserved", float("nan")), {("gap", "fleet")}),
    (change("bound", 7.5), {("bound", "fleet")}),
    (change("bound", 6.5), {("bound", "fleet")}),
    (change("bound", float("nan")), {("bound", "fleet")}),
    (change("bound", None), {("bound", "fleet")}),
    (change("status", "partial"), {("status", "fleet")}),
    (repeat_service, {("coverage", "team/chat")}),
    (forget_service, {("coverage", "team/other")}),
    (change("services.0.service", "stranger"), {("coverage", "team/chat"), ("coverage", "team/stranger")}),
]


@pytest.mark.parametrize(("edit", "expected"), BROKEN)
def test_each_broken_constraint_is_named(edit: Edit, expected: set[tuple[str, str]]) -> None:
    inputs = two_types()
    sound, _ = plan(inputs, None)
    assert [one.replicas for one in sound.services] == [{"big": 1, "small": 1}, {"small": 3}]
    assert violations(inputs, sound) == []
    assert named(violations(inputs, edit(sound))) >= expected


def test_a_violation_says_what_where_how_much_and_what_is_allowed() -> None:
    inputs = two_types()
    decided, _ = plan(inputs, None)
    poorer = inputs.model_copy(update={"inventory": {**inputs.inventory, "small": 2}})
    (violation,) = violations(poorer, decided)
    assert str(violation) == "devices of GPUType small: 4, allowed is at most 2 beside 0 kept"
