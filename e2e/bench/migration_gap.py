"""The gap that a client sees when its request moves, by length of context, and what two other ways cost.

    moved          our migration
    stop_and_copy  the same without pre-copy: cut first, then copy everything
    replay         the client's prompt and answer so far as a new prompt at the other engine

In turns, on the same two engines, one stream at a time. The gap is from the last delta of the one engine to the first
of the other, beyond the stream's own median interval, which the client would have waited anyway.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from e2e.bench.report import Report
from e2e.migration import cases
from e2e.migration.leg import Call
from e2e.migration.owner import Transcript
from e2e.migration.rig import Rig
from llmfleet.migration.coordinator import CoordinatorPhase, Result
from llmfleet.migration.course import Settings

CONTEXTS_TOKENS = (256, 1024, 2048, 4096, 8192)
_ANSWER_TOKENS = 400
"""Long enough that a request of the greatest context still runs when it is copied."""
_CUT_TOKENS = 20
MOST_GAP_P50_MS, MOST_GROWTH_MS, MOST_GAP_P99_MS = 15.0, 3.0, 40.0


@dataclass
class Gaps:
    """Of one way at one length of context. stayed: requests that ended before they had moved."""

    beyond_ms: list[float] = field(default_factory=list)
    intervals_ms: list[float] = field(default_factory=list)
    """Between deltas of the same engine."""
    phases_ms: dict[CoordinatorPhase, list[float]] = field(default_factory=dict)
    stayed: int = 0

    def add(self, transcript: Transcript) -> None:
        arrivals = transcript.arrivals
        steps = [(1000 * (b.at_s - a.at_s), a.epoch == b.epoch) for a, b in itertools.pairwise(arrivals)]
        within = [ms for ms, same in steps if same]
        self.intervals_ms += within
        between = [ms for ms, same in steps if not same]
        if between:
            self.beyond_ms.append(between[0] - statistics.median(within))
        else:
            self.stayed += 1


Way = Callable[[Rig, Call, Gaps], Awaitable[None]]


async def moved(rig: Rig, call: Call, gaps: Gaps) -> None:
    await _moved(rig, call, gaps, Settings())


async def stop_and_copy(rig: Rig, call: Call, gaps: Gaps) -> None:
    await _moved(rig, call, gaps, Settings(precopy=False))


async def _moved(rig: Rig, call: Call, gaps: Gaps, settings: Settings) -> None:
    transcript, (outcome,) = await rig.moved(call, [_CUT_TOKENS], settings)
    gaps.add(transcript)
    if outcome.result is Result.MOVED:
        for phase, ms in outcome.phases_ms.items():
            gaps.phases_ms.setdefault(phase, []).append(ms)


async def replay(rig: Rig, call: Call, gaps: Gaps) -> None:
    """What can be done with two plain engines: close the one stream and send all that is known to the other engine."""
    first = rig.owner(cases.apart(call))
    reading = asyncio.create_task(first.run())
    try:
        await first.arrived(2 * _CUT_TOKENS)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    told = first.transcript.answer.tokens()
    body = {**call.body, "prompt": [*call.body["prompt"], *told], "max_tokens": call.body["max_tokens"] - len(told)}
    second = await rig.owner(cases.apart(Call(call.api, body)), engine="b").run()
    transcript = Transcript(arrivals=[*first.transcript.arrivals])
    transcript.arrivals += [type(one)(one.at_s, 2, one.tokens) for one in second.arrivals]
    gaps.add(transcript)


WAYS: dict[str, Way] = {"moved": moved, "stop_and_copy": stop_and_copy, "replay": replay}


async def measure(rig: Rig, rounds: int) -> dict[tuple[str, int], Gaps]:
    """All ways at all lengths in turns."""
    found = {(way, context): Gaps() for way in WAYS for context in CONTEXTS_TOKENS}
    for context in CONTEXTS_TOKENS:
        await moved(rig, _call(context, 0), Gaps())  # the first of a kind finds connections and code cold
    for turn in range(rounds):
        print(f"gap, round {turn + 1} of {rounds} ...", flush=True)
        for context in CONTEXTS_TOKENS:
            for way, run in WAYS.items():
                await run(rig, _call(context, turn), found[way, context])
    return found


def report(found: dict[tuple[str, int], Gaps], rows: Report) -> None:
    """The rows of the gap."""
    for context in CONTEXTS_TOKENS:
        ways = {way: found[way, context] for way in WAYS}
        theirs = ways["replay"].beyond_ms
        mine, stopped = ways["moved"], ways["stop_and_copy"]
        rows.add(
            f"gap_p50_{context}", "ms", mine.beyond_ms,
            target=MOST_GAP_P50_MS, peer="replay", peer_runs=theirs, note=_note(mine),
        )  # fmt: skip
        rows.add(
            f"stop_and_copy_gap_p50_{context}", "ms", stopped.beyond_ms,
            peer="replay", peer_runs=theirs, note=_note(stopped),
        )  # fmt: skip
    short, long = (found["moved", context].beyond_ms for context in (CONTEXTS_TOKENS[0], CONTEXTS_TOKENS[-1]))
    grown = [statistics.median(long) - statistics.median(short)] if short and long else []
    rows.add("gap_growth_256_to_8192", "ms", grown, target=MOST_GROWTH_MS, note="difference of the two medians")
    all_gaps = [ms for context in CONTEXTS_TOKENS for ms in found["moved", context].beyond_ms]
    intervals = [ms for (way, _), gaps in found.items() if way == "moved" for ms in gaps.intervals_ms]
    rows.add(
        "gap_p99",
        "ms",
        [_quantile(all_gaps, 0.99)] if all_gaps else [],
        target=MOST_GAP_P99_MS,
        peer="interval_p99",
        peer_runs=[_quantile(intervals, 0.99)] if intervals else [],
        note=f"{len(all_gaps)} gaps of all contexts; peer: p99 of {len(intervals)} intervals of the same streams",
    )


def _note(gaps: Gaps) -> str:
    if not gaps.intervals_ms:
        return "nothing measured"
    phases = ", ".join(f"{phase} {statistics.median(ms):.1f}" for phase, ms in gaps.phases_ms.items())
    stayed = f"; {gaps.stayed} ended before they had moved" if gaps.stayed else ""
    return f"interval {statistics.median(gaps.intervals_ms):.1f} ms; phases, ms: {phases}{stayed}"


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _call(context: int, turn: int) -> Call:
    prompt = cases.prompt_tokens(context, turn)
    return cases.completion({"temperature": 0, "max_tokens": _ANSWER_TOKENS}, prompt)
