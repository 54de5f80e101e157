"""A real vLLM answers as an OpenAI server does. One engine serves all tests of this file."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from e2e.conformance import asks, difference, exchange
from e2e.engine import EngineError, EngineServer, engine_environment, tiny_model
from llmfleet.api import Buckets, MeasuredPoint, Percentiles
from llmfleet.cli.profiling import ProfileSettings, profile_engine
from llmfleet.gateway.main import gateway
from llmfleet.gateway.settings import GatewaySettings

pytestmark = [
    pytest.mark.node,
    pytest.mark.timeout(900),
    pytest.mark.long(75),
    pytest.mark.xdist_group("engine-server"),
]

CORE = max(os.sched_getaffinity(0))
ATTEMPTS = 5
"""Not the first core, which the demo's slow engines use meanwhile."""
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineServer]:
    engine_environment()
    tiny_model()
    with EngineServer.start(core=CORE) as server:
        yield server


@pytest.fixture
def client(engine: EngineServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0, timeout=60) as openai:
        yield openai


def complete(client: OpenAI, model: str, prompt: str) -> str:
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == MAX_TOKENS
    return answer.choices[0].text


def test_greedy_answers_are_readable_vary_and_depend_on_the_prompt(engine: EngineServer, client: OpenAI) -> None:
    answers = [complete(client, engine.model, prompt) for prompt in ("one", "two", "three")]
    assert len(set(answers)) == 3
    for answer in answers:
        assert len(answer) == MAX_TOKENS, "a token of the tiny model is one character"
        assert answer.isascii()
        assert answer.isprintable()
        assert len(set(answer)) >= 10


def test_greedy_answers_repeat(engine: EngineServer, client: OpenAI) -> None:
    assert complete(client, engine.model, "again") == complete(client, engine.model, "again")


def test_a_streamed_completion_joins_to_the_whole_one_and_ends_with_usage(engine: EngineServer, client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=engine.model,
            prompt="stream",
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == complete(client, engine.model, "stream")
    assert len([text for text in texts if text]) > MAX_TOKENS / 2, "tokens come one by one, not all at the end"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == MAX_TOKENS


def test_a_chat_completion_applies_the_template(engine: EngineServer, client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=engine.model, messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("user: hello\nassistant:")
    assert len(answer.choices[0].message.content or "") == 8


def test_a_streamed_chat_completion_joins_to_the_whole_one(engine: EngineServer, client: OpenAI) -> None:
    parts = []
    for chunk in client.chat.completions.create(
        model=engine.model,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
    ):
        parts += [choice.delta.content or "" for choice in chunk.choices]
    whole = client.chat.completions.create(
        model=engine.model, messages=[{"role": "user", "content": "hello"}], max_tokens=MAX_TOKENS, temperature=0
    )
    assert "".join(parts) == whole.choices[0].message.content


@pytest.mark.parametrize("count", [42, pytest.param(300, marks=pytest.mark.full)])
async def test_the_gateway_changes_nothing_that_an_engine_says(engine: EngineServer, count: int) -> None:
    settings = GatewaySettings(listen="127.0.0.1:0", admin_listen="127.0.0.1:0", engines=(engine.url,))
    different: list[str] = []
    async with (
        gateway(settings) as running,
        httpx.AsyncClient(base_url=engine.url, timeout=60) as direct,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.api_port}", timeout=60) as through,
    ):
        for ask in asks(count, count, engine.model):
            different += difference(ask, await exchange(direct, ask), await exchange(through, ask))
    assert not different, "\n".join(different)


async def test_an_engine_is_asked_for_everything_that_it_can_be_asked_for(engine: EngineServer) -> None:
    """Otherwise equal answers would be equal refusals."""
    async with httpx.AsyncClient(base_url=engine.url, timeout=60) as direct:
        served = {(ask.path, (await exchange(direct, ask)).status) for ask in asks(7, 24, engine.model)}
    paths = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")
    assert served >= {(path, 200) for path in paths} | {("/v1/chat/completions", 400)}


def test_an_engine_that_fails_shows_the_end_of_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would need half a minute to refuse an argument; without its standard library it fails at the first thing.
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(EngineError, match=r"(?s)exit code .*No module named 'encodings'"), EngineServer.start():
        pass


def test_a_bound_engine_stays_on_its_core_with_all_its_processes(engine: EngineServer) -> None:
    processes = running_in(engine.process.pid)
    assert len(processes) >= 2, "an API server and an engine core"
    assert [os.sched_getaffinity(pid) for pid in processes] == [{CORE}] * len(processes)


async def test_a_profile_of_a_real_engine_shows_what_load_costs(engine: EngineServer) -> None:
    settings = ProfileSettings(
        url=engine.url,
        gpu_type="cpu",
        buckets=Buckets(input_tokens=[16, 256], output_tokens=[16]),
        concurrencies=[1, 8],
        seconds_per_point=1,
    )
    # More than once: of a second in which somebody else has the core, the client's own gaps are most.
    for _ in range(ATTEMPTS):
        lines: list[str] = []
        measurement = await profile_engine(settings, lines.append)
        if all(_within_littles_law(point) for point in measurement.points):
            break
    assert measurement.engine == "vllm 0.32.0"
    points = {(point.input_tokens, point.output_tokens, point.concurrency): point for point in measurement.points}
    assert set(points) == {(16, 16, 1), (16, 16, 8), (256, 16, 1), (256, 16, 8)}
    assert len(lines) == 2 + 4, "a line for each bucket and each point"
    for point in points.values():
        assert 0 < point.ttft_ms.p50 <= point.ttft_ms.max
        assert 0 < point.tpot_ms.p50 <= point.tpot_ms.max
        assert _within_littles_law(point), point


def _within_littles_law(point: MeasuredPoint) -> bool:
    """In a closed loop the *mean* latency is concurrency over rate. Of it a median says only what it is at least, the
    percentiles what it is at most; the client's own gaps count in the rate only."""
    mean_ms = 1000 * point.concurrency / point.requests_per_second
    median_ms = point.ttft_ms.p50 + 15 * point.tpot_ms.p50
    return median_ms / 1.5 <= mean_ms <= 1.5 * (most_mean(point.ttft_ms) + 15 * most_mean(point.tpot_ms))


def most_mean(latency: Percentiles) -> float:
    """What the mean is at most: each stretch between two percentiles counts as its upper end."""
    upper = (latency.p50, latency.p90, latency.p95, latency.p99, latency.max)
    return sum(share * end for share, end in zip((0.5, 0.4, 0.05, 0.04, 0.01), upper, strict=True))


@pytest.mark.full
def test_nothing_of_an_engine_is_left_even_if_its_leader_was_killed() -> None:
    with EngineServer.start() as server:
        session = server.process.pid
        assert len(running_in(session)) >= 2, "an API server and an engine core"
        os.kill(session, signal.SIGKILL)
    assert running_in(session) == []


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="CPU shares need root")
def test_an_engine_with_a_share_of_a_core_is_throttled() -> None:
    with EngineServer.start(cpu_fraction=0.5) as server:
        groups = Path(f"/proc/{server.process.pid}/cgroup").read_text()
        (name,) = {line.rpartition("/")[2] for line in groups.splitlines() if "llmfleet-" in line}
        root = Path("/sys/fs/cgroup")
        (group,) = [path for path in (root / name, root / "cpu" / name) if path.exists()]
        statistics = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
        assert int(statistics["nr_throttled"]) > 0
    assert not group.exists()


def running_in(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(entry.name)] if state != "Z" else []
        except OSError:
            continue
    return found
