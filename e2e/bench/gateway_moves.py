"""What clients of the gateway see when an engine is drained, and when it is killed.

    64 streams ──► gateway ──► engine a ──drain──► engine b      the same 64 streams, undisturbed, beside it
    greedy streams ──► gateway ──► engine a ──SIGKILL──► engine b

Two real vLLMs in float32 with the tiny model, a core each, the gateway and the clients beside them on the same cores:
gaps are those of a busy machine, on which a token of 64 streams takes long by itself. So what counts is how much longer
than ordinary the longest gap of a stream is from the order to drain on: beyond the 99th percentile of the intervals of
the same requests with nothing happening, in the same run. Changed tokens are counted against the same ones. A few
streams move before all that, since a gateway that runs has its connections and engines have computed before.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import aiohttp

from e2e.bench.report import Report
from e2e.engine.server import free_port
from e2e.migration import cases
from e2e.migration.answer import read_event
from e2e.migration.compare import differences
from e2e.migration.front import TOKEN, Front, engine_argument
from e2e.migration.leg import Call
from e2e.migration.owner import Arrival, Transcript
from e2e.migration.pair import Pair, start_pair

STREAMS = 64
_KILLED_STREAMS = 16
_WARM_UP_STREAMS = 4
_ANSWER_TOKENS = 800
_CONTEXT_TOKENS = 64
_BEGUN_DELTAS = 20
_ROOM = (f"--max-num-seqs={STREAMS}", f"--kv-cache-memory-bytes={256 * 2**20}")
"""For all streams at once, of 65,536 tokens: others would wait in the engine until the first ones have ended."""
_START_S = 30.0
MOST_GAP_MS, MOST_FIRST_TOKEN_S = 100.0, 1.0

_GATEWAY = """
import json, sys
from pathlib import Path
from llmfleet.gateway.main import run
from llmfleet.gateway.settings import GatewaySettings
given = json.loads(sys.argv[1])
run(GatewaySettings(listen=given["listen"], admin_listen=given["admin"], engines=tuple(given["engines"]), drain_s=1.0,
                    admin_token_file=Path(given["token"]), peer_key_file=Path(given["key"])))
"""


@contextlib.asynccontextmanager
async def front_of(pair: Pair) -> AsyncIterator[Front]:
    """A gateway in a process of its own."""
    with _process(pair) as (api, admin, log):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await _answers(session, f"http://127.0.0.1:{api}/readyz", log)
            yield Front(pair, session, api, admin)


@contextlib.contextmanager
def _process(pair: Pair) -> Iterator[tuple[int, int, Path]]:
    """Its ports and its log."""
    with tempfile.TemporaryDirectory(prefix="llmfleet-front-") as directory:
        token, key, log = Path(directory) / "token", Path(directory) / "key", Path(directory) / "log"
        token.write_text(TOKEN)
        key.write_bytes(pair.key)
        key.chmod(0o600)
        api, admin = free_port(), free_port()
        given = {
            "listen": f"127.0.0.1:{api}", "admin": f"127.0.0.1:{admin}", "token": str(token), "key": str(key),
            "engines": [engine_argument(member) for member in pair.members],
        }  # fmt: skip
        with log.open("wb") as out:
            process = subprocess.Popen([sys.executable, "-c", _GATEWAY, json.dumps(given)], stdout=out, stderr=out)
        try:
            yield api, admin, log
        finally:
            process.terminate()
            process.wait()


async def _answers(session: aiohttp.ClientSession, url: str, log: Path) -> None:
    ends_s = time.monotonic() + _START_S
    while time.monotonic() < ends_s:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(url) as answer:
                if answer.ok:
                    return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"the gateway did not start, see {log}")


def calls(count: int) -> list[Call]:
    """Greedy requests, no two of them alike."""
    parameters = {"temperature": 0, "ignore_eos": True, "max_tokens": _ANSWER_TOKENS, "return_token_ids": False}
    return [cases.completion(parameters, cases.prompt_tokens(_CONTEXT_TOKENS, number)) for number in range(count)]


def intervals_ms(transcript: Transcript, since_s: float) -> list[float]:
    """Between the client's reads, of those that ended after a moment."""
    return [1000 * (b.at_s - a.at_s) for a, b in itertools.pairwise(transcript.arrivals) if b.at_s > since_s]


def percentile_99(values: Sequence[float]) -> float:
    """Of at least two."""
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def changed(expected: Sequence[Transcript], got: Sequence[Transcript]) -> int:
    """Streams that differ in anything."""
    return sum(bool(differences(one, other)) for one, other in zip(expected, got, strict=True))


