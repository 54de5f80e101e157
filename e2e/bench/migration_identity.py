"""Whether clients get the same tokens: many migrations, counted.

Each request is made once undisturbed and once moving back and forth between the engines; a request counts as many
migrations as it made, and all of them as failed if its answer differs anywhere (tokens, text, logprobs to the last bit,
finish, usage).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from e2e.migration import cases
from e2e.migration.compare import differences
from e2e.migration.leg import Call
from e2e.migration.owner import Transcript
from e2e.migration.rig import Rig
from llmfleet.migration.coordinator import Result

CONTEXTS_TOKENS = (60, 300, 1100)
KINDS = {
    **cases.SAMPLING,
    **cases.GRAMMARS,
    "logprobs": {"temperature": 0, "logprobs": 3},
}
_HOPS_AT = (8, 45, 82, 119)
_CHAIN_AT = tuple(20 + 45 * hop for hop in range(10))
_BATCH = 8


@dataclass
class Tally:
    """Migrations that were carried out, those of requests whose answer differed, and the first differences."""

    migrations: int = 0
    differing: int = 0
    answers: int = 0
    answers_differing: int = 0
    stayed: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str, expected: Transcript, got: Transcript, moves: int) -> None:
        found = differences(expected, got)
        self.answers += 1
        self.migrations += moves
        if found:
            self.answers_differing += 1
            self.differing += moves
            self.examples.append(f"{name}: {found[0]}")

    @property
    def identical_percent(self) -> list[float]:
        """Of migrations; empty without one."""
        return [100 * (1 - self.differing / self.migrations)] if self.migrations else []

    @property
    def note(self) -> str:
        text = f"{self.migrations} migrations, {self.answers} answers"
        if self.stayed:
            text += f", {self.stayed} asked for when the request had ended or could not go"
        return text + (f"; first: {self.examples[0]}" if self.examples else "")


async def alone(rig: Rig, passes: int) -> Tally:
    """One request at a time on both engines."""
    tally = Tally()
    for number in range(passes):
        for context in CONTEXTS_TOKENS:
            print(f"identity, pass {number + 1} of {passes}, {context} tokens ...", flush=True)
            for name, parameters in KINDS.items():
                call = cases.completion(parameters, cases.prompt_tokens(context, 100 + number))
                expected = await rig.undisturbed(call)
                transcript, outcomes = await rig.moved(call, _HOPS_AT)
                moves = sum(outcome.result is Result.MOVED for outcome in outcomes)
                tally.stayed += len(outcomes) - moves
                tally.add(f"{name}, {context} tokens", expected, transcript, moves)
    return tally


async def chains(rig: Rig, count: int) -> Tally:
    """Requests that move ten times."""
    tally = Tally()
    for number, parameters in zip(range(count), cases.SAMPLING.values(), strict=False):
        call = cases.completion({**parameters, "max_tokens": 560}, cases.prompt_tokens(200, 300 + number))
        expected = await rig.undisturbed(call)
        transcript, outcomes = await rig.moved(call, _CHAIN_AT)
        moves = sum(outcome.result is Result.MOVED for outcome in outcomes)
        tally.stayed += len(outcomes) - moves
        tally.add(f"chain {number}", expected, transcript, moves)
    return tally


async def in_batches(rig: Rig, batches: int, *, migrate: bool) -> Tally:
    """Eight requests at a time, which all move once or (the control) not at all; each is compared with itself alone."""
    tally = Tally()
    chosen = random.Random(7)
    for number in range(batches):
        calls = [
            cases.completion(parameters, cases.prompt_tokens(200 + 40 * place, 500 + number))
            for place, parameters in enumerate(list(cases.SAMPLING.values())[:_BATCH])
        ]
        expected = [await rig.undisturbed(call) for call in calls]
        places = [chosen.randrange(5, 90) for _ in calls]
        got = await asyncio.gather(
            *(_one(rig, call, place if migrate else None) for call, place in zip(calls, places, strict=True))
        )
        for one, (transcript, moves) in zip(expected, got, strict=True):
            tally.add(f"batch {number}", one, transcript, moves)
            tally.stayed += migrate and not moves
    return tally


async def _one(rig: Rig, call: Call, place: int | None) -> tuple[Transcript, int]:
    at: Sequence[int] = () if place is None else (place,)
    transcript, outcomes = await rig.moved(call, at)
    return transcript, sum(outcome.result is Result.MOVED for outcome in outcomes)


async def unseeded(rig: Rig, count: int) -> Tally:
    """Sampling without a seed: no other run says what would have come, so an answer is compared with its own parts.

    Each leg repeats what was delivered, the tokens are as many as were asked for, and the usage counts them.
    """
    tally = Tally()
    for number in range(count):
        call = cases.completion({"temperature": 1.0}, cases.prompt_tokens(300, 700 + number))
        transcript, outcomes = await rig.moved(call, _HOPS_AT)
        moves = sum(outcome.result is Result.MOVED for outcome in outcomes)
        tally.stayed += len(outcomes) - moves
        tally.add(f"unseeded {number}", transcript, transcript, moves)
        tokens, usage = len(transcript.answer.tokens()), transcript.answer.usage
        if transcript.mismatches or tokens != cases.MAX_TOKENS or usage["completion_tokens"] != tokens:
            tally.differing += moves
            tally.examples.append(f"unseeded {number}: {tokens} tokens, {usage}, {transcript.mismatches[:1]}")
    return tally


async def hundred_at_once(rig: Rig, count: int = 100) -> tuple[Tally, dict[str, int]]:
    """That many requests, all asked to move at the same moment; how the migrations ended, by result and reason."""
    calls = [
        cases.completion({"temperature": 0, "max_tokens": 96}, cases.prompt_tokens(64 + number % 7 * 32, 900 + number))
        for number in range(count)
    ]
    expected = []
    for call in calls:
        expected.append(await rig.undisturbed(call))
    owners = [rig.owner(cases.apart(call)) for call in calls]
    clients = [asyncio.create_task(owner.run()) for owner in owners]
    tally, ended = Tally(), dict[str, int]()
    try:
        await asyncio.gather(*(owner.arrived(1) for owner in owners[:8]))
        outcomes = await asyncio.gather(*(rig.move(owner) for owner in owners))
        transcripts = await asyncio.gather(*clients)
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    for outcome, one, got in zip(outcomes, expected, transcripts, strict=True):
        word = outcome.result.value if outcome.reason is None else f"{outcome.result.value} ({outcome.reason.value})"
        ended[word] = ended.get(word, 0) + 1
        tally.add("of a hundred", one, got, int(outcome.result is Result.MOVED))
    return tally, ended
