"""Plans whose replicas serve one stage only, replayed on modelled engines."""

from __future__ import annotations

from collections import Counter

import pytest

from llmfleet.api import Buckets, LatencyCoefficients, Plan, PlannedVariant, Route, ServicePlan
from llmfleet.simulator import Arrival, EngineSpec, StepTime, replay, routing_table, staged_tables
from llmfleet.simulator.arrivals import renewal

FLAT = EngineSpec(step=StepTime(overhead_ms=10), max_num_batched_tokens=1000, kv_blocks=2000)
LATENCY = LatencyCoefficients(ttft_base_ms=5, ttft_ms_per_input_token=0.1, tpot_base_ms=5, tpot_ms_per_running=0.1)
KV_BYTES = 1e5


def planned(routes: dict[str, float], replicas: dict[str, int], gb_per_second: float = 1.0) -> Plan:
    """A plan of one service and one bucket; a variant's name says its role."""
    variants = []
    for name, count in replicas.items():
        role = name if name in ("prefill", "decode") else name.rpartition("-")[2]
        one = PlannedVariant.model_validate(
            {
                "name": name,
                "gpu_type": "gpu",
                "tensor_parallel": 1,
                "replicas": count,
                "cost_per_replica_hour": 1.0,
                "latency": LATENCY,
                **({"role": role, "kv_transfer_gb_per_second": gb_per_second} if role != "whole" else {}),
            }
        )
        variants.append(one)
    service = ServicePlan(
        namespace="team",
        service="chat",
        buckets=Buckets(input_tokens=[1000], output_tokens=[100]),
        variants=variants,
        routes=[Route(bucket=0, variant=name, fraction=fraction) for name, fraction in routes.items()],
        demand=[1.0],
        unserved_rps=0.0,
        cost_per_hour=1.0,
    )
    return Plan(
        plan_id="p", status="optimal", stopped_by="gap", solve_seconds=0.0, cost_per_hour=1.0, services=[service]
    )


def test_a_request_waits_for_its_prefill_its_transfer_and_the_first_step_of_decoding() -> None:
    plan = planned({"prefill": 1.0, "decode": 1.0}, {"prefill": 1, "decode": 1})
    table, second = staged_tables(plan, "team/chat", context_length=4096, kv_bytes_per_token=KV_BYTES)
    (served,) = replay(table, {"prefill": FLAT, "decode": FLAT}, [Arrival(0.0, 500, 11)], second=second)
    transfer_ms = 500 * KV_BYTES / 1e9 * 1e3
    assert served.ttft_ms == pytest.approx(10 + transfer_ms + 10)
    assert served.tpot_ms == pytest.approx(10)
    assert served.engine == "decode-0"


def test_long_prompts_of_others_do_not_slow_answers_where_stages_are_apart() -> None:
    slow = EngineSpec(step=StepTime(overhead_ms=5, token_ms=0.1), max_num_batched_tokens=1000, kv_blocks=5000)
    arrivals = renewal([(900, 50)], 5.0, 300, seed=4)
    apart = planned({"prefill": 1.0, "decode": 1.0}, {"prefill": 1, "decode": 1}, gb_per_second=50)
    table, second = staged_tables(apart, "team/chat", context_length=4096, kv_bytes_per_token=KV_BYTES)
    decoded = replay(table, {"prefill": slow, "decode": slow}, arrivals, second=second)
    whole = routing_table(planned({"whole": 1.0}, {"whole": 2}), "team/chat", context_length=4096)
    together = replay(whole, {"whole": slow}, arrivals)
    assert max(one.tpot_ms or 0 for one in decoded) < 7
    assert max(one.tpot_ms or 0 for one in together) > 10


def test_each_stage_is_routed_by_its_own_shares_beside_whole_replicas() -> None:
    plan = planned(
        {"whole": 0.5, "prefill": 0.5, "a-decode": 0.125, "b-decode": 0.375},
        {"whole": 1, "prefill": 1, "a-decode": 1, "b-decode": 1},
    )
    table, second = staged_tables(plan, "team/chat", context_length=4096, kv_bytes_per_token=KV_BYTES)
    engines = dict.fromkeys(("whole", "prefill", "a-decode", "b-decode"), FLAT)
    served = replay(table, engines, renewal([(300, 20)], 4.0, 800, seed=2), second=second)
    found = Counter(one.variant for one in served)
    assert found["whole"] / 800 == pytest.approx(0.5, abs=0.01)
    assert found["b-decode"] / (found["a-decode"] + found["b-decode"]) == pytest.approx(0.75, abs=0.01)


def test_one_table_never_carries_a_plan_with_stages() -> None:
    plan = planned({"prefill": 1.0, "decode": 1.0}, {"prefill": 1, "decode": 1})
    with pytest.raises(ValueError, match="prefill, decode serve one stage only"):
        routing_table(plan, "team/chat", context_length=4096)


def test_a_plan_without_stages_has_one_table() -> None:
    plan = planned({"whole": 1.0}, {"whole": 2})
    table, second = staged_tables(plan, "team/chat", context_length=4096, kv_bytes_per_token=KV_BYTES)
    assert second is None
    assert table == routing_table(plan, "team/chat", context_length=4096)
