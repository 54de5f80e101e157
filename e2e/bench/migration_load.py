"""What migration costs those who do not move: the other requests while one is copied, and every request of an engine
that has the plug-in and never uses it.

Others: eight streams on each engine besides the one that moves, all decoding. Their tokens are counted while blocks are
copied and in as long a time right before, with the same requests running; many copies are added up, since one lasts
a few steps only.

Plug-in: two engines, one with it and one without, a core each, loaded in turns; then the same with cores swapped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import aiohttp

from e2e.engine import EngineServer
from e2e.migration import cases
from e2e.migration.leg import Call
from e2e.migration.owner import StreamOwner, Transcript
from e2e.migration.rig import Rig
from llmfleet.migration.coordinator import Result

LEAST_OTHERS_PERCENT, LEAST_IDLE_PERCENT = 95.0, 99.0
_OTHERS = 8
_OTHERS_TOKENS = 6000
_CONTEXT_TOKENS = 4096
_BEFORE_TOKENS = 40
_WINDOW_S = 2.0


@dataclass
class Others:
    """Tokens of the other requests while blocks were copied and in as long a time before, by engine."""

    during: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    before: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    copying_s: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    """Of each copy: tokens during it over those before, in per cent, both engines together."""


class _Watched:
    """An owner that notes when the copy began and when it had caught up."""

    def __init__(self, owner: StreamOwner) -> None:
        self.owner = owner
        self.began_s = self.parked_s = 0.0
        begin, park = owner.begin, owner.park

        async def noted_begin() -> int | None:
            epoch = await begin()
            self.began_s = time.monotonic()
            return epoch

        async def noted_park(destination: str, migration: str) -> None:
            self.parked_s = time.monotonic()
            await park(destination, migration)

        owner.begin, owner.park = noted_begin, noted_park  # type: ignore[method-assign]


async def others_while_copying(rig: Rig, copies: int) -> Others:
    """Move a long request again and again beside eight streams on each engine."""
    found = Others()
    async with _streams(rig, "a") as on_a, _streams(rig, "b") as on_b:
        for number in range(copies):
            print(f"others, copy {number + 1} of {copies} ...", flush=True)
            call = cases.completion(
                {"temperature": 0, "max_tokens": 400}, cases.prompt_tokens(_CONTEXT_TOKENS, 40 + number)
            )
            watched = _Watched(rig.owner(cases.apart(call)))
            client = asyncio.create_task(watched.owner.run())
            try:
                # Long enough that as much time as the copy takes lies behind it.
                await watched.owner.arrived(_BEFORE_TOKENS)
                await asyncio.sleep(_WINDOW_S)
                outcome = await rig.move(watched.owner)
            finally:
                client.cancel()
                await asyncio.gather(client, return_exceptions=True)
            if outcome.result is Result.MOVED:
                _count(found, {"a": on_a, "b": on_b}, watched)
    return found


def _count(found: Others, streams: dict[str, list[StreamOwner]], watched: _Watched) -> None:
    start, end = watched.began_s, watched.parked_s
    length = min(end - start, _WINDOW_S)
    during = before = 0
    for name, owners in streams.items():
        one = _tokens(owners, start, start + length)
        other = _tokens(owners, start - length, start)
        found.during[name] += one
        found.before[name] += other
        during, before = during + one, before + other
    found.copying_s.append(end - start)
    if before:
        found.shares.append(100 * during / before)


def _tokens(owners: Sequence[StreamOwner], start_s: float, end_s: float) -> int:
    return sum(
        arrival.tokens for owner in owners for arrival in owner.transcript.arrivals if start_s <= arrival.at_s < end_s
    )


@contextlib.asynccontextmanager
async def _streams(rig: Rig, engine: str) -> AsyncIterator[list[StreamOwner]]:
    """Streams that decode until the block ends."""
    owners = [
        rig.owner(
            cases.apart(
                cases.completion({"temperature": 0, "max_tokens": _OTHERS_TOKENS}, cases.prompt_tokens(100, number))
            ),
            engine=engine,
        )
        for number in range(_OTHERS)
    ]
    clients = [asyncio.create_task(owner.run()) for owner in owners]
    try:
        await asyncio.gather(*(owner.arrived(1) for owner in owners))
        yield owners
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


@dataclass
class Figures:
    """Of one engine: tokens per second with eight streams, and milliseconds to the first token alone, by turn."""

    tokens_per_s: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)


async def in_turns(engines: dict[str, EngineServer], turns: int) -> dict[str, Figures]:
    """Load each engine in turns, the order swapped each time."""
    found = {name: Figures() for name in engines}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for turn in range(turns):
            for name in sorted(engines, reverse=bool(turn % 2)):
                figures = found[name]
                started = time.monotonic()
                calls = [
                    cases.completion({"temperature": 0, "max_tokens": 120}, cases.prompt_tokens(100, 60 + number))
                    for number in range(_OTHERS)
                ]
                done = await asyncio.gather(*(_run(session, engines[name], call) for call in calls))
                tokens = sum(len(one.answer.tokens()) for one in done)
                figures.tokens_per_s.append(tokens / (time.monotonic() - started))
                one = await _run(
                    session,
                    engines[name],
                    cases.completion({"temperature": 0, "max_tokens": 2}, cases.prompt_tokens(500, turn)),
                )
                figures.ttft_ms.append(1000 * (one.arrivals[0].at_s - one.started_s))
    return found


async def _run(session: aiohttp.ClientSession, engine: EngineServer, call: Call) -> Transcript:
    return await StreamOwner(session, {"only": engine.url}, cases.apart(call), request="bench", engine="only").run()