class Reader:
    """A client that keeps what it reads, and understands it only when all is over: 64 that parse would be the load."""

    def __init__(self, session: aiohttp.ClientSession, url: str, call: Call) -> None:
        self._session, self._url, self._call = session, url, call
        self._reads: list[tuple[float, bytes]] = []
        self.events = 0
        self.error: str | None = None

    async def run(self) -> Reader:
        """Until the answer has ended."""
        body = cases.apart(self._call).body
        async with self._session.post(self._url + self._call.api, json=body) as response:
            if response.status != 200:
                self.error = f"{response.status}"
            async for data in response.content.iter_any():
                self._reads.append((time.monotonic(), data))
                self.events += data.count(b"\n\n")
        return self

    def transcript(self) -> Transcript:
        """What it got, and when."""
        transcript, held = Transcript(error=self.error), b""
        for at_s, data in self._reads:
            *events, held = (held + data).split(b"\n\n")
            for event in events:
                payload = event.removeprefix(b"data: ")
                if payload == b"[DONE]":
                    return transcript
                growth = read_event(self._call.api, json.loads(payload))
                transcript.error = growth.error or transcript.error
                transcript.answer.add(growth)
            if events:
                transcript.arrivals.append(Arrival(at_s, 1, 0))
        transcript.error = transcript.error or "the answer ended without saying so"
        return transcript


async def begun(front: Front, calls: Sequence[Call], events: int) -> list[asyncio.Task[Reader]]:
    """All of them at once, once every stream has so many events."""
    readers = [Reader(front.session, front.url, call) for call in calls]
    tasks = [asyncio.create_task(reader.run()) for reader in readers]
    while min(reader.events for reader in readers) < events:
        if any(task.done() for task in tasks):
            raise RuntimeError(f"a stream ended before each had {events} events: {[one.error for one in readers]}")
        await asyncio.sleep(0.02)
    return tasks


async def transcripts(tasks: Sequence[asyncio.Task[Reader]]) -> list[Transcript]:
    """Of all, at their ends."""
    return [reader.transcript() for reader in await asyncio.gather(*tasks)]


async def moved(front: Front) -> float:
    """Migrations that the gateway has seen succeed."""
    return await front.metric('llmfleet_gateway_migrations_total{reason="",result="moved"}')


async def warmed_up(front: Front) -> None:
    """Streams have moved to `b`, and the next ones begin at `a` again."""
    a, b = front.pair.members
    await front.only(a)
    tasks = await begun(front, calls(_WARM_UP_STREAMS), _BEGUN_DELTAS)
    await front.only(b)
    await asyncio.gather(*tasks)
    await front.only(a)


async def drained(front: Front, report: Report) -> None:
    """Rows of the drain."""
    a, b = front.pair.members
    await front.only(a)
    tasks = await begun(front, calls(STREAMS), _BEGUN_DELTAS)
    at_s = time.monotonic()
    expected = await transcripts(tasks)
    undisturbed = [intervals_ms(transcript, at_s) for transcript in expected]
    ordinary_ms = percentile_99([ms for each in undisturbed for ms in each])
    before = await moved(front)
    tasks = await begun(front, calls(STREAMS), _BEGUN_DELTAS)
    at_s = time.monotonic()
    await front.only(b)
    await front.empty(a)
    took_s = time.monotonic() - at_s
    got = await transcripts(tasks)
    note = (
        f"{STREAMS} greedy streams of {_ANSWER_TOKENS} tokens, {await moved(front) - before:.0f} moved, "
        f"the last after {took_s:.1f} s"
    )
    report.add("drain_failed_streams", "streams", [sum(one.error is not None for one in got)], target=0, note=note)
    report.add("drain_changed_streams", "streams", [changed(expected, got)], target=0)
    longest = [max(intervals_ms(transcript, at_s), default=0.0) for transcript in got]
    note = (
        f"p50 {statistics.median(longest) - ordinary_ms:.0f} ms; ordinary is {ordinary_ms:.0f} ms (p99 of intervals, "
        f"undisturbed), of the same streams undisturbed the longest is "
        f"{percentile_99([max(each) for each in undisturbed]) - ordinary_ms:.0f} ms beyond it"
    )
    gap_ms = percentile_99(longest) - ordinary_ms
    report.add("drain_longest_gap_p99", "ms", [gap_ms], target=MOST_GAP_MS, note=note)


async def killed(front: Front, report: Report) -> None:
    """Rows of the crash. Engine `a` is gone after it."""
    a, _ = front.pair.members
    await front.only(a)
    expected = await transcripts(await begun(front, calls(_KILLED_STREAMS), 1))
    tasks = await begun(front, calls(_KILLED_STREAMS), _BEGUN_DELTAS)
    for member in front.pair.members:
        await front.stay(member)
    at_s = time.monotonic()
    for pid in a.server.pids():
        os.kill(pid, signal.SIGKILL)
    got = await transcripts(tasks)
    whole = sum(one.error is None for one in got)
    note = f"{_KILLED_STREAMS} greedy streams, {changed(expected, got)} changed"
    report.add("kill_streams_that_go_on", "%", [100 * whole / len(got)], target=100, at_most=False, note=note)
    first_s = [max(b.at_s - a.at_s for a, b in itertools.pairwise(one.arrivals) if b.at_s > at_s) for one in got]
    report.add("kill_first_new_token", "s", [max(first_s)], target=MOST_FIRST_TOKEN_S, note="the slowest stream")


async def _run(report: Report) -> None:
    with start_pair("float32", _ROOM) as pair:
        async with front_of(pair) as front:
            await warmed_up(front)
            await drained(front, report)
            await killed(front, report)


def main() -> None:
    report = Report("gateway_moves")
    asyncio.run(_run(report))
    report.write()


if __name__ == "__main__":
    main()
