"""Pools too small for their bursts grow, and what rounds leave short is served while there are devices."""

from __future__ import annotations

import pytest

from llmfleet.placement import PlanInputs, plan, rounds, violations
from placement_testing.fleets import corners, fleet, gpu_type, point, profile, replicas, service, used_devices

INPUTS, OUTPUTS = (512, 4096), (64, 256)


def bursty(
    *rates: float, burstiness: float = 10.0, devices: int = 40, tpot_ms: float = 50.0, **spec: object
) -> PlanInputs:
    """Services of equal size, one for each rate; the later, the higher its priority."""
    points = [
        point(corner, 0.9 * 1e3 * n / (ttft + corner[1] * tpot), concurrency=n, ttft_ms=ttft, tpot_ms=tpot)
        for corner in corners(INPUTS, OUTPUTS)
        for n, ttft, tpot in (
            (1, corner[0] / 8, 12.0),
            (8, corner[0] / 6, 15 + corner[0] / 600),
            (32, corner[0] / 2, 25 + corner[0] / 80),
        )
    ]
    objective = {
        "ttft": {"milliseconds": 2000, "percentile": 95},
        "tpot": {"milliseconds": tpot_ms, "percentile": 99},
    }
    return fleet(
        [
            service(f"s{i}", objective=objective, burstiness=burstiness, priority=100 + i, **spec)  # type: ignore[arg-type]
            for i in range(len(rates))
        ],
        [profile({"big": points}, inputs=INPUTS, outputs=OUTPUTS)],
        [gpu_type("big", 2.0)],
        inventory={"big": devices},
        demand={f"s{i}": [rate, rate / 4, rate / 8, rate / 16] for i, rate in enumerate(rates)},
    )


def test_a_service_whose_bursts_drown_a_replica_gets_a_pool_and_not_nothing() -> None:
    calm, _ = plan(bursty(1.0, burstiness=1.0), None)
    inputs = bursty(1.0)
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    assert decided.services[0].unserved_rps == 0
    assert replicas(decided, "s0")["big"] > replicas(calm, "s0")["big"]


def test_what_rounds_leave_short_gets_replicas_of_what_nobody_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "ROUNDS", 1)
    inputs = bursty(4.0, 9.0)
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    assert [one.unserved_rps for one in decided.services] == [0, 0]
    assert decided.gap_cost is not None
    assert decided.bound is not None
    assert decided.cost_per_hour * (1 - decided.gap_cost) == pytest.approx(decided.bound)


def test_no_more_than_there_is_and_the_higher_priority_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "ROUNDS", 1)
    enough = used_devices(plan(bursty(4.0, 4.0), None)[0])["big"]
    inputs = bursty(4.0, 4.0, devices=enough - 1)
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    low, high = decided.services
    assert high.unserved_rps == 0
    assert low.unserved_rps > 0
    assert low.shortfall is not None


def test_no_more_than_the_service_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "ROUNDS", 1)
    enough = replicas(plan(bursty(4.0), None)[0], "s0")["big"]
    inputs = bursty(4.0, replicas={"max": enough - 1})
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    assert replicas(decided, "s0")["big"] <= enough - 1
    assert decided.services[0].unserved_rps > 0
