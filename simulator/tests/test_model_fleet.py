"""Engine models side by side: who is sent where, what is told, and requests that move while they run."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.simulator import Arrival, EngineSpec, StepTime
from llmfleet.simulator.fleet import ModelFleet

SPEC = EngineSpec(step=StepTime(overhead_ms=10.0), kv_blocks=100, block_tokens=16)
"""Every step takes 10 ms, whatever is in it."""


class Scripted:
    """Sends request n to `engines[n]`; at its first tick moves what it is told to."""

    def __init__(self, engines: list[str], move: tuple[int, str] | None = None) -> None:
        self.engines = engines
        self.move = move
        self.told: list[str] = []
        self.loads: list[tuple[int, int, int]] = []

    def send(self, number: int, arrival: Arrival) -> str:
        return self.engines[number]

    def first_token(self, number: int) -> None:
        self.told.append(f"first {number}")

    def finished(self, number: int) -> None:
        self.told.append(f"end {number}")

    def tick(self, fleet: ModelFleet) -> None:
        engine = fleet.engines["a"]
        self.loads.append((engine.waiting, engine.running, engine.kv_used_tokens))
        if self.move is not None:
            fleet.move(self.move[0], self.move[1], copy_ms=0.0, gap_ms=25.0)
            self.move = None


def test_requests_run_where_they_are_sent_and_their_router_hears_in_order() -> None:
    chooser = Scripted(["a", "b", "a"])
    fleet = ModelFleet({"a": SPEC, "b": SPEC})
    outcomes = fleet.run([Arrival(0.0, 10, 3), Arrival(0.001, 10, 1), Arrival(0.002, 10, 1)], chooser)
    assert [one.engine for one in outcomes] == ["a", "b", "a"]
    assert [one.ttft_ms for one in outcomes] == [10.0, 10.0, 18.0]
    assert [one.total_ms for one in outcomes] == [30.0, 10.0, 18.0]
    assert chooser.told == ["first 0", "first 1", "end 1", "first 2", "end 2", "end 0"]


def test_a_router_hears_how_busy_an_engine_is() -> None:
    chooser = Scripted(["a", "a"])
    ModelFleet({"a": SPEC}, tick_ms=25.0).run([Arrival(0.0, 100, 10), Arrival(0.0, 1500, 2)], chooser)
    # Of 1,600 tokens of KV the first holds 7 blocks, so the second, 94 blocks, waits until it is done.
    assert chooser.loads[0] == (1, 1, 112)
    assert chooser.loads[-1] == (0, 0, 0)


def test_a_request_that_moves_keeps_its_tokens_and_loses_the_gap() -> None:
    stays = ModelFleet({"a": SPEC, "b": SPEC}, tick_ms=50.0).run([Arrival(0.0, 10, 100)], Scripted(["a"]))
    moves = ModelFleet({"a": SPEC, "b": SPEC}, tick_ms=50.0).run(
        [Arrival(0.0, 10, 100)], Scripted(["a"], move=(0, "b"))
    )
    assert (moves[0].engine, moves[0].moves) == ("b", 1)
    assert moves[0].ttft_ms == stays[0].ttft_ms
    assert moves[0].total_ms - stays[0].total_ms == pytest.approx(25.0)


def test_a_request_that_is_done_before_its_copy_stays_where_it_was() -> None:
    class Late(Scripted):
        def tick(self, fleet: ModelFleet) -> None:
            if self.move is not None:
                fleet.move(0, "b", copy_ms=10_000.0, gap_ms=25.0)
                self.move = None

    [outcome] = ModelFleet({"a": SPEC, "b": SPEC}, tick_ms=50.0).run([Arrival(0.0, 10, 20)], Late(["a"], move=(0, "b")))
    assert (outcome.engine, outcome.moves, outcome.total_ms) == ("a", 0, 200.0)


def test_a_move_frees_the_cache_that_somebody_waits_for() -> None:
    arrivals = [Arrival(0.0, 800, 700), Arrival(0.0, 1500, 10)]
    stays = ModelFleet({"a": SPEC, "b": SPEC}, tick_ms=50.0).run(arrivals, Scripted(["a", "a"]))
    moves = ModelFleet({"a": SPEC, "b": SPEC}, tick_ms=50.0).run(arrivals, Scripted(["a", "a"], move=(0, "b")))
    assert stays[1].ttft_ms > 6900.0
    assert moves[1].ttft_ms < 200.0


def test_a_request_that_does_not_run_cannot_be_moved() -> None:
    with pytest.raises(ValueError, match="request 7: nowhere in the fleet"):
        ModelFleet({"a": SPEC}).move(7, "a", copy_ms=0.0, gap_ms=0.0)


def test_arrivals_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"arrivals\[1\].at_s: got 1, before"):
        ModelFleet({"a": SPEC}).run([Arrival(2.0, 1, 1), Arrival(1.0, 1, 1)], Scripted(["a", "a"]))


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200), st.booleans()), min_size=1, max_size=25),
    st.integers(0, 2**32),
)
@settings(max_examples=25)
def test_whoever_moves_where_and_how_often_all_are_answered_and_all_blocks_come_back(
    sizes: list[tuple[int, int, bool]], seed: int
) -> None:
    chance = random.Random(seed)

    class Restless(Scripted):
        def send(self, number: int, arrival: Arrival) -> str:
            there.add(number)
            return super().send(number, arrival)

        def tick(self, fleet: ModelFleet) -> None:
            for number in sorted(there - done - fleet.moving.keys()):
                if chance.random() < 0.3:
                    fleet.move(number, chance.choice("abc"), copy_ms=chance.choice((0.0, 30.0)), gap_ms=5.0)

        def finished(self, number: int) -> None:
            done.add(number)

    there: set[int] = set()
    done: set[int] = set()
    # Few blocks, so that some are preempted as well.
    tight = SPEC.model_copy(update={"kv_blocks": 40})
    fleet = ModelFleet(dict.fromkeys("abc", tight), tick_ms=20.0)
    arrivals = [Arrival(0.01 * number, *size[:2]) for number, size in enumerate(sizes)]
    outcomes = fleet.run(arrivals, Restless(["a" if first else "b" for *_, first in sizes]))
    assert done == set(range(len(sizes)))
    for size, outcome in zip(sizes, outcomes, strict=True):
        assert 0 < outcome.ttft_ms <= outcome.total_ms
        assert outcome.total_ms - outcome.ttft_ms >= (size[1] - 1) * 10.0
    for engine in fleet.engines.values():
        assert (engine.idle, engine.running, engine.kv_used_tokens) == (True, 0, 0)
