"""Waiting in the gateway on the wire: who is served first, who is refused, and what a key may claim."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx
import pytest

from gateway_testing.fake_engine import FakeEngine, fake_engine
from gateway_testing.harness import CHAT, PATIENCE_S, Gateway, eventually, gateway_for, post
from gateway_testing.tables import table
from llmfleet.api import LatencyCoefficients, RoutingTable
from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.gateway.keys import ApiKey, KeyRing, Priority, key_digest
from llmfleet.gateway.transport import Limits


def ring(**keys: ApiKey) -> KeyRing:
    """Keys by their text."""
    return KeyRing.of({key_digest(text.encode()) or b"": rights for text, rights in keys.items()})


async def ask(gateway: Gateway, content: str, key: str = "", **body: object) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await gateway.http.post("/v1/chat/completions", json=CHAT | {"messages": messages} | body, headers=headers)


async def waiting(gateway: Gateway, count: int) -> None:
    await eventually(lambda: gateway.plane.demand().services != [] and gateway.demand().waiting == count)


def served(engine: FakeEngine) -> list[str]:
    return [seen.body["messages"][0]["content"] for seen in engine.requests]


def one_at_a_time() -> RoutingTable:
    """A service whose prompts take long enough that an engine gets one after the other."""
    slow = LatencyCoefficients(ttft_base_ms=1, ttft_ms_per_input_token=100, tpot_base_ms=1, tpot_ms_per_running=0)
    objective = Objective(ttft=LatencyTarget(milliseconds=60_000), tpot=LatencyTarget(milliseconds=100))
    return table(fits={"fast": slow}).model_copy(update={"objective": objective})


async def served_after_waiting(asked: Mapping[str, tuple[str, str | None]], keys: KeyRing | None) -> list[str]:
    """The order in which requests that waited reach the engine. `asked`: content -> (key, service tier)."""
    async with fake_engine() as engine, gateway_for(keys=keys, routing=one_at_a_time()) as gateway:
        answers = []
        for number, (content, (key, tier)) in enumerate(asked.items()):
            body = {} if tier is None else {"service_tier": tier}
            answers.append(asyncio.ensure_future(ask(gateway, content.ljust(40), key, **body)))
            await waiting(gateway, number + 1)
        gateway.serve([engine], keys=keys, routing=one_at_a_time())
        assert [answer.status_code for answer in await asyncio.gather(*answers)] == [200] * len(asked)
        return [content.strip() for content in served(engine)]


async def test_an_engine_gets_no_more_than_keeps_it_busy() -> None:
    async with (
        fake_engine(tokens=3, delay_s=0.2, interval_s=0.1) as engine,
        gateway_for(engine, routing=one_at_a_time()) as gateway,
    ):
        answers = [asyncio.ensure_future(ask(gateway, "x" * 40, stream=True)) for _ in range(4)]
        await eventually(lambda: len(engine.requests) == 2 and gateway.demand().running == 2)
        assert gateway.demand().waiting == 2, "the second was sent when the first had a token, the third was not"
        assert [answer.status_code for answer in await asyncio.gather(*answers)] == [200] * 4


async def test_without_an_objective_nothing_is_held_back() -> None:
    free = one_at_a_time().model_copy(update={"objective": None})
    async with fake_engine(hang=True) as engine, gateway_for(engine, routing=free) as gateway:
        answers = [asyncio.ensure_future(ask(gateway, "x" * 40)) for _ in range(4)]
        await eventually(lambda: len(engine.requests) == 4)
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)


async def test_a_predicted_wait_beyond_the_deadline_is_refused_at_once() -> None:
    async with (
        fake_engine(tokens=2, delay_s=0.1) as engine,
        gateway_for(engine, routing=one_at_a_time()) as gateway,
    ):
        answers = [asyncio.ensure_future(ask(gateway, "x" * 40)) for _ in range(9)]
        await eventually(lambda: len(engine.requests) == 3)
        headers = {"x-llmfleet-deadline-ms": "40"}
        refused = await gateway.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "deadline_unreachable")
        assert [answer.status_code for answer in await asyncio.gather(*answers)] == [200] * 9


async def test_openai_s_service_tiers_are_classes() -> None:
    asked = {"flex": ("", "flex"), "none": ("", None), "auto": ("", "auto"), "priority": ("", "priority")}
    assert await served_after_waiting(asked, None) == ["priority", "none", "auto", "flex"]


async def test_a_key_bounds_what_its_requests_may_claim() -> None:
    keys = ring(gold=ApiKey("gold", max_priority=Priority.HIGH), tin=ApiKey("tin", max_priority=Priority.BATCH))
    asked = {"tin": ("tin", "priority"), "gold": ("gold", None), "gold-first": ("gold", "priority")}
    assert await served_after_waiting(asked, keys) == ["gold-first", "gold", "tin"]


async def test_tenants_of_one_class_take_turns() -> None:
    keys = ring(a=ApiKey("a"), b=ApiKey("b"))
    asked = {f"a{number}": ("a", None) for number in range(3)} | {"b0": ("b", None), "b1": ("b", None)}
    assert await served_after_waiting(asked, keys) == ["a0", "b0", "a1", "b1", "a2"]


async def test_an_engine_s_own_queue_is_not_jumped_without_the_right_to() -> None:
    keys = ring(gold=ApiKey("gold", max_priority=Priority.HIGH), iron=ApiKey("iron"))
    async with fake_engine() as engine, gateway_for(engine, keys=keys) as gateway:
        refused = await ask(gateway, "x", "iron", priority=-1)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
        for key, priority in (("iron", 5), ("gold", -1)):
            assert (await ask(gateway, "x", key, priority=priority)).status_code == 200
        assert [seen.body["priority"] for seen in engine.requests] == [5, -1]


async def test_a_request_that_waits_beyond_its_deadline_is_told_so() -> None:
    async with gateway_for() as gateway:
        refused = await gateway.http.post("/v1/chat/completions", json=CHAT, headers={"x-llmfleet-deadline-ms": "50"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "deadline_passed")
        assert int(refused.headers["retry-after"]) >= 1
        assert gateway.demand().waiting == 0


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "soon", "", "9999999999", "1e3", "\N{SUPERSCRIPT TWO}"])
async def test_a_deadline_that_is_no_number_of_milliseconds_is_refused_by_name(given: str) -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        headers = {b"x-llmfleet-deadline-ms": given.encode()}
        refused = await gateway.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-llmfleet-deadline-ms")


async def test_a_full_room_takes_a_tenant_that_has_little_in_it() -> None:
    keys = ring(flood=ApiKey("flood"), modest=ApiKey("modest"))
    async with fake_engine() as engine, gateway_for(keys=keys, limits=Limits(queue_length=3)) as gateway:
        flood = [asyncio.ensure_future(ask(gateway, f"flood-{number}", "flood")) for number in range(3)]
        await waiting(gateway, 3)
        over = await ask(gateway, "flood-3", "flood")
        assert (over.status_code, over.json()["error"]["code"]) == (429, "queue_full")
        modest = asyncio.ensure_future(ask(gateway, "modest", "modest"))
        assert (await flood[2]).status_code == 429
        gateway.serve([engine], keys=keys)
        assert [answer.status_code for answer in await asyncio.gather(*flood[:2], modest)] == [200] * 3


async def test_a_rate_that_is_used_up_is_said_with_the_time_to_wait() -> None:
    keys = ring(slow=ApiKey("slow", requests_per_second=0.5), other=ApiKey("other"))
    async with fake_engine() as engine, gateway_for(engine, keys=keys) as gateway:
        answers = [await ask(gateway, "x", key) for key in ("slow", "slow", "other")]
        assert [answer.status_code for answer in answers] == [200, 429, 200]
        error = answers[1].json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "rate of requests" in error["message"]
        assert answers[1].headers["retry-after"] == "2"
        assert sum(gateway.demand().arrived) == 2, "what a key may not ask for is no demand"


async def test_a_key_has_no_more_requests_at_once_than_it_may_however_they_end() -> None:
    keys = ring(two=ApiKey("two", concurrent_requests=2))
    async with fake_engine() as engine, gateway_for(keys=keys) as gateway:
        held = [asyncio.ensure_future(ask(gateway, f"held-{number}", "two")) for number in range(2)]
        await waiting(gateway, 2)
        over = await ask(gateway, "over", "two")
        assert (over.status_code, over.json()["error"]["code"]) == (429, "concurrency_exceeded")
        assert "may have 2 requests at once" in over.json()["error"]["message"]
        held[0].cancel()
        await waiting(gateway, 1)
        held[0] = asyncio.ensure_future(ask(gateway, "instead", "two"))
        await waiting(gateway, 2)
        gateway.serve([engine], keys=keys)
        assert [answer.status_code for answer in await asyncio.gather(*held)] == [200] * 2
        assert [(await ask(gateway, "after", "two")).status_code for _ in range(3)] == [200] * 3


async def test_tokens_of_an_answer_count_against_the_rate() -> None:
    keys = ring(slow=ApiKey("slow", tokens_per_minute=60.0))
    async with fake_engine(tokens=100) as engine, gateway_for(engine, keys=keys) as gateway:
        assert (await ask(gateway, "x", "slow", stream=True)).status_code == 200
        refused = await ask(gateway, "x", "slow")
        assert (refused.status_code, "rate of tokens" in refused.text) == (429, True)


async def test_a_key_without_any_service_is_refused_before_its_body_is_read() -> None:
    async with fake_engine() as engine, gateway_for(engine, keys=ring(right=ApiKey("right"))) as gateway:
        head = post(CHAT, "authorization: Bearer wrong").partition(b"\r\n\r\n")[0]
        reader, writer = await gateway.raw(head.replace(b"content-length: ", b"content-length: 9999") + b"\r\n\r\n")
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), PATIENCE_S)
        writer.close()
        assert b"401" in answer
        assert b"invalid_api_key" in answer
