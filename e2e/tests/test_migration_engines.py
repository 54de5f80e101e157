"""Running requests move between two real vLLMs, and their clients get what they would have got.

One pair of engines, in float32, serves all tests of this file; after each of them both engines have all their blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from e2e.migration import cases
from e2e.migration.compare import differences
from e2e.migration.faults import Unreliable
from e2e.migration.leg import Call
from e2e.migration.pair import Pair, start_pair
from e2e.migration.rig import Rig
from llmfleet.migration.coordinator import Result
from llmfleet.migration.course import migrate

pytestmark = [
    pytest.mark.node,
    pytest.mark.timeout(300),
    pytest.mark.long(90),
    pytest.mark.xdist_group("engine-pair"),
]

PROMPT = cases.prompt_tokens(300)
ATTEMPTS = 10
"""On a busy machine a request may end before it has moved."""
TEXT = "Tell me all about the sea, and about ships. " * 5
CALLS: dict[str, Call] = {
    **{name: cases.completion(parameters, PROMPT) for name, parameters in cases.SAMPLING.items()},
    **{name: cases.completion(parameters, PROMPT) for name, parameters in cases.GRAMMARS.items()},
    "logprobs": cases.completion({"temperature": 0, "logprobs": 3}, PROMPT),
    "completion, whole": cases.completion(cases.SAMPLING["all penalties, seed"], PROMPT, streamed=False),
    "logprobs, whole": cases.completion({"temperature": 0, "logprobs": 2}, PROMPT, streamed=False),
    "chat": cases.chat(cases.SAMPLING["seed"], TEXT),
    "chat, logprobs": cases.chat({"temperature": 0, "logprobs": True, "top_logprobs": 2}, TEXT),
    "chat, whole": cases.chat(cases.SAMPLING["top-p, top-k"], TEXT, streamed=False),
    "chat, tool": cases.chat({**cases.SAMPLING["seed"], **cases.TOOLS}, TEXT),
    "chat, tool, whole": cases.chat({**cases.SAMPLING["seed"], **cases.TOOLS}, TEXT, streamed=False),
    "response": cases.response({"temperature": 0}, TEXT),
    "response, whole": cases.response({"temperature": 0}, TEXT, streamed=False),
}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with start_pair("float32") as pair:
        yield pair


@pytest.fixture
async def rig(pair: Pair) -> AsyncIterator[Rig]:
    async with Rig.of(pair) as rig:
        yield rig
        assert await rig.held() == []


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_an_answer_that_moves_is_the_answer_that_stays(rig: Rig, call: Call) -> None:
    expected = await rig.undisturbed(call)
    assert expected.error is None
    for _ in range(ATTEMPTS):
        transcript, (outcome,) = await rig.moved(call)
        assert [str(one) for one in differences(expected, transcript)] == []
        if outcome.result is Result.MOVED:
            break
    assert outcome.result is Result.MOVED, outcome
    assert outcome.computed_tokens == 0, "all of the KV cache came along"
    assert transcript.legs[-1] == "b"


@pytest.mark.parametrize("stop_at", [30, 45, 60])
async def test_a_stop_string_is_found_across_the_cut(rig: Rig, stop_at: int) -> None:
    plain = await rig.undisturbed(cases.completion({"temperature": 0}, PROMPT))
    text: Any = plain.answer.fields[(0, "text")]
    call = cases.completion({"temperature": 0, "stop": [text[stop_at : stop_at + 24]]}, PROMPT)
    expected = await rig.undisturbed(call)
    assert expected.answer.finish[0][0] == "stop"
    transcript, _ = await rig.moved(call, at=[stop_at - 2])
    assert [str(one) for one in differences(expected, transcript)] == []


@pytest.mark.parametrize("max_tokens", [13, 21, 29, 37])
async def test_an_answer_that_ends_while_it_moves_ends_as_it_would_have(rig: Rig, max_tokens: int) -> None:
    call = cases.completion({**cases.SAMPLING["seed"], "max_tokens": max_tokens}, PROMPT)
    expected = await rig.undisturbed(call)
    transcript, _ = await rig.moved(call)
    assert [str(one) for one in differences(expected, transcript)] == []


async def test_lost_late_and_repeated_messages_change_no_answer(rig: Rig) -> None:
    call = cases.completion(cases.SAMPLING["seed"], PROMPT)
    expected = await rig.undisturbed(call)
    owner = rig.owner(call)
    client = asyncio.create_task(owner.run())
    await owner.arrived(5)
    await migrate(owner.request, Unreliable(rig.engines["a"], 5), Unreliable(rig.engines["b"], 6), owner)
    assert [str(one) for one in differences(expected, await client)] == []


async def test_a_request_can_come_back_and_move_again(rig: Rig) -> None:
    call = cases.completion({**cases.SAMPLING["all penalties, seed"], "max_tokens": 800}, PROMPT)
    expected = await rig.undisturbed(call)
    for _ in range(ATTEMPTS):
        transcript, outcomes = await rig.moved(call, at=[20, 70, 120, 170])
        assert [str(one) for one in differences(expected, transcript)] == []
        if outcomes[-1].result is Result.MOVED:
            break
    assert [outcome.result for outcome in outcomes] == [Result.MOVED] * 4, outcomes
    assert transcript.legs == ["a", "b", "a", "b", "a"]
