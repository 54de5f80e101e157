"""Forecasts: capacity is there when what is forecast comes, and a forecast only ever adds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmfleet.api import Forecast, Plan, ServiceForecast
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.workload.ahead import demand_ahead
from placement_testing.fleets import decisions, fleet, gpu_type, rates_profile, replicas, service, small_fleets

PER_REPLICA_RPS = 4.0


def forecast(*points: tuple[float, list[float]], name: str = "s", percentile: float = 90) -> ServiceForecast:
    return ServiceForecast.model_validate(
        {
            "namespace": "team",
            "service": name,
            "percentile": percentile,
            "points": [{"after_seconds": after, "rps": rps} for after, rps in points],
        }
    )


def asked(
    rps: float, *points: tuple[float, list[float]], startup_seconds: int = 300, node_seconds: int | None = None
) -> PlanInputs:
    """One service on one type, asked for `rps` now, with these points to come."""
    node: dict[str, Any] = (
        {} if node_seconds is None else {"provisionable": {"devices": 8, "startupSeconds": node_seconds}}
    )
    inputs = fleet(
        [service(engine={"startupSeconds": startup_seconds})],
        [rates_profile({"l4": [PER_REPLICA_RPS, PER_REPLICA_RPS]})],
        [gpu_type("l4", 1.0, **node)],
        inventory={"l4": 40},
        demand={"s": [rps, 0.0]},
    )
    return with_forecast(inputs, forecast(*points)) if points else inputs


def with_forecast(inputs: PlanInputs, *forecasts: ServiceForecast) -> PlanInputs:
    return PlanInputs.model_validate({**dict(inputs), "forecast": {one.key: one for one in forecasts}})


def planned(inputs: PlanInputs, previous: Plan | None = None) -> Plan:
    decided, _ = plan(inputs, previous)
    assert violations(inputs, decided, previous) == []
    return decided


def test_what_comes_before_a_replica_could_start_is_planned_for_now() -> None:
    decided = planned(asked(3.0, (200.0, [18.0, 0.0])))
    assert replicas(decided, "s") == {"l4": 5}
    (part,) = decided.services
    assert part.forecast is not None
    assert (part.forecast.within_seconds, part.forecast.percentile) == (300.0, 90.0)
    assert part.forecast.rps == pytest.approx(15.0)


def test_what_comes_later_waits() -> None:
    assert replicas(planned(asked(3.0, (300.0, [3.0, 0.0]), (600.0, [18.0, 0.0]))), "s") == {"l4": 1}


def test_demand_rises_in_a_straight_line_between_points() -> None:
    # Half of the way to 18 requests a second, 300 of 600 seconds later.
    assert replicas(planned(asked(3.0, (600.0, [18.0, 0.0]))), "s") == {"l4": 3}


def test_a_peak_that_is_over_before_a_replica_could_start_is_planned_for_as_well() -> None:
    points = ((100.0, [18.0, 0.0]), (200.0, [1.0, 0.0]))
    assert replicas(planned(asked(3.0, *points)), "s") == {"l4": 5}


def test_where_nodes_have_to_be_added_their_start_counts_too() -> None:
    points = ((300.0, [3.0, 0.0]), (500.0, [18.0, 0.0]))
    assert replicas(planned(asked(3.0, *points)), "s") == {"l4": 1}
    assert replicas(planned(asked(3.0, *points, node_seconds=200)), "s") == {"l4": 5}


def test_a_forecast_that_ends_too_early_is_said() -> None:
    (part,) = planned(asked(3.0, (60.0, [3.0, 0.0]))).services
    assert any("the forecast ends after 60 s, and a replica started now serves after 300 s" in w for w in part.warnings)


def morning_rps(at_s: float) -> float:
    """A morning: 3 requests per second, from the 20th to the 40th minute up to 23, half an hour later down again."""
    return float(np.interp(at_s, [0, 1200, 2400, 4200, 4800], [3.0, 3.0, 23.0, 23.0, 3.0]))


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_capacity_is_there_when_the_peak_comes(looks_ahead: bool) -> None:
    """Plans are made every other minute, and replicas serve ten minutes after they were planned."""
    startup_s, step_s = 600, 120
    previous: Plan | None = None
    started: list[tuple[float, int]] = []
    """(ready at, replicas) for every plan."""
    short = 0
    for now in range(0, 6000, step_s):
        points = [(float(after), [morning_rps(now + after), 0.0]) for after in range(0, startup_s + 2 * step_s, step_s)]
        rps = morning_rps(now)
        previous = planned(asked(rps, *(points if looks_ahead else ()), startup_seconds=startup_s), previous)
        count = sum(replicas(previous, "s").values())
        started.append((now + startup_s if now else 0.0, count))
        # A replica serves once each plan since its start has kept it, and the time to start is over.
        since = [planned_count for ready, planned_count in started if ready > now]
        serving = min([*since, max(planned_count for ready, planned_count in started if ready <= now)])
        short += PER_REPLICA_RPS * serving < rps - 1e-6
    assert (short == 0) == looks_ahead


@settings(
    deadline=None,
    max_examples=8,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(small_fleets(), st.floats(0, 1))
def test_a_lower_forecast_changes_nothing(inputs: PlanInputs, share: float) -> None:
    lower = [
        forecast((0.0, [share * rps for rps in demand.rps]), (900.0, [0.0] * len(demand.rps)), name=key.split("/")[1])
        for key, demand in inputs.demand.items()
    ]
    assert decisions(planned(with_forecast(inputs, *lower))) == decisions(planned(inputs))


@given(
    st.lists(st.floats(0, 50), min_size=2, max_size=2),
    st.lists(st.tuples(st.floats(0, 1000), st.lists(st.floats(0, 50), min_size=2, max_size=2)), min_size=1, max_size=5),
    st.floats(0, 1500),
    st.floats(0, 500),
)
def test_to_look_further_never_finds_less_and_never_less_than_now(
    now: list[float], points: list[tuple[float, list[float]]], within_s: float, more_s: float
) -> None:
    points = sorted({after: (after, rps) for after, rps in points}.values())
    found = demand_ahead(forecast(*points), np.array(now), within_s)
    assert (found >= np.array(now)).all()
    assert (found <= np.maximum(now, np.max([rps for _, rps in points], axis=0)) + 1e-9).all()
    assert (demand_ahead(forecast(*points), np.array(now), within_s + more_s) >= found - 1e-9).all()


def document(**changes: Any) -> dict[str, Any]:
    one = {"namespace": "team", "service": "s", "percentile": 90, "points": [{"afterSeconds": 60, "rps": [1.0, 2.0]}]}
    return {"schemaVersion": 1, "services": [{**one, **changes}]}


@pytest.mark.parametrize(
    ("changes", "where", "said"),
    [
        ({"percentile": 20}, ("services", 0, "percentile"), "greater than or equal to 50"),
        ({"percentile": 100}, ("services", 0, "percentile"), "less than 100"),
        ({"points": []}, ("services", 0, "points"), "at least 1 item"),
        (
            {"points": [{"afterSeconds": 60, "rps": [1.0, float("nan")]}]},
            ("services", 0, "points", 0, "rps", 1),
            "finite",
        ),
        ({"points": [{"afterSeconds": 60, "rps": [-1.0]}]}, ("services", 0, "points", 0, "rps", 0), "equal to 0"),
        ({"points": [{"afterSeconds": -1, "rps": [1.0]}]}, ("services", 0, "points", 0, "afterSeconds"), "equal to 0"),
        (
            {"points": [{"afterSeconds": 60, "rps": [1.0]}, {"afterSeconds": 60, "rps": [1.0]}]},
            ("services", 0),
            r"points\[1\].afterSeconds is 60; accepted is more than 60",
        ),
        (
            {"points": [{"afterSeconds": 60, "rps": [1.0]}, {"afterSeconds": 90, "rps": []}]},
            ("services", 0),
            r"points\[1\].rps has 0 rates; accepted are 1",
        ),
    ],
)
def test_bad_numbers_are_refused_by_path(changes: dict[str, Any], where: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as refused:
        Forecast.model_validate(document(**changes))
    assert refused.value.errors()[0]["loc"] == where


def test_a_service_has_one_forecast() -> None:
    twice = {"schemaVersion": 1, "services": document()["services"] * 2}
    with pytest.raises(ValidationError, match=r"services\[1\] is team/s, which has a forecast already"):
        Forecast.model_validate(twice)


def test_a_forecast_of_nobody_or_of_other_buckets_is_refused() -> None:
    with pytest.raises(ValidationError, match="of team/other; accepted are team/s"):
        with_forecast(asked(1.0), forecast((60.0, [1.0, 1.0]), name="other"))
    with pytest.raises(ValidationError, match=r"points\[0\].rps: 3 values, but ModelProfile p has 2 buckets"):
        with_forecast(asked(1.0), forecast((60.0, [1.0, 1.0, 1.0])))


def test_a_plan_that_forgets_the_forecast_is_a_violation() -> None:
    inputs = asked(3.0, (200.0, [18.0, 0.0]))
    without = planned(asked(3.0))
    assert "demand" in {one.constraint for one in violations(inputs, without)}
    assert "demand" in {one.constraint for one in violations(asked(3.0), planned(inputs))}
