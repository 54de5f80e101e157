"""Two real vLLMs behind the gateway: an engine is drained, and killed, under running requests; clients get the same.

One pair of engines, in float32, serves all tests of this file; the last one kills an engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from e2e.engine.server import free_port
from e2e.migration import cases
from e2e.migration.compare import differences
from e2e.migration.front import TOKEN, Front, engine_argument
from e2e.migration.leg import Call
from e2e.migration.owner import Transcript
from e2e.migration.pair import Pair, start_pair
from llmfleet.gateway.main import gateway
from llmfleet.gateway.settings import GatewaySettings

pytestmark = [
    pytest.mark.node,
    pytest.mark.timeout(300),
    pytest.mark.long(90),
    pytest.mark.xdist_group("engine-pair"),
]

PROMPT = cases.prompt_tokens(300)
TEXT = "Tell me all about the sea, and about ships. " * 5
LONG = {"max_tokens": 500}
CALLS: dict[str, Call] = {
    "greedy": cases.completion({"temperature": 0, **LONG}, PROMPT),
    "penalties-seed": cases.completion({**cases.SAMPLING["all penalties, seed"], **LONG}, PROMPT),
    "characters-of-many-bytes": cases.completion({**cases.characters_of_many_bytes(200), **LONG}, PROMPT),
    "logprobs": cases.completion({"temperature": 0, "logprobs": 3, **LONG}, PROMPT),
    "whole": cases.completion({**cases.SAMPLING["seed"], **LONG}, PROMPT, streamed=False),
    "chat": cases.chat({**cases.SAMPLING["seed"], **LONG}, TEXT),
    "chat-logprobs": cases.chat({"temperature": 0, "logprobs": True, "top_logprobs": 2, **LONG}, TEXT),
    "chat-tool": cases.chat({**cases.SAMPLING["seed"], **cases.tools(400), **LONG}, TEXT),
}
"""Every kind of answer that moves, each long enough to be still running when it does."""
ATTEMPTS = 5
"""At a move, for answers that ended before their copy: on a busy machine one may."""
MOVED = 'llmfleet_gateway_migrations_total{reason="",result="moved"}'


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with start_pair("float32") as pair:
        yield pair


@pytest.fixture
async def front(pair: Pair, tmp_path: Path) -> AsyncIterator[Front]:
    key, token = tmp_path / "key", tmp_path / "token"
    key.write_bytes(pair.key)
    key.chmod(0o600)
    token.write_text(TOKEN)
    settings = GatewaySettings(
        listen=f"127.0.0.1:{free_port()}",
        admin_listen=f"127.0.0.1:{free_port()}",
        admin_token_file=token,
        engines=tuple(map(engine_argument, pair.members)),
        peer_key_file=key,
        drain_s=0.0,
    )
    async with gateway(settings) as running, aiohttp.ClientSession() as session:
        yield Front(pair, session, running.api_port, running.admin_port)


@pytest.fixture(scope="module")
def known() -> dict[str, Transcript]:
    """What is known already of undisturbed answers: they are the same for all tests."""
    return {}


async def undisturbed(front: Front, known: dict[str, Transcript]) -> dict[str, Transcript]:
    """Answers to `CALLS` of engine `a` alone. In float32 a token does not depend on what else is computed."""
    await front.only(front.pair.a)
    if not known:
        got = await asyncio.gather(*(front.client(call).run() for call in CALLS.values()))
        known.update(zip(CALLS, got, strict=True))
    return known


def assert_same(expected: Sequence[Transcript], got: Sequence[Transcript], names: Sequence[str]) -> None:
    for one, other, name in zip(expected, got, names, strict=True):
        assert one.error is None, name
        assert [f"{name}: {found}" for found in differences(one, other)] == []


class Shuttle:
    """Requests begin at one engine, which then is drained into the other, and so on in turn."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._home, self._other = front.pair.members

    async def all_move(self, calls: dict[str, Call], expected: dict[str, Transcript]) -> None:
        """Each gets what is expected, and is still running when it moves; those that had ended before try again."""
        left = calls
        for _ in range(ATTEMPTS):
            moved = await self._moved(left, expected)
            left = {name: call for name, call in left.items() if name not in moved}
            if not left:
                return
        outcomes = await self._front.samples("llmfleet_gateway_migrations_total")
        pytest.fail(f"never moved: {', '.join(left)}; {outcomes}")

    async def _moved(self, calls: dict[str, Call], expected: dict[str, Transcript]) -> set[str]:
        front, home, names = self._front, self._home, list(calls)
        await front.only(home)
        before = await front.metric(MOVED)
        tasks, _ = await front.begun(list(calls.values()), 5, names)
        await front.only(self._other)
        await front.empty(home)
        there = await front.names(self._other)
        assert there <= set(names)
        assert_same([expected[name] for name in names], await asyncio.gather(*tasks), names)
        self._home, self._other = self._other, home
        # Some of them may have been resumed there, or not be counted yet: which is not known, so none is.
        return there if await front.metric(MOVED) - before >= len(there) else set()


async def test_a_drained_engines_clients_get_what_they_would_have_got(
    front: Front, known: dict[str, Transcript]
) -> None:
    await Shuttle(front).all_move(CALLS, await undisturbed(front, known))


async def test_a_stop_string_is_found_across_the_cut(front: Front, known: dict[str, Transcript]) -> None:
    plain = (await undisturbed(front, known))["greedy"]
    text = plain.answer.fields[(0, "text")]
    assert isinstance(text, str)
    stop = text[-100:-76]
    assert text.index(stop) > len(text) // 2
    call = cases.completion({"temperature": 0, "stop": [stop], **LONG}, PROMPT)
    expected = await front.client(call).run()
    assert expected.answer.finish[0][0] == "stop"
    await Shuttle(front).all_move({"stop": call}, {"stop": expected})


async def test_a_request_moves_by_name_there_and_back(front: Front) -> None:
    a, b = front.pair.members
    await front.only(a)
    call = cases.completion({"temperature": 0, **LONG}, PROMPT)
    expected = await front.client(call).run()
    outcomes: list[Any] = []
    for attempt in range(ATTEMPTS):
        await front.only(a)
        name = f"by-hand-{attempt}"
        client = front.client(call, name)
        task = asyncio.create_task(client.run())
        assert await client.arrived(20)
        await front.stay(b)
        outcomes = [await front.migrate(name, member) for member in (b, a)]
        assert_same([expected], [await task], [name])
        if [(one.get("result"), one.get("engine")) for one in outcomes] == [("moved", b.url), ("moved", a.url)]:
            return
    pytest.fail(f"it never moved: {outcomes}")


async def test_a_killed_engines_streams_go_on_elsewhere(front: Front, known: dict[str, Transcript]) -> None:
    expected = await undisturbed(front, known)
    tasks, _ = await front.begun(list(CALLS.values()), 20)
    for member in front.pair.members:
        await front.stay(member)
    for pid in front.pair.a.server.pids():
        os.kill(pid, signal.SIGKILL)
    assert_same(list(expected.values()), await asyncio.gather(*tasks), list(CALLS))
    resumed = await front.metric('llmfleet_gateway_migrations_total{reason="engine_lost",result="resumed"}')
    assert resumed == sum(call.streamed for call in CALLS.values())
