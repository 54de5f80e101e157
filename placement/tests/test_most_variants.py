"""`spec.replicas.maxVariants`: a service is served by no more variants than it allows, and what that costs is said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from llmfleet.api.llmservice import ReplicaBounds
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.components import greedy
from llmfleet.placement.explain import explain
from llmfleet.placement.rounds import reduce
from llmfleet.placement.worth import worth_of_more
from placement_testing.fleets import fleet, gpu_type, prepared, rates_profile, replicas, service, small_fleets

TYPES = [gpu_type("l4", 1.0), gpu_type("a100", 3.0), gpu_type("h100", 7.0)]
RATES = {"l4": [4, 0], "a100": [8, 2], "h100": [20, 5]}


def mixed(most: int | None, inventory: dict[str, int] | None = None, **policy: Any) -> PlanInputs:
    """Short requests are cheapest on l4, long ones need a100 or h100."""
    bounds = {} if most is None else {"maxVariants": most}
    return fleet(
        [service(replicas=bounds)],
        [rates_profile(RATES)],
        TYPES,
        inventory=inventory or {"l4": 9, "a100": 9, "h100": 9},
        demand={"s": [16, 2]},
        **policy,
    )


def test_with_one_variant_the_service_gets_the_cheapest_that_serves_all() -> None:
    free, _ = plan(mixed(None), None)
    assert replicas(free, "s") == {"l4": 4, "a100": 1}
    assert plan(mixed(2), None)[0].services[0].replicas == replicas(free, "s")
    single, _ = plan(mixed(1), None)
    assert replicas(single, "s") == {"a100": 3}
    assert single.status == "optimal"
    assert single.services[0].binding == ["replicas.maxVariants"]
    assert violations(mixed(1), single) == []


def test_a_plan_with_too_many_variants_is_found_by_the_check() -> None:
    free, _ = plan(mixed(None), None)
    (broken,) = violations(mixed(1), free)
    assert str(broken) == "variants_max of team/s: 2, allowed is at most 1"


def test_the_variants_in_force_are_left_where_fewer_are_allowed_now() -> None:
    free, warm = plan(mixed(None, switching_cost_fraction=1.0), None)
    fewer, _ = plan(mixed(1, switching_cost_fraction=1.0), free, warm)
    assert replicas(fewer, "s") == {"a100": 3}


def test_a_shortage_names_the_bound_and_the_number_of_variants_that_would_help_does() -> None:
    scarce = {"l4": 9, "a100": 1, "h100": 0}
    short, _ = plan(mixed(1, scarce), None)
    said = short.services[0].shortfall
    assert said is not None
    assert "replicas.maxVariants of 2 instead of 1" in said
    assert plan(mixed(2, scarce), None)[0].status == "optimal"


def test_one_variant_more_has_a_worth() -> None:
    decided, _ = plan(mixed(1), None)
    (more,) = [w for w in worth_of_more(mixed(1), decided, "team/s") if "maxVariants" in w.relaxed]
    assert (more.relaxed, more.cost_per_hour, more.unserved_rps) == ("spec.replicas.maxVariants of 2", -2.0, 0.0)
    assert more.replicas == {"l4": 4, "a100": 1}


def test_an_explanation_tries_no_alternative_of_more_variants() -> None:
    decided, _ = plan(mixed(1), None)
    told = {one.name: one.cost_per_hour_with for one in explain(decided, mixed(1), "team/s").rejected}
    # Nothing but l4 cannot serve the long ones, and with h100 beside it a100 is one too many.
    assert told == {"l4": None, "h100": 14.0}
    other = decided.services[0].next_best
    assert other is not None
    assert other.replicas == {"h100": 2}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(small_fleets())
def test_no_plan_has_more_variants_than_its_service_allows_with_or_without_a_solver(inputs: PlanInputs) -> None:
    decided, _ = plan(inputs, None)
    for one in prepared(inputs).values():
        most = one.service.spec.replicas.max_variants
        program = reduce(one, inputs.policy, None).program
        quick = greedy(program, {"small": 6, "big": 3})
        planned = decided.service(one.key)
        assert planned is not None
        for counts in (quick, planned.replicas.values()):
            assert most is None or sum(count > 0 for count in counts) <= most


@pytest.mark.parametrize("most", [0, -1, 65])
def test_a_number_of_variants_that_is_none_is_refused(most: int) -> None:
    with pytest.raises(ValueError, match=r"max_?[vV]ariants"):
        ReplicaBounds.model_validate({"max_variants": most})
