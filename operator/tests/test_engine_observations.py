"""What gateways tell adds up to what engines did, and what is only half known teaches nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.api import (
    ALL_SERVICES,
    Buckets,
    DemandReport,
    ObservedCell,
    ObservedSums,
    ObservedVariant,
    Part,
    ServiceDemand,
    VariantLoad,
)
from llmfleet.operator.observations import EngineObserver

BUCKETS = Buckets(input_tokens=[100, 1000], output_tokens=[10, 100])
KEY = "team/chat"


class Gateway:
    """One gateway process that serves `chat`."""

    def __init__(self, number: int, started_s: float) -> None:
        self.number = number
        self.started_s = started_s
        self.counts: Counter[int] = Counter()
        self.request_seconds = 0.0

    def serve(self, bucket: int, seconds: float) -> None:
        """One request that ends now, alone among this gateway's own."""
        self.counts[bucket] += 1
        self.request_seconds += seconds

    def report(self, now_s: float, *, engines: int = 2, detail: bool = True, service: str = "chat") -> DemandReport:
        told: dict[str, Any] = {}
        if detail:
            rows = [ObservedSums(b, 0, n, float(n), 50 * n, 20.0 * n, 9 * n, 90.0 * n) for b, n in self.counts.items()]
            told = {"observed": {"l4": rows}, "loads": {"l4": VariantLoad(engines, self.request_seconds)}}
        demand = ServiceDemand(
            namespace="team", service=service, buckets=BUCKETS, arrived=[0, 0], completed=[0] * 4, **told
        )
        return DemandReport(instance_id=f"g{self.number}", uptime_seconds=now_s - self.started_s, services=[demand])


def requests(seen: Sequence[ObservedVariant]) -> Counter[int]:
    found: Counter[int] = Counter()
    for one in seen:
        for cell in one.cells:
            found[cell.bucket] += cell.requests
    return found


def rounds(observer: EngineObserver, gateways: Sequence[Gateway], now_s: float, **changes: Any) -> None:
    observer.record({str(g.number): g.report(now_s, **changes) for g in gateways}, ALL_SERVICES, now_s)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("serve"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("round"), st.just(0), st.just(0)),
        st.tuples(st.just("silent"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("start"), st.just(0), st.just(0)),
        st.tuples(st.just("restart"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("take"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
@settings(max_examples=100)
def test_every_request_counts_once_but_those_of_rounds_between_which_a_gateway_was_lost(
    steps: list[tuple[str, int, int]],
) -> None:
    now_s, observer = 0.0, EngineObserver()
    gateways = [Gateway(0, 0.0)]
    rounds(observer, gateways, now_s)
    truth: Counter[int] = Counter()
    since_round: Counter[int] = Counter()
    lost, round_s = False, 0.0
    found: Counter[int] = Counter()
    for what, which, bucket in [*steps, ("round", 0, 0), ("take", 0, 0)]:
        now_s += 1.0
        gateway = gateways[which % len(gateways)]
        if what == "serve":
            gateway.serve(bucket, 0.5)
            since_round[bucket] += 1
        elif what == "start":
            gateways.append(Gateway(len(gateways) + 100 * int(now_s), now_s))
        elif what == "restart":
            gateways[gateways.index(gateway)] = Gateway(1000 + 100 * int(now_s), now_s)
            if gateway.started_s <= round_s:
                lost = True
            else:
                # It was never heard: nobody can miss it.
                since_round -= gateway.counts
        elif what == "silent":
            reports = {str(g.number): None if g is gateway else g.report(now_s) for g in gateways}
            observer.record(reports, ALL_SERVICES, now_s)
        elif what == "round":
            rounds(observer, gateways, now_s)
            if not lost:
                truth += since_round
            since_round, lost, round_s = Counter(), False, now_s
        else:
            found += requests(observer.take())
    assert found == truth


def test_what_other_gateways_had_in_the_engines_is_around_a_request_too() -> None:
    observer, gateways = EngineObserver(), [Gateway(0, 0.0), Gateway(1, 0.0), Gateway(2, 0.0)]
    rounds(observer, gateways, 0.0)
    gateways[0].serve(0, 1.0)
    gateways[1].request_seconds += 60.0
    gateways[2].request_seconds += 20.0
    rounds(observer, gateways, 10.0)
    [one] = observer.take()
    assert (one.service, one.variant, one.buckets) == (KEY, "l4", BUCKETS)
    # 80 request seconds in 10 s are 8 at once, on two engines.
    assert one.cells == [ObservedCell(0, 1, 1.0 + 4.0, 50, 20.0, 9, 90.0)]


def test_equal_loads_add_up_and_others_stay_apart() -> None:
    observer, gateways = EngineObserver(), [Gateway(0, 0.0), Gateway(1, 0.0)]
    rounds(observer, gateways, 0.0)
    for number, load in enumerate((0.0, 0.5, 300.0), start=1):
        gateways[0].serve(3, 0.0)
        gateways[1].request_seconds += load
        rounds(observer, gateways, 10.0 * number)
    [one] = observer.take()
    assert [cell.requests for cell in one.cells] == [2, 1]
    assert [cell.concurrency for cell in one.cells] == pytest.approx([1.0125, 16.0])
    assert one.cells[0].decode_ms == 180.0
    observer.give_back([one])
    assert observer.take() == [one]
    assert observer.take() == []


@pytest.mark.parametrize(
    "changes", [{"detail": False}, {"engines": 0}, {"take_turns": True}, {"older": True}, {"nobody": True}]
)
def test_a_round_of_which_not_all_is_known_teaches_nothing(changes: dict[str, bool]) -> None:
    observer, gateways = EngineObserver(), [Gateway(0, 0.0), Gateway(1, 0.0)]
    rounds(observer, gateways, 0.0)
    gateways[0].serve(0, 1.0)
    reports: dict[str, DemandReport | None] = {str(g.number): g.report(10.0) for g in gateways}
    if "detail" in changes:
        # A gateway of an older version tells nothing of its own requests.
        reports["1"] = gateways[1].report(10.0, detail=False)
    elif "engines" in changes:
        reports = {str(g.number): g.report(10.0, engines=0) for g in gateways}
    elif "older" in changes:
        reports["2"] = Gateway(2, -100.0).report(10.0)
    elif "nobody" in changes:
        reports = {}
    observer.record(reports, ALL_SERVICES, 10.0, take_turns="take_turns" in changes)
    assert observer.take() == []


def test_services_of_other_parts_are_compared_with_when_their_own_was_told_last() -> None:
    observer, gateway = EngineObserver(), Gateway(0, 0.0)
    rounds(observer, [gateway], 0.0)
    gateway.serve(0, 1.0)
    elsewhere = next(Part(number, 7) for number in range(7) if not Part(number, 7).holds(KEY))
    observer.record({"0": gateway.report(5.0, detail=False)}, elsewhere, 5.0)
    assert observer.take() == []
    mine = next(Part(number, 7) for number in range(7) if Part(number, 7).holds(KEY))
    observer.record({"0": gateway.report(10.0)}, mine, 10.0)
    assert requests(observer.take()) == {0: 1}


def test_sums_that_began_anew_and_buckets_that_are_none_do_no_harm() -> None:
    observer, gateway = EngineObserver(), Gateway(0, 0.0)
    for _ in range(5):
        gateway.serve(0, 1.0)
    rounds(observer, [gateway], 0.0)
    gateway.counts, gateway.request_seconds = Counter({0: 2, 9: 1}), 0.5
    rounds(observer, [gateway], 10.0)
    assert requests(observer.take()) == {0: 2}
