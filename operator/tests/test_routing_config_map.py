"""The ConfigMap: deterministic, remembered after a restart, and quiet while nothing is decided anew."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import (
    BucketSizes,
    LatencyCoefficients,
    LLMService,
    NextBest,
    PlannedVariant,
    Route,
    RoutingTable,
    ServicePlan,
)
from llmfleet.api.meta import PLAN_KEY, ROUTING_KEY
from llmfleet.api.plan import PoolLoss
from llmfleet.operator.model import ObservedConfigMap, PlannedService
from llmfleet.operator.parse import configmap_from_object
from llmfleet.operator.routing import config_map, restore_plan, routing_table, settle, stored_plan, stored_table

LATENCY = LatencyCoefficients(ttft_base_ms=1, ttft_ms_per_input_token=0.1, tpot_base_ms=1, tpot_ms_per_running=0.1)
BUCKETS = {"inputTokens": [512, 4096], "outputTokens": [128]}


def llm_service(**spec: Any) -> LLMService:
    body = {
        "model": {"name": "org/model", "contextLength": 4096, "servedName": "m"},
        "profile": "p",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
        **spec,
    }
    return LLMService.parse({"metadata": {"name": "chat", "namespace": "ns", "uid": "u"}, "spec": body})


def variant(name: str, replicas: int, **fields: Any) -> PlannedVariant:
    return PlannedVariant(
        name=name,
        gpu_type=name,
        tensor_parallel=1,
        replicas=replicas,
        latency=LATENCY,
        **{"cost_per_replica_hour": 1.0, **fields},
    )


def planned(
    routes: dict[tuple[int, str], float], replicas: dict[str, int], demand: tuple[float, float] = (1, 1), **fields: Any
) -> PlannedService:
    plan = ServicePlan(
        namespace="ns",
        service="chat",
        buckets=BUCKETS,
        variants=[variant(name, count) for name, count in sorted(replicas.items())],
        routes=[Route(bucket=b, variant=v, fraction=f) for (b, v), f in sorted(routes.items())],
        demand=list(demand),
        **{"unserved_rps": 0, "cost_per_hour": 3, "cost_per_million_tokens": 2.0, **fields},
    )
    return PlannedService(plan_id="new", plan=plan)


MIX = planned({(0, "slow"): 1.0, (1, "fast"): 0.75, (1, "slow"): 0.25}, {"slow": 4, "fast": 2})


def live(
    desired: PlannedService, serving: dict[str, int], before: ObservedConfigMap | None = None
) -> ObservedConfigMap:
    table = routing_table(llm_service(), desired, serving, stored_table(before))
    return configmap_from_object(config_map(llm_service(), table, desired.plan))


def shares(table: RoutingTable) -> dict[tuple[int, str], float]:
    return {(route.bucket, route.variant): route.fraction for route in table.routes}


def test_with_all_replicas_serving_the_table_is_the_solvers_own() -> None:
    table = routing_table(llm_service(apiKeysSecret="keys"), MIX, {"slow": 4, "fast": 2}, None)
    assert table.routes == MIX.plan.routes
    assert {v.name: v.replicas for v in table.variants} == {"slow": 4, "fast": 2}
    assert (table.served_name, table.api_keys_secret, table.plan_id) == ("m", "keys", "new")


def test_without_surplus_the_table_is_the_solvers_own_whatever_is_ready() -> None:
    for serving in ({}, {"slow": 1}, {"fast": 2}, {"slow": 4, "fast": 1}):
        assert routing_table(llm_service(), MIX, serving, None).routes == MIX.plan.routes


def test_the_surplus_takes_what_missing_replicas_cannot() -> None:
    before = stored_table(live(planned({(0, "old"): 1.0, (1, "old"): 1.0}, {"old": 3}), {"old": 3}))
    table = routing_table(llm_service(), MIX, {"old": 3, "slow": 1, "fast": 2}, before)
    assert shares(table) == pytest.approx(
        {(0, "slow"): 0.25, (0, "old"): 0.75, (1, "fast"): 0.75, (1, "slow"): 0.0625, (1, "old"): 0.1875}
    )
    # Counted once: a gateway that weighs by Ready over replicas leaves these shares as they are.
    assert {v.name: v.replicas for v in table.variants} == {"slow": 1, "fast": 2, "old": 3}


def test_surplus_replicas_of_a_planned_variant_help_out() -> None:
    table = routing_table(llm_service(), MIX, {"slow": 0, "fast": 5}, None)
    assert shares(table) == pytest.approx({(0, "fast"): 1.0, (1, "fast"): 1.0})


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_every_buckets_shares_sum_to_what_the_plan_routes(slow: int, fast: int, old: int) -> None:
    before = stored_table(live(planned({(0, "old"): 1.0, (1, "old"): 1.0}, {"old": 3}), {"old": 3}))
    serving = {"slow": slow, "fast": fast, "old": old}
    partial = planned({(0, "slow"): 0.5, (1, "fast"): 1.0}, {"slow": 4, "fast": 2}, unserved_rps=0.5)
    table = routing_table(llm_service(), partial, serving, before)
    for bucket, routed in ((0, 0.5), (1, 1.0)):
        assert sum(f for (b, _), f in shares(table).items() if b == bucket) == pytest.approx(routed)
    assert {route.variant for route in table.routes} <= {v.name for v in table.variants}


def test_the_config_map_is_byte_for_byte_the_same_and_owned() -> None:
    table = routing_table(llm_service(), MIX, {}, None)
    first, second = config_map(llm_service(), table, MIX.plan), config_map(llm_service(), table, MIX.plan)
    assert json.dumps(first) == json.dumps(second)
    assert first["metadata"]["name"] == "chat-routing"
    assert first["metadata"]["ownerReferences"][0]["uid"] == "u"
    assert set(first["data"]) == {ROUTING_KEY, PLAN_KEY}


def test_the_plan_is_read_back_from_the_config_map() -> None:
    stored = stored_plan(live(MIX, {}))
    assert stored == MIX
    restored = restore_plan([live(MIX, {})])
    assert restored is not None
    assert restored.services == [MIX.plan]
    assert restore_plan([]) is None


def test_a_document_that_is_not_understood_is_not_a_plan() -> None:
    for text in ("", "{", "[]", '{"schemaVersion": 2}'):
        broken = ObservedConfigMap(
            namespace="ns", name="chat-routing", service="chat", data={PLAN_KEY: text, ROUTING_KEY: text}
        )
        assert stored_plan(broken) is None
        assert stored_table(broken) is None
        assert restore_plan([broken]) is None


def test_a_plan_that_decides_the_same_for_nearly_the_same_demand_is_not_written_again() -> None:
    stored = PlannedService(plan_id="stored", plan=MIX.plan)
    near = planned(shares_of(MIX), {"slow": 4, "fast": 2}, demand=(1.1, 1.05), cost_per_million_tokens=1.9)
    assert settle(near, stored).plan == MIX.plan
    assert settle(near, stored).plan_id == "stored"


def test_what_sizes_are_known_is_written_once_and_not_with_every_request() -> None:
    two, three = [[BucketSizes(requests=n), BucketSizes()] for n in (2.0, 3.0)]
    same = {(0, "slow"): 1.0, (1, "fast"): 0.75, (1, "slow"): 0.25}
    first = planned(same, {"slow": 4, "fast": 2}, sizes=two)
    assert settle(first, PlannedService(plan_id="stored", plan=MIX.plan)) == first
    more = planned(same, {"slow": 4, "fast": 2}, sizes=three)
    assert settle(more, PlannedService(plan_id="stored", plan=first.plan)).plan == first.plan


@pytest.mark.parametrize(
    "other",
    [
        planned({(0, "slow"): 1.0, (1, "fast"): 0.75, (1, "slow"): 0.25}, {"slow": 5, "fast": 2}),
        planned({(0, "slow"): 1.0, (1, "fast"): 0.7, (1, "slow"): 0.3}, {"slow": 4, "fast": 2}),
        planned({(0, "slow"): 1.0, (1, "fast"): 1.0}, {"slow": 4, "fast": 2}),
        planned({(0, "slow"): 1.0, (1, "fast"): 0.75, (1, "slow"): 0.25}, {"slow": 4, "fast": 2}, demand=(2, 1)),
        planned({(0, "slow"): 1.0, (1, "fast"): 0.75, (1, "slow"): 0.25}, {"slow": 4, "fast": 2}, cost_per_hour=9),
        planned(
            {(0, "slow"): 1.0, (1, "fast"): 0.75, (1, "slow"): 0.25}, {"slow": 4, "fast": 2}, shortfall="short by 1"
        ),
        planned(
            {(0, "slow"): 1.0, (1, "fast"): 0.75, (1, "slow"): 0.25},
            {"slow": 4, "fast": 2},
            next_best=NextBest(replicas={"fast": 3}, cost_per_hour=5),
        ),
    ],
)
def test_any_other_decision_is_written(other: PlannedService) -> None:
    assert settle(other, PlannedService(plan_id="stored", plan=MIX.plan)) == other


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ({"binding": ["limit of GPUType l4"]}, {"binding": ["inventory of GPUType l4"]}, False),
        ({"warnings": ["ModelProfile p measured a"]}, {"warnings": ["ModelProfile p has no point of b"]}, False),
        (
            {"shortfall": "short of 1.2 of 9: 1 more device of l4"},
            {"shortfall": "short of 1.3 of 9.1: 2 more device of l4"},
            True,
        ),
        (
            {"shortfall": "short of 1.2 of 9: 1 more device of l4"},
            {"shortfall": "short of 1.2 of 9: replicas.max of 3"},
            False,
        ),
        (
            {"next_best": NextBest(replicas={"fast": 3}, cost_per_hour=5.0)},
            {"next_best": NextBest(replicas={"fast": 4}, cost_per_hour=5.5)},
            True,
        ),
        (
            {"next_best": NextBest(replicas={"fast": 3}, cost_per_hour=5.0)},
            {"next_best": NextBest(replicas={"fast": 3}, cost_per_hour=50.0)},
            False,
        ),
        (
            {"losses": [PoolLoss(gpu_types=["fast"], share=1, routes=[], unserved_rps=2)]},
            {"losses": [PoolLoss(gpu_types=["fast"], share=1, routes=[], unserved_rps=3)]},
            True,
        ),
        (
            {"losses": [PoolLoss(gpu_types=["fast"], share=1, routes=[], unserved_rps=2)]},
            {"losses": [PoolLoss(gpu_types=["fast"], share=1, routes=[], unserved_rps=0)]},
            False,
        ),
    ],
)
def test_what_status_says_of_a_decision_follows_it_though_the_decision_stays(
    before: dict[str, Any], after: dict[str, Any], same: bool
) -> None:
    shares = shares_of(MIX)
    stored = planned(shares, {"slow": 4, "fast": 2}, **before)
    newer = planned(shares, {"slow": 4, "fast": 2}, **after)
    assert (settle(newer, stored).plan == stored.plan) is same
    assert settle(newer, stored).plan in (stored.plan, newer.plan)


def shares_of(desired: PlannedService) -> dict[tuple[int, str], float]:
    return {(route.bucket, route.variant): route.fraction for route in desired.plan.routes}
