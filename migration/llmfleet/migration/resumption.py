"""Begins a request at an engine from the tokens delivered, without any KV: after a crash, or where KV cannot go along.

In flow what is known of the request and the stream's owner; out flows an outcome. The destination treats the request as
one of its own that was preempted, so the owner submits the original request and the engine computes what is missing.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from llmfleet.api import DestinationPhase, Feature, Fingerprint, Reason
from llmfleet.api.migration_messages import (
    AnyAnswer,
    Cancel,
    Capabilities,
    DestinationStatus,
    EngineCapabilities,
    Prepare,
    Prepared,
    Refused,
    Resume,
    Status,
)
from llmfleet.migration.coordinator import Result
from llmfleet.migration.outcome import Outcome, Replay, replay
from llmfleet.migration.ports import Delivered, Engine
from llmfleet.migration.questions import Patience, persistently


@dataclass(frozen=True)
class Leaving:
    """What is known of a request that leaves its engine without KV."""

    fingerprint: Fingerprint
    """Of the engine that it ran on."""
    most_tokens: int
    """Prompt and the longest answer."""
    features: list[Feature]
    adapter: str | None = None


class Resuming(Protocol):
    """The part of `ports.Owner` that is needed here."""

    async def park(self, destination: str, migration: str) -> None:
        """Submits the original request to the engine of this name, under `request_id(migration)`."""
        ...

    async def source_lost(self) -> Delivered:
        """From now on the present leg counts no more. The tokens to resume from."""
        ...


@dataclass(frozen=True)
class Resumption:
    """What came of it."""

    outcome: Outcome
    """RESUMED or FAILED."""
    source_given_up: bool
    """The owner was told that the present leg counts no more: there is no way back."""


async def resume_elsewhere(
    leaving: Leaving, engine: Engine, owner: Resuming, *, epoch: int, patience: Patience | None = None
) -> Outcome:
    """Begins a request whose engine is lost at another one. `epoch`: of the leg that this begins.

    RESUMED, or FAILED: then another engine can be tried.
    """
    return (await resume_at(leaving, engine, owner, epoch=epoch, patience=patience or Patience())).outcome


async def resume_at(leaving: Leaving, engine: Engine, owner: Resuming, *, epoch: int, patience: Patience) -> Resumption:
    """As `resume_elsewhere`, and says whether the source was given up. Until the request is parked it is not."""
    attempt = _Attempt(leaving, engine, owner, epoch, patience)
    try:
        return await attempt.run()
    except _RefusedError as error:
        await attempt.cancel(error.refused.reason)
        refused = error.refused
        failed = Outcome(
            Result.FAILED, attempt.migration, refused.reason, refused.field, refused.detail, exact=False
        )  # fmt: skip
        return Resumption(failed, attempt.source_given_up)


class _RefusedError(Exception):
    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.detail)
        self.refused = refused


class _Attempt:
    def __init__(self, leaving: Leaving, engine: Engine, owner: Resuming, epoch: int, patience: Patience) -> None:
        self._leaving = leaving
        self._engine = engine
        self._owner = owner
        self._patience = patience
        self.migration = secrets.token_hex(16)
        self._about: dict[str, Any] = {"migration": self.migration, "epoch": epoch}
        self._asked = False
        self.source_given_up = False

    async def run(self) -> Resumption:
        there = self._answer(await persistently(self._engine, Capabilities, self._patience))
        if not isinstance(there, EngineCapabilities):
            raise self._nonsense(there)
        leaving = self._leaving
        left = replay(leaving.fingerprint, there.fingerprint, leaving.features, leaving.adapter)
        await self._prepare()
        try:
            async with asyncio.timeout(self._patience.park_s):
                await self._owner.park(self._engine.name, self.migration)
                await self._parked()
        except TimeoutError:
            detail = f"the request did not come to {self._engine.name} in {self._patience.park_s:g} s"
            raise _RefusedError(Refused(reason=Reason.EXPIRED, detail=detail)) from None
        self.source_given_up = True
        delivered = await self._owner.source_lost()
        resume = Resume(**self._about, tokens=delivered.tokens)
        status = self._status(await persistently(self._engine, lambda: resume, self._patience))
        if status.phase is not DestinationPhase.RUNNING:
            raise _RefusedError(Refused(reason=status.reason or Reason.PEER_LOST, detail="the destination let go"))
        detail = "the journal was behind what the client had seen" if delivered.lagged else ""
        outcome = Outcome(
            Result.RESUMED, self.migration, detail=detail, exact=left is Replay.EXACT,
            computed_tokens=status.computed_tokens or 0,
        )  # fmt: skip
        return Resumption(outcome, source_given_up=True)

    async def cancel(self, reason: Reason) -> None:
        if self._asked:
            once = replace(self._patience, silence_s=0.0)
            await persistently(self._engine, lambda: Cancel(**self._about, reason=reason), once)

    async def _prepare(self) -> None:
        leaving = self._leaving
        prepare = Prepare(
            **self._about, fingerprint=leaving.fingerprint, tokens=0, most_tokens=leaving.most_tokens,
            features=leaving.features, adapter=leaving.adapter,
        )  # fmt: skip
        self._asked = True
        answer = self._answer(
            await persistently(self._engine, lambda: prepare, self._patience, final_if_busy=True)
        )  # fmt: skip
        if not isinstance(answer, Prepared):
            raise self._nonsense(answer)

    async def _parked(self) -> None:
        seen: int | None = None
        while True:
            ask = partial(Status, **self._about, seen=seen, wait_s=self._patience.poll_s)
            status = self._status(await persistently(self._engine, ask, self._patience, poll=True))
            if status.phase is not DestinationPhase.RESERVED:
                raise _RefusedError(Refused(reason=status.reason or Reason.CANCELLED, detail="the destination let go"))
            if status.parked:
                return
            seen = status.revision

    def _answer(self, answer: AnyAnswer | None) -> AnyAnswer:
        if answer is None:
            detail = f"{self._engine.name} does not answer"
            raise _RefusedError(Refused(reason=Reason.PEER_LOST, detail=detail))
        if isinstance(answer, Refused):
            raise _RefusedError(answer)
        return answer

    def _status(self, answer: AnyAnswer | None) -> DestinationStatus:
        answer = self._answer(answer)
        if isinstance(answer, DestinationStatus) and answer.migration == self.migration:
            return answer
        raise self._nonsense(answer)

    def _nonsense(self, answer: AnyAnswer) -> _RefusedError:
        detail = f"{self._engine.name} answered another question, with {answer.kind}"
        return _RefusedError(Refused(reason=Reason.MALFORMED, detail=detail))
