"""Two real vLLMs behind the gateway: an engine is drained, and killed, under running requests; clients get the same.

One pair of engines, in float32, serves all tests of this file; the last one kills an engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

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
LONG = {"max_tokens": 400}
CALLS: dict[str, Call] = {
    "greedy": cases.completion({"temperature": 0, **LONG}, PROMPT),
    "penalties, seed": cases.completion({**cases.SAMPLING["all penalties, seed"], **LONG}, PROMPT),
    "characters of many bytes": cases.completion(cases.GRAMMARS["characters of many bytes"], PROMPT),
    "logprobs": cases.completion({"temperature": 0, "logprobs": 3, **LONG}, PROMPT),
    "whole": cases.completion({**cases.SAMPLING["seed"], **LONG}, PROMPT, streamed=False),
    "chat": cases.chat({**cases.SAMPLING["seed"], **LONG}, TEXT),
    "chat, logprobs": cases.chat({"temperature": 0, "logprobs": True, "top_logprobs": 2, **LONG}, TEXT),
    "chat, tool": cases.chat({**cases.SAMPLING["seed"], **cases.TOOLS}, TEXT),
}


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


def assert_same(expected: Sequence[Transcript], got: Sequence[Transcript], names: Sequence[str]) -> None:
    for one, other, name in zip(expected, got, names, strict=True):
        assert one.error is None, name
        assert [f"{name}: {found}" for found in differences(one, other)] == []


async def test_a_drained_engines_clients_get_what_they_would_have_got(front: Front) -> None:
    a, b = front.pair.members
    await front.only(a)
    expected = [await front.client(call).run() for call in CALLS.values()]
    tasks, _ = await front.begun(list(CALLS.values()), 5)
    assert await front.requests() == {a.url: len(CALLS), b.url: 0}
    await front.only(b)
    async with asyncio.timeout(30):
        await front.empty(a)
    got = await asyncio.gather(*tasks)
    assert_same(expected, got, list(CALLS))
    assert await front.metric('llmfleet_gateway_migrations_total{reason="",result="moved"}') >= 1


async def test_a_stop_string_is_found_across_the_cut(front: Front) -> None:
    a, b = front.pair.members
    await front.only(a)
    plain = await front.client(cases.completion({"temperature": 0, "max_tokens": 1500}, PROMPT)).run()
    text = plain.answer.fields[(0, "text")]
    assert isinstance(text, str)
    # Far from the beginning: on a busy machine a migration takes as long as a few hundred tokens.
    stop = text[-200:-176]
    assert text.index(stop) > len(text) // 2
    call = cases.completion({"temperature": 0, "max_tokens": 1500, "stop": [stop]}, PROMPT)
    expected = await front.client(call).run()
    assert expected.answer.finish[0][0] == "stop"
    tasks, _ = await front.begun([call], 40)
    await front.only(b)
    assert_same([expected], await asyncio.gather(*tasks), ["stop"])
    assert await front.metric('llmfleet_gateway_migrations_total{reason="",result="moved"}') == 1


@pytest.mark.full
async def test_a_killed_engines_streams_go_on_elsewhere(front: Front) -> None:
    a, _ = front.pair.members
    await front.only(a)
    expected = [await front.client(call).run() for call in CALLS.values()]
    tasks, _ = await front.begun(list(CALLS.values()), 20)
    for member in front.pair.members:
        await front.stay(member)
    for pid in a.server.pids():
        os.kill(pid, signal.SIGKILL)
    got = await asyncio.gather(*tasks)
    assert_same(expected, got, list(CALLS))
    assert await front.metric('llmfleet_gateway_migrations_total{reason="engine_lost",result="resumed"}') >= 5
