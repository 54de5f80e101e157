"""To allow spot never costs more than not to: a plan without any spot pool survives every loss of one."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from llmfleet.api import GPUType, Plan
from llmfleet.placement import PlanInputs, plan, violations
from placement_testing.fleets import Point, corners, fleet, gpu_type, point, profile, service

INPUTS, OUTPUTS = (512, 4096), (64, 256)


def points(speed: float) -> list[Point]:
    return [
        point(
            (prompt, answer),
            0.9 * 1e3 * n * speed / (ttft + answer * tpot),
            concurrency=n,
            ttft_ms=ttft / speed,
            tpot_ms=tpot / speed,
        )
        for prompt, answer in corners(INPUTS, OUTPUTS)
        for n, ttft, tpot in (
            (1, prompt / 8, 12.0),
            (8, prompt / 6, 15 + prompt / 600),
            (32, prompt / 2, 25 + prompt / 80),
        )
    ]


def spot(name: str, base: str, price: float, cheaper: float) -> GPUType:
    prices = {"onDemand": price, "spot": price * cheaper}
    return gpu_type(name, price, capacityClass="spot", pricePerHour=prices, sameHardwareAs=base)


def offered(
    *rates: float, allowed: bool, burstiness: float = 1.0, cheaper: float = 0.5, speed: float = 0.6, devices: int = 50
) -> PlanInputs:
    """Services on two kinds of devices, each on demand and in two spot pools."""
    kinds = {"big": 2.0, "small": 1.0}
    types = [gpu_type(name, price) for name, price in kinds.items()]
    types += [spot(f"{name}-{pool}", name, price, cheaper) for name, price in kinds.items() for pool in "ab"]
    spec: dict[str, Any] = {"spot": {"surviveLossOf": "anyPool"}} if allowed else {}
    objective = {"ttft": {"milliseconds": 2000, "percentile": 95}, "tpot": {"milliseconds": 50.0, "percentile": 99}}
    return fleet(
        [service(f"s{i}", burstiness=burstiness, objective=objective, **spec) for i in range(len(rates))],
        [profile({"big": points(1.0), "small": points(speed)}, inputs=INPUTS, outputs=OUTPUTS)],
        types,
        inventory={one.metadata.name: devices for one in types},
        demand={f"s{i}": [rate, rate / 4, rate / 8, rate / 16] for i, rate in enumerate(rates)},
        utilization_target=0.9,
        optimality_gap=0.01,
    )


def short_rps(decided: Plan) -> float:
    return sum(one.unserved_rps for one in decided.services)


@example(rates=[8.0], burstiness=0.0, cheaper=0.95, speed=0.4, devices=50)
@settings(
    deadline=None,
    max_examples=2,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(
    rates=st.lists(st.sampled_from([0.3, 1.0, 3.0, 8.0]), min_size=1, max_size=2),
    burstiness=st.sampled_from([0.0, 1.0, 4.0]),
    cheaper=st.sampled_from([0.3, 0.5, 0.95]),
    speed=st.sampled_from([0.4, 0.6, 0.8]),
    devices=st.sampled_from([10, 50]),
)
def test_to_allow_spot_never_costs_more(rates: list[float], **fleet_of: Any) -> None:
    inputs = offered(*rates, allowed=True, **fleet_of)
    without, _ = plan(offered(*rates, allowed=False, **fleet_of), None)
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    assert short_rps(decided) <= short_rps(without) + 1e-6
    if without.status == "optimal":
        assert decided.cost_per_hour <= without.cost_per_hour * (1 + inputs.policy.optimality_gap)
