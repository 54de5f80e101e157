"""What-if edits: each does to the inputs what a user would do to the objects, or says why it cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import LLMService
from llmfleet.placement import PlanInputs, plan
from llmfleet.placement.comparison import difference
from llmfleet.placement.whatif import WhatIfError, edited
from placement_testing.fleets import fleet, gpu_type, rates_profile, service

EXPECTED = {"mode": "expected", "requestsPerSecond": 4, "sizes": [{"inputTokens": 100, "outputTokens": 100}]}


@pytest.fixture
def inputs() -> PlanInputs:
    """`chat` is observed, `batch` expected; `l4` is the cheaper type and enough for both."""
    return fleet(
        [service("chat"), service("batch", traffic=EXPECTED)],
        [rates_profile({"l4": [4, 4], "h100": [40, 40]})],
        [gpu_type("l4", 1.0, limit=8), gpu_type("h100", 6.0)],
        inventory={"l4": 8, "h100": 4},
        demand={"chat": [6, 2]},
    )


def service_of(inputs: PlanInputs, name: str) -> LLMService:
    return next(s for s in inputs.services if s.metadata.name == name)


def test_a_price_is_that_of_the_capacity_class_in_which_the_type_is_billed(inputs: PlanInputs) -> None:
    assert edited(inputs, ["price:h100=4.5"]).gpu_types[1].spec.price_per_hour.on_demand == 4.5
    assert edited(inputs, ["price:h100=+0.5"]).gpu_types[1].spec.price_per_hour.on_demand == 6.5
    assert edited(inputs, ["price:h100=x0.5"]).gpu_types[1].spec.price_per_hour.on_demand == 3.0
    spot = gpu_type("l4", 1.0, capacityClass="spot", pricePerHour={"onDemand": 1, "spot": 0.4})
    found = edited(inputs.model_copy(update={"gpu_types": [spot]}), ["price:l4=0.3"]).gpu_types[0].spec.price_per_hour
    assert (found.on_demand, found.spot) == (1.0, 0.3)


def test_inventory_and_limit_are_set_raised_and_lowered(inputs: PlanInputs) -> None:
    assert edited(inputs, ["inventory:h100=9"]).inventory == {"l4": 8, "h100": 9}
    assert edited(inputs, ["inventory:l4=-3"]).inventory["l4"] == 5
    assert edited(inputs, ["limit:l4=+2"]).gpu_types[0].spec.limit == 10
    assert edited(inputs, ["limit:l4=none"]).gpu_types[0].spec.limit is None
    assert edited(inputs, ["limit:h100=2"]).gpu_types[1].spec.limit == 2


def test_an_objective_keeps_its_percentile_and_takes_milliseconds_or_seconds(inputs: PlanInputs) -> None:
    for value, milliseconds in (("400ms", 400), ("0.4s", 400), ("+10ms", 1010), ("x0.5", 500)):
        ttft = service_of(edited(inputs, [f"objective:chat.ttft={value}"]), "chat").spec.objective.ttft
        assert (ttft.milliseconds, ttft.percentile) == (milliseconds, 95)
    tpot = service_of(edited(inputs, ["objective:team/chat.tpot=-10ms"]), "chat").spec.objective.tpot
    assert tpot.milliseconds == 40


def test_a_rate_scales_what_was_observed_and_else_what_is_expected(inputs: PlanInputs) -> None:
    assert edited(inputs, ["rate:chat=x1.5"]).demand["team/chat"].rps == [9, 3]
    assert edited(inputs, ["rate:chat=4"]).demand["team/chat"].rps == [3, 1]
    assert edited(inputs, ["rate:chat=-8"]).demand["team/chat"].rps == [0, 0]
    assert service_of(edited(inputs, ["rate:batch=+2"]), "batch").spec.traffic.requests_per_second == 6


def test_a_later_edit_sees_what_an_earlier_one_left(inputs: PlanInputs) -> None:
    assert edited(inputs, ["inventory:l4=3", "inventory:l4=+2"]).inventory["l4"] == 5


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ("h100=6", "accepted are price:TYPE"),
        ("cost:h100=6", "accepted are price:TYPE"),
        ("price:h100", "accepted are price:TYPE"),
        ("price:h200=6", "there is no GPUType 'h200'; there are h100, l4"),
        ("price:h100=cheap", "'cheap'; accepted is a price per device-hour"),
        ("price:h100=nan", "'nan'; accepted is a price"),
        ("price:h100=" + "9" * 400, "accepted is a price"),
        ("price:h100=6$", "accepted is a price"),
        ("price:h100=6ms", "the unit 'ms'"),
        ("price:h100=-7", "onDemand -1.0: Input should be greater than or equal to 0"),
        ("inventory:l4=1.5", "1.5 devices; accepted is a whole number"),
        ("inventory:l4=-9", "-1 devices; accepted is a whole number"),
        ("limit:h100=+1", "no limit that '+1' could change"),
        ("limit:l4=some", "or none"),
        ("objective:chat=400ms", "accepted as METRIC are ttft and tpot"),
        ("objective:chat.e2e=400ms", "accepted as METRIC are ttft and tpot"),
        ("objective:chat.ttft=400", "the unit '' in '400'; accepted is a latency such as 400ms"),
        ("objective:chat.ttft=4min", "the unit 'min'"),
        ("objective:chat.ttft=0ms", "milliseconds 0.0: Input should be greater than 0"),
        ("rate:talk=x2", "there is no LLMService 'talk'; there are team/batch, team/chat"),
        ("rate:chat=x", "accepted is requests per second"),
        ("rate:batch=-5", "requestsPerSecond -1.0"),
        ("rate:chat=-9", "-1 requests per second; accepted is 0 or more"),
    ],
)
def test_an_edit_that_cannot_be_made_says_which_what_was_read_and_what_is_accepted(
    inputs: PlanInputs, edit: str, named: str
) -> None:
    with pytest.raises(WhatIfError) as refused:
        edited(inputs, [edit])
    assert str(refused.value).startswith(edit)
    assert named in str(refused.value)


def test_a_rate_of_which_nobody_knows_the_sizes_is_refused(inputs: PlanInputs) -> None:
    silent = edited(inputs, ["rate:chat=0"])
    with pytest.raises(WhatIfError, match="nobody knows of which sizes"):
        edited(silent, ["rate:chat=4"])
    with pytest.raises(WhatIfError, match="team/chat has no demand"):
        edited(inputs.model_copy(update={"demand": {}}), ["rate:chat=x2"])


def test_a_name_that_two_namespaces_use_has_to_be_said_in_full(inputs: PlanInputs) -> None:
    chat = service_of(inputs, "chat")
    other = chat.model_copy(update={"metadata": chat.metadata.model_copy(update={"namespace": "lab"})})
    both = inputs.model_copy(update={"services": [*inputs.services, other]})
    with pytest.raises(WhatIfError, match="say which of lab/chat, team/chat"):
        edited(both, ["objective:chat.ttft=400ms"])
    assert edited(both, ["objective:team/chat.ttft=400ms"]).services[2] == other


@given(factor=st.floats(0.1, 10), count=st.integers(0, 1000))
def test_an_edit_changes_nothing_but_what_it_names_and_its_inverse_restores_it(factor: float, count: int) -> None:
    before = fleet(
        [service("chat")],
        [rates_profile({"l4": [4, 4]})],
        [gpu_type("l4", 1.0)],
        inventory={"l4": 8},
        demand={"chat": [6, 2]},
    )
    after = edited(before, [f"rate:chat=x{factor:.6f}", f"inventory:l4=+{count}"])
    assert after.model_copy(update={"demand": before.demand, "inventory": before.inventory}) == before
    assert sum(after.demand["team/chat"].rps) == pytest.approx(8 * factor, rel=1e-4)
    assert edited(after, [f"inventory:l4=-{count}"]).inventory == before.inventory


def test_the_difference_of_two_plans_has_each_service_and_the_total_of_both(inputs: PlanInputs) -> None:
    before, _ = plan(inputs, None)
    after, _ = plan(edited(inputs, ["inventory:l4=1", "inventory:h100=0"]), before)
    found = difference(before, after, edits=["inventory:l4=1", "inventory:h100=0"])
    assert [service.key for service in found.services] == ["team/batch", "team/chat"]
    assert sum(s.before.cost_per_hour for s in found.services if s.before) == found.before.cost_per_hour == 3.0
    assert sum(s.after.unserved_rps for s in found.services if s.after) == found.after.unserved_rps == pytest.approx(8)
    assert all(s.before is not None and s.before.replicas for s in found.services)
    assert not any(service.changed for service in difference(before, before).services)


def test_a_service_that_is_refused_in_one_plan_is_not_lost_in_the_difference(inputs: PlanInputs) -> None:
    before, _ = plan(inputs, None)
    after, _ = plan(edited(inputs, ["objective:batch.tpot=1ms"]), before)
    batch = difference(before, after).services[0]
    assert batch.after is not None
    assert batch.after.refusal == "ObjectiveUnreachable"
    assert batch.before is not None
    assert batch.after.replicas == batch.before.replicas
    assert batch.changed
