"""The way to the next plan: what leaves before its successor serves is said, and only that."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Buckets, LatencyCoefficients, PlannedVariant, ServicePlan
from llmfleet.placement import plan
from llmfleet.placement.transition import without_room
from placement_testing.fleets import fleet, gpu_type, rates_profile, service

DEGREE = {"l4": 1, "h100": 1, "h100-tp2": 2}


def service_plan(name: str, replicas: dict[str, int]) -> ServicePlan:
    variants = [
        PlannedVariant(
            name=variant,
            gpu_type=variant.partition("-")[0],
            tensor_parallel=DEGREE[variant],
            replicas=count,
            cost_per_replica_hour=1,
            latency=LatencyCoefficients(
                ttft_base_ms=1, ttft_ms_per_input_token=0, tpot_base_ms=1, tpot_ms_per_running=0
            ),
        )
        for variant, count in replicas.items()
    ]
    buckets = Buckets(input_tokens=[512], output_tokens=[128])
    return ServicePlan(
        namespace="team", service=name, buckets=buckets, variants=variants, routes=[], demand=[0], unserved_rps=0,
        cost_per_hour=0,
    )  # fmt: skip


def said(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]], **devices: int) -> dict[str, str]:
    old = {f"team/{name}": service_plan(name, replicas) for name, replicas in before.items()}
    return without_room(old, [service_plan(name, replicas) for name, replicas in after.items()], devices)


def test_with_room_for_both_nothing_is_said() -> None:
    assert said({"a": {"l4": 4}}, {"a": {"h100": 2}}, l4=4, h100=2) == {}
    assert said({"a": {"h100": 4}}, {"a": {"h100": 1, "h100-tp2": 2}}, h100=8) == {}


def test_replicas_of_one_type_that_make_room_for_each_other_are_named() -> None:
    found = said({"a": {"h100": 4}}, {"a": {"h100-tp2": 2}}, h100=6)
    assert list(found) == ["team/a"]
    assert "2 more of GPUType h100: 2 x h100 of the plan in force will leave" in found["team/a"]


def test_services_that_swap_types_are_both_named() -> None:
    found = said({"a": {"l4": 2}, "b": {"h100": 2}}, {"a": {"h100": 2}, "b": {"l4": 2}}, l4=2, h100=2)
    assert "2 x l4" in found["team/a"]
    assert "2 x h100" in found["team/b"]


def test_a_type_that_lost_devices_blocks_nobody_who_grows_elsewhere() -> None:
    assert said({"a": {"l4": 2}}, {"a": {"h100": 1}}, l4=0, h100=1) == {}


def test_what_a_shrinking_service_gives_up_is_room_at_once() -> None:
    assert said({"a": {"h100": 4}, "b": {"h100": 1}}, {"a": {"h100": 2}, "b": {"h100": 3}}, h100=5) == {}


counts = st.fixed_dictionaries({name: st.integers(0, 3) for name in DEGREE})


@given(before=counts, after=counts)
def test_the_room_that_is_said_to_be_missing_is_enough(before: dict[str, int], after: dict[str, int]) -> None:
    few = {kind: max(_used(before, kind), _used(after, kind)) for kind in ("l4", "h100")}
    both = {kind: _used({name: max(before[name], after[name]) for name in DEGREE}, kind) for kind in few}
    assert said({"a": before}, {"a": after}, **both) == {}
    grown = {name.partition("-")[0] for name in DEGREE if after[name] > before[name]}
    lacks = any(both[kind] > few[kind] for kind in grown)
    assert bool(said({"a": before}, {"a": after}, **few)) == lacks


def _used(replicas: dict[str, int], kind: str) -> int:
    return sum(count * DEGREE[name] for name, count in replicas.items() if name.partition("-")[0] == kind)


def test_a_plan_warns_of_the_change_and_not_of_what_stays() -> None:
    rates = {"l4": [4, 4], "h100": [40, 40]}
    first = fleet(
        [service("a"), service("b", priority=60)], [rates_profile(rates)], [gpu_type("l4", 1.0), gpu_type("h100", 5.0)],
        inventory={"l4": 1, "h100": 1}, demand={"a": [20, 0], "b": [3, 0]},
    )  # fmt: skip
    now, _ = plan(first, None)
    assert [planned.replicas for planned in now.services] == [{"h100": 1}, {"l4": 1}]
    swapped = first.model_copy(update={"demand": {"team/a": first.demand["team/b"], "team/b": first.demand["team/a"]}})
    after, _ = plan(swapped, now)
    assert [planned.replicas for planned in after.services] == [{"l4": 1}, {"h100": 1}]
    for planned, leaving in zip(after.services, ("1 x h100", "1 x l4"), strict=True):
        assert any(f"{leaving} of the plan in force will leave" in warning for warning in planned.warnings)
    again, _ = plan(swapped, after)
    assert [planned.warnings for planned in again.services] == [[], []]
