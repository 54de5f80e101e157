"""Plans with prefill and decode on replicas of their own: only where allowed, possible and cheaper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.api import Plan
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.other_ways import otherwise_staged, with_alternatives
from llmfleet.placement.routes import routes_of
from llmfleet.placement.solver.stages import FIRST, SECOND, WHOLE
from placement_testing.apart import H100, L4, apart_fleet, by_role, only
from placement_testing.fleets import decisions

LONG = (8192, 128)


def planned(inputs: PlanInputs) -> Plan:
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    return decided


def together(inputs: PlanInputs) -> PlanInputs:
    return inputs.model_copy(update={"can_hand_over": False})


def test_long_prompts_under_a_strict_tpot_are_cheaper_with_the_stages_apart() -> None:
    inputs = apart_fleet(LONG, tpot_ms=12)
    apart, whole = planned(inputs), planned(together(inputs))
    assert by_role(only(apart)).keys() >= {"prefill", "decode"}
    assert apart.cost_per_hour < 0.9 * whole.cost_per_hour
    assert apart.status == "optimal"


@pytest.mark.parametrize("gap", [0.0, 0.01])
@pytest.mark.parametrize(("size", "tpot_ms"), [(LONG, 20.0), ((2048, 512), 15.0)])
def test_where_whole_replicas_cost_no_more_they_are_chosen(size: tuple[int, int], tpot_ms: float, gap: float) -> None:
    inputs = apart_fleet(size, tpot_ms=tpot_ms, optimality_gap=gap)
    assert by_role(only(planned(inputs))).keys() == {"whole"}


@settings(max_examples=5, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([(512, 128), (512, 512), (2048, 128), LONG]), min_size=1, max_size=2, unique=True),
    tpot_ms=st.sampled_from([15.0, 20.0, 40.0]),
    rps=st.sampled_from([2.0, 20.0]),
    types=st.sampled_from([(H100,), (H100, L4)]),
)
def test_to_allow_it_never_costs_more(
    sizes: list[tuple[int, int]], tpot_ms: float, rps: float, types: tuple[tuple[str, float, float], ...]
) -> None:
    inputs = apart_fleet(*sizes, tpot_ms=tpot_ms, rps=rps, types=types)
    apart, whole = planned(inputs), planned(together(inputs))
    assert only(apart).unserved_rps <= only(whole).unserved_rps + 1e-6
    if apart.status == whole.status == "optimal":
        assert apart.cost_per_hour <= whole.cost_per_hour * (1 + 1e-9)


def test_the_program_decides_the_proportion_of_the_stages() -> None:
    def share(size: tuple[int, int]) -> float:
        devices = by_role(only(planned(apart_fleet(size, tpot_ms=10, rps=60))))
        assert devices.keys() >= {"prefill", "decode"}
        return devices["prefill"] / devices["decode"]

    assert share((8192, 128)) > 2 * share((512, 512))


def test_over_a_slow_link_it_is_not_worth_it() -> None:
    fast, slow = apart_fleet(LONG), apart_fleet(LONG, link_gb_per_second=0.8)
    assert "prefill" in by_role(only(planned(fast)))
    assert by_role(only(planned(slow))).keys() == {"whole"}


def test_the_slowest_link_of_all_replicas_counts_and_is_said() -> None:
    inputs = apart_fleet(LONG)
    links = {(one.role is None, one.kv_transfer_gb_per_second) for one in only(planned(inputs)).variants}
    assert links >= {(False, 50.0)}
    assert links <= {(False, 50.0), (True, None)}


def test_ttft_of_both_stages_is_within_the_objective() -> None:
    service = only(planned(apart_fleet(LONG)))
    stages = {variant.role: variant.predicted for variant in service.variants}
    first, second = stages["prefill"], stages["decode"]
    assert first is not None
    assert second is not None
    assert service.predicted is not None
    assert service.predicted.ttft_ms == pytest.approx(first.ttft_ms + second.ttft_ms)
    assert service.predicted.ttft_ms <= 2000
    assert service.predicted.ttft_attainment >= 0.95


def test_every_request_passes_both_stages_or_one_whole_replica() -> None:
    service = only(planned(apart_fleet((512, 512), LONG, tpot_ms=15, ttft_ms=1500)))
    roles = {variant.name: variant.role for variant in service.variants}
    for bucket, rate in enumerate(service.demand):
        passed = dict.fromkeys((None, "prefill", "decode"), 0.0)
        for route in service.routes:
            if route.bucket == bucket:
                passed[roles[route.variant]] += route.fraction
        assert passed["prefill"] == pytest.approx(passed["decode"], abs=1e-5)
        if rate:
            assert passed[None] + passed["prefill"] == pytest.approx(1, abs=1e-5)


def test_sizes_that_nobody_asks_for_are_shared_by_what_replicas_of_each_way_can_do() -> None:
    stage = np.array([WHOLE, FIRST, SECOND, SECOND])
    throughput = np.array([[2.0, 4.0, 3.0, 3.0]])
    unknown = np.full((1, 4), np.nan)
    routes = routes_of(["w", "p", "d", "e"], throughput, (1, 3, 1, 1), unknown, stage)
    assert {route.variant: route.fraction for route in routes} == pytest.approx(
        {"w": 0.25, "p": 0.75, "d": 0.375, "e": 0.375}
    )


def test_who_does_not_allow_it_has_the_very_same_plan() -> None:
    allowed, not_allowed = (apart_fleet(LONG, allowed=allowed) for allowed in (True, False))
    whole = planned(not_allowed)
    assert by_role(only(whole)).keys() == {"whole"}
    assert decisions(whole) == decisions(planned(together(not_allowed)))
    assert only(whole).routes == only(planned(together(allowed))).routes


def test_where_engines_cannot_hand_over_it_says_so_and_what_it_would_save() -> None:
    inputs = apart_fleet(LONG, can_hand_over=False)
    decided = planned(inputs)
    assert by_role(only(decided)).keys() == {"whole"}
    assert any("spec.engine.disaggregated" in warning for warning in only(decided).warnings)
    other = otherwise_staged(inputs, decided, "team/s")
    assert other is not None
    assert other.kind == "disaggregated"
    assert other.cost_per_hour < decided.cost_per_hour
    assert "per hour less" in other.reason


def test_a_plan_with_stages_says_what_whole_replicas_would_cost() -> None:
    inputs = apart_fleet(LONG)
    decided = with_alternatives(inputs, planned(inputs))
    (other,) = [one for one in only(decided).alternatives if one.kind == "unified"]
    assert other.cost_per_hour == planned(together(inputs)).cost_per_hour


def test_a_type_without_a_link_and_a_service_on_spot_have_whole_replicas_only() -> None:
    without = only(planned(apart_fleet(LONG, link_gb_per_second=None)))
    assert any("kvTransferGbPerSecond" in warning for warning in without.warnings)
    spot = only(planned(apart_fleet(LONG, spot={})))
    assert any("spec.spot" in warning for warning in spot.warnings)
    for service in (without, spot):
        assert by_role(service).keys() == {"whole"}


def test_replicas_of_one_stage_count_against_the_bounds_of_the_service() -> None:
    service = only(planned(apart_fleet(LONG, replicas={"maxVariants": 1})))
    assert by_role(service).keys() == {"whole"}


def test_services_with_stages_share_scarce_devices_as_any_others_do() -> None:
    one = apart_fleet(LONG, rps=6)
    (served,) = one.services
    second = served.model_copy(update={"metadata": served.metadata.model_copy(update={"name": "other"})})
    alone = sum(by_role(only(planned(one))).values())
    for devices, status in ((2 * alone, "optimal"), (2 * alone - 2, "partial")):
        update = {"services": [served, second], "inventory": {"h100-sxm": devices}}
        decided = planned(one.model_copy(update=update))
        assert decided.status == status
        assert sum(sum(by_role(part).values()) for part in decided.services) <= devices
        assert any("prefill" in by_role(part) for part in decided.services)


def test_the_next_best_set_of_a_plan_with_stages_costs_no_less() -> None:
    decided = planned(apart_fleet(LONG))
    other = only(decided).next_best
    assert other is not None
    assert other.cost_per_hour >= decided.cost_per_hour


def test_what_was_learnt_while_engines_could_not_hand_over_is_not_kept_when_they_can() -> None:
    inputs = apart_fleet(LONG)
    whole, warm = plan(together(inputs), None)
    apart, _ = plan(inputs, whole, warm)
    assert "prefill" in by_role(only(apart))


def test_the_plan_in_force_with_stages_stays() -> None:
    inputs = apart_fleet(LONG)
    first, warm = plan(inputs, None)
    again, _ = plan(inputs, first, warm)
    assert only(again).replicas == only(first).replicas
    assert only(again).routes == only(first).routes


INPUTS = apart_fleet(LONG)


@pytest.fixture(scope="module")
def decided() -> Plan:
    return planned(INPUTS)


def constraints(inputs: PlanInputs, decided: Plan) -> set[str]:
    return {broken.constraint for broken in violations(inputs, decided)}


def test_stages_that_nobody_asked_for_or_that_cannot_be_are_broken(decided: Plan) -> None:
    assert "stage" in constraints(together(INPUTS), decided)
    assert "stage" in constraints(apart_fleet(LONG, allowed=False), decided)


def test_more_prefilled_than_decoded_is_broken(decided: Plan) -> None:
    service = only(decided)
    decodes = {variant.name for variant in service.variants if variant.role == "decode"}
    routes = [
        route.model_copy(update={"fraction": 0.5 * route.fraction}) if route.variant in decodes else route
        for route in service.routes
    ]
    uneven = decided.model_copy(update={"services": [service.model_copy(update={"routes": routes})]})
    assert "stage" in constraints(INPUTS, uneven)


def test_a_faster_link_than_there_is_is_broken(decided: Plan) -> None:
    assert "stage" in constraints(apart_fleet(LONG, link_gb_per_second=25.0), decided)


def test_a_stage_that_misses_its_part_is_broken(decided: Plan) -> None:
    service = only(decided)
    for role in ("prefill", "decode"):
        fewer = [
            one.model_copy(update={"replicas": one.replicas // 2}) if one.role == role else one
            for one in service.variants
        ]
        short = decided.model_copy(update={"services": [service.model_copy(update={"variants": fewer})]})
        assert "load" in constraints(INPUTS, short), role
