"""Streams move where that saves more than it costs, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_testing.tables import engines, fleet, table
from llmfleet.gateway.policy import EngineReport, RequestShape, Router
from llmfleet.gateway.policy.reschedule import SOON_TOKENS, Move, MoveCost, ReplicaLoad, Stream, moves

COST = MoveCost()


def load(
    name: str, running: float, demand: float, *, kv: float = 10_000, waiting: float = 0, high: int = 0
) -> ReplicaLoad:
    return ReplicaLoad(name, running, waiting, kv, demand, slope_ms=0.5, stay_ms=20_000, high=high)


def stream(name: str, replica: str, tokens: float = 500, remaining: float = 400) -> Stream[str]:
    return Stream(name, replica, tokens, remaining)


def pairs(found: list[Move[str]]) -> list[tuple[str, str, str]]:
    return [(move.stream.name, move.stream.replica, move.to) for move in found]


def test_the_least_free_replica_gives_to_the_freest() -> None:
    replicas = [load("full", 20, 9000), load("half", 10, 5000), load("empty", 1, 300)]
    assert pairs(moves(replicas, [stream("x", "full")], COST)) == [("x", "full", "empty")]


def test_freeness_is_llumnix_formula() -> None:
    # (M - sum of virtual usage) / batch: with 10,000 tokens, 4 requests that use or demand 6,000 together; and with
    # one of high priority, whose headroom counts as used.
    assert load("a", 4, 6000).freeness(1600) == 1000
    assert load("a", 4, 6000, high=1).freeness(1600) == 600
    assert load("a", 4, 12_000).freeness(1600) == -500


def test_nothing_moves_when_all_are_full() -> None:
    replicas = [load("a", 30, 9990, waiting=5), load("b", 28, 9900, waiting=3), load("c", 25, 9800)]
    streams = [stream(str(n), one.id) for one in replicas for n in range(10)]
    assert moves(replicas, streams, COST) == []


def test_nothing_moves_between_equals() -> None:
    assert moves([load("a", 8, 4000), load("b", 8, 4000)], [stream("x", "a"), stream("y", "b")], COST) == []


def test_an_answer_that_is_nearly_done_is_not_worth_a_gap() -> None:
    replicas = [load("a", 8, 4000), load("b", 4, 2000)]
    assert moves(replicas, [stream("x", "a", remaining=5)], COST) == []
    assert pairs(moves(replicas, [stream("x", "a", remaining=500)], COST)) == [("x", "a", "b")]


def test_a_slow_network_makes_moving_not_worth_it() -> None:
    replicas = [load("a", 20, 6000), load("b", 17, 4500)]
    one = [stream("x", "a", tokens=1000)]
    assert moves(replicas, one, COST)
    assert moves(replicas, one, replace(COST, copy_ms_per_token=20.0)) == []


def test_a_request_that_waits_for_room_is_let_in_by_moving_another() -> None:
    # Batches are equal, so only the KV cache speaks: `a` has a request of 3,000 tokens waiting and no room for it.
    replicas = [load("a", 4, 11_500, waiting=1), load("b", 4, 5000)]
    assert pairs(moves(replicas, [stream("x", "a", tokens=2500)], COST)) == [("x", "a", "b")]
    assert moves([load("a", 4, 8500), load("b", 4, 5000)], [stream("x", "a", tokens=2500)], COST) == []


def test_others_move_away_from_a_request_of_high_priority() -> None:
    beside = [load("a", 5, 9000, high=1), load("b", 5, 5000)]
    streams = [stream("x", "a", tokens=1500)]
    assert pairs(moves(beside, streams, COST)) == [("x", "a", "b")]
    assert moves([replace(one, high=0) for one in beside], streams, COST) == []


def test_nobody_moves_to_a_replica_that_leaves() -> None:
    replicas = [load("a", 20, 9000), replace(load("b", 1, 100), open=False)]
    assert moves(replicas, [stream("x", "a")], COST) == []


REPLICAS = st.lists(
    st.builds(
        lambda running, share, waiting, high: load("", running, share * 10_000, waiting=waiting, high=int(high)),
        st.integers(0, 40),
        st.floats(0, 1.5),
        st.integers(0, 10),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(REPLICAS, st.data())
def test_every_move_pays_and_fits_and_is_not_taken_back(drawn: list[ReplicaLoad], data: st.DataObject) -> None:
    replicas = {f"r{n}": replace(one, id=f"r{n}") for n, one in enumerate(drawn)}
    streams = [
        stream(f"s{n}", data.draw(st.sampled_from(sorted(replicas))), tokens, remaining)
        for n, (tokens, remaining) in enumerate(
            data.draw(st.lists(st.tuples(st.integers(1, 6000), st.integers(0, 3000)), max_size=10))
        )
    ]
    found = moves(list(replicas.values()), streams, COST)
    took_part = [end for move in found for end in (move.stream.replica, move.to)]
    assert len(took_part) == len(set(took_part))
    assert [move.saves_ms for move in found] == sorted((move.saves_ms for move in found), reverse=True)
    for move in found:
        source, target = replicas[move.stream.replica], replicas[move.to]
        there = replace(target, running=target.running + 1, demand_tokens=target.demand_tokens + move.stream.tokens)
        assert move.saves_ms > 0
        assert there.room(COST.headroom_tokens) >= SOON_TOKENS * there.running
        here = replace(source, running=source.running - 1, demand_tokens=source.demand_tokens - move.stream.tokens)
        # Nothing would move back at once.
        back = replace(move.stream, replica=move.to)
        assert moves([here, there], [back], COST) == []


@given(st.integers(2, 40), st.integers(0, 40), st.integers(1, 4000))
def test_moving_one_by_one_comes_to_rest(first: int, second: int, tokens: int) -> None:
    counts = {"a": first, "b": second}
    for _ in range(100):
        replicas = [load(name, count, count * 100.0) for name, count in counts.items()]
        found = moves(replicas, [stream(name, name, tokens=100, remaining=tokens) for name in counts], COST)
        if not found:
            break
        counts[found[0].stream.replica] -= 1
        counts[found[0].to] += 1
    else:
        pytest.fail("it never came to rest")
    assert sum(counts.values()) == first + second


def test_the_router_names_streams_and_engines() -> None:
    router = Router(lambda: 100.0, "i")
    router.update(fleet(table({"a": 1.0}, replicas={"a": 2}), engines({"a": 2})))
    tickets = []
    for _ in range(8):
        ticket = router.admit("team/chat", RequestShape(0, prompt_tokens=100, max_output_tokens=400))
        router.assign(ticket)
        router.started(ticket)
        tickets.append(ticket)
    here = [ticket for ticket in tickets if ticket.replica is not None and ticket.replica.engine.id == "a-0"]
    assert router.rebalance("team/chat", dict.fromkeys(tickets, 10), {}) == []
    for ticket in tickets:
        if ticket not in here:
            router.completed(ticket, None)
    for name, used in (("a-0", 9000), ("a-1", 100)):
        router.report(name, EngineReport(100.0, 0, 4 if name == "a-0" else 0, 10_000, used))
    [(ticket, engine)] = router.rebalance("team/chat", dict.fromkeys(here, 10), {})
    assert ticket in here
    assert engine.id == "a-1"
    assert router.rebalance("team/nobody", {}, {}) == []


def test_the_published_vector_of_llumnix() -> None:
    # rescheduling_policy_test.go of llumnix-project/llumnix, unit scope: instances of 100 with 50 used and so much
    # waiting; the third must not be scheduled, the fourth has not reported for too long. It pairs the one with 100
    # waiting and the one with 60 with the two that have 10. Here in thousands of tokens, ten requests each.
    waiting = {"1": 10, "2": 100, "3": 2, "4": 1, "5": 10, "6": 60}
    replicas = [
        replace(
            load(name, 10, 1000.0 * (50 + demand), waiting=demand // 10),
            kv_tokens=100_000,
            open=name not in ("3", "4"),
        )
        for name, demand in waiting.items()
    ]
    streams = [stream(f"s{one.id}", one.id, tokens=4000) for one in replicas]
    found = moves(replicas, streams, COST)
    assert {move.stream.replica for move in found} == {"2", "6"}
    assert {move.to for move in found} == {"1", "5"}
