"""Why a request went where it went: told as data, and only to a key that may know."""

from __future__ import annotations

import json

import pytest

from gateway_testing.fake_engine import fake_engine
from gateway_testing.harness import CHAT, gateway_for
from gateway_testing.tables import FIT, engines, fleet, table
from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.gateway.keys import ApiKey, KeyRing, key_digest
from llmfleet.gateway.policy import RequestShape, Router, Ticket


def router_with(fractions: dict[str, float], replicas: dict[str, int], objective: Objective | None = None) -> Router:
    router = Router(lambda: 0.0, "i")
    routing = table(fractions, replicas=replicas).model_copy(update={"objective": objective})
    router.update(fleet(routing, engines(replicas)))
    return router


def asked(router: Router, shape: RequestShape) -> Ticket:
    ticket = router.admit("team/chat", shape)
    ticket.explains = True
    assert router.assign(ticket) is not None
    return ticket


def test_a_decision_names_what_was_compared_and_what_was_predicted() -> None:
    router = router_with({"a": 0.75, "b": 0.25}, {"a": 2, "b": 1})
    first = asked(router, RequestShape(0, prompt_tokens=100, max_output_tokens=5)).decision
    second = asked(router, RequestShape(0, prompt_tokens=100, max_output_tokens=5, chain=(1, 2))).decision
    assert first is not None
    assert second is not None
    assert (dict(first.weights), first.due, first.variant) == ({"a": 0.75, "b": 0.25}, "a", "a")
    [taken, other] = first.candidates
    assert {taken.engine, other.engine} == {"a-0", "a-1"}
    # Before the request: nobody was there.
    assert (taken.ttft_ms, taken.tpot_ms, taken.running) == (FIT.ttft_base_ms + 10, FIT.tpot_base_ms, 0)
    assert second.candidates[0].engine != taken.engine


def test_a_request_that_spilled_over_says_whose_turn_it_was() -> None:
    tight = Objective(ttft=LatencyTarget(milliseconds=200), tpot=LatencyTarget(milliseconds=100))
    router = router_with({"a": 1.0}, {"a": 1, "b": 1}, tight)
    asked(router, RequestShape(0, prompt_tokens=1400, max_output_tokens=5))
    decision = asked(router, RequestShape(0, prompt_tokens=500, max_output_tokens=5)).decision
    assert decision is not None
    assert (decision.due, decision.variant) == ("a", "b")


def test_its_text_is_one_line_of_json_with_few_replicas_of_many() -> None:
    router = router_with({"a": 1.0}, {"a": 40})
    decision = asked(router, RequestShape(0, prompt_tokens=100, max_output_tokens=5)).decision
    assert decision is not None
    text = decision.text()
    assert "\n" not in text
    assert len(text) < 1000
    assert len(json.loads(text)["candidates"]) == 4


def test_who_does_not_ask_costs_no_reasons() -> None:
    router = router_with({"a": 1.0}, {"a": 2})
    ticket = router.admit("team/chat", RequestShape(0, prompt_tokens=100))
    router.assign(ticket)
    assert ticket.decision is None


@pytest.mark.parametrize("stream", [False, True])
async def test_only_a_key_with_the_right_is_told(stream: bool) -> None:
    keys = KeyRing.of(
        {
            key_digest(b"may") or b"": ApiKey("may", decisions=True),
            key_digest(b"may-not") or b"": ApiKey("may-not"),
        }
    )
    async with fake_engine() as engine, gateway_for(engine, keys=keys) as gateway:
        told = {}
        for key, ask in (("may", True), ("may-not", True), ("may", False)):
            headers = {"authorization": f"Bearer {key}"} | ({"x-llmfleet-decision": "1"} if ask else {})
            answer = await gateway.http.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers=headers)
            assert answer.status_code == 200
            told[key, ask] = answer.headers.get("x-llmfleet-decision")
        assert all(not any(name == "x-llmfleet-decision" for name in seen.headers) for seen in engine.requests)
    decision = json.loads(told["may", True] or "")
    assert decision["variant"] == "fast"
    assert len(decision["candidates"]) == 1
    assert told["may-not", True] is told["may", False] is None
