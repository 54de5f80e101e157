"""Whether an engine has a place for one more request of a service with an objective."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_testing.tables import FIT
from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.gateway.fleet import Engine
from llmfleet.gateway.policy import EngineReport
from llmfleet.gateway.policy.holding import HOLD_MS, has_place, hold_ms
from llmfleet.gateway.policy.replicas import Replica
from llmfleet.gateway.policy.sizes import Prediction

# FIT: 50 ms and 0.1 ms per token of the prompt, 20 ms and 1 ms per running request for each token of the answer.
OBJECTIVE = Objective(ttft=LatencyTarget(milliseconds=2000), tpot=LatencyTarget(milliseconds=40))
SMALL = Prediction(100.0, 50.0)


def replica(*prompts: float, started: int = 0, now: float = 0.0) -> Replica:
    """An engine with requests of these prompts, the first `started` of which have a first token."""
    engine = Replica(Engine("e", "h", 1, "fast"), FIT)
    for number, tokens in enumerate(prompts):
        engine.send(number, tokens, now)
    for number in range(started):
        engine.start(number, now)
    return engine


def place(engine: Replica, now: float = 0.0, *, batch: bool = False, prediction: Prediction = SMALL) -> bool:
    return has_place(engine, prediction, OBJECTIVE, now, batch=batch)


def test_an_idle_engine_has_a_place_for_everybody() -> None:
    assert place(replica())
    assert place(replica(), batch=True)
    assert place(replica(), prediction=Prediction(1e6, 10.0))


def test_an_engine_gets_what_keeps_it_busy_and_no_more() -> None:
    assert place(replica(1000.0)), "100 ms"
    assert place(replica(1000.0, 900.0)), "190 ms"
    assert not place(replica(1000.0, 1100.0)), "210 ms"
    assert place(replica(1000.0, 1100.0), now=0.05), "160 ms are left"
    assert place(replica(5000.0, 5000.0, started=2)), "nobody waits for a first token"


def test_less_is_allowed_where_the_objective_is_tight() -> None:
    tight = OBJECTIVE.model_copy(update={"ttft": LatencyTarget(milliseconds=200)})
    assert (hold_ms(OBJECTIVE), hold_ms(tight)) == (HOLD_MS, 50.0)
    assert not has_place(replica(1000.0), SMALL, tight, 0.0, batch=False)


def test_an_engine_whose_cache_is_full_by_its_own_report_gets_no_second_one_to_wait() -> None:
    for waiting, expected in (((), True), ((10.0,), False)):
        engine = replica(500.0, *waiting, started=1)
        engine.hear(EngineReport(0.0, 0, 1, 1000, 990), 100.0)
        assert place(engine) is expected


def test_an_engine_with_an_overdue_first_token_has_a_queue_whatever_the_fit_says() -> None:
    engine = replica(10.0)
    assert place(engine, now=0.2)
    assert not place(engine, now=0.3)
    engine.start(0, 0.3)
    assert place(engine, now=0.3)


def test_batch_leaves_headroom_to_others() -> None:
    assert place(replica(500.0), batch=True), "50 ms"
    assert not place(replica(1100.0), batch=True), "more than half of what others may have"
    assert place(replica(*[1.0] * 12, started=12), batch=True), "32 ms per token"
    assert not place(replica(*[1.0] * 13, started=13), batch=True), "more than 80 % of 40 ms"
    for used, expected in ((600, True), (800, False)):
        engine = replica(float(used), started=1)
        engine.hear(EngineReport(0.0, 0, 1, 1000, used), 100.0)
        assert place(engine, batch=True) is expected


@given(
    prompts=st.lists(st.floats(1, 5000), max_size=8),
    started=st.integers(0, 8),
    now=st.floats(0, 10),
    size=st.floats(1, 5000),
)
def test_where_batch_has_a_place_so_has_everybody_who_is_not_overdue(
    prompts: list[float], started: int, now: float, size: float
) -> None:
    engine = replica(*prompts, started=min(started, len(prompts)))
    prediction = Prediction(size, 10.0)
    if place(engine, now, batch=True, prediction=prediction) and not place(engine, now, prediction=prediction):
        sent_s, tokens = engine.oldest
        assert (now - sent_s) * 1e3 > FIT.ttft_base_ms + FIT.ttft_ms_per_input_token * tokens


@pytest.mark.parametrize("batch", [True, False])
def test_an_engine_with_nobody_on_it_always_has_a_place(batch: bool) -> None:
    engine = replica(100.0, started=1)
    engine.leave(0, 100.0, 1.0)
    engine.hear(EngineReport(1.0, 0, 0, 10, 10), 100.0)
    assert place(engine, 1.0, batch=batch)
