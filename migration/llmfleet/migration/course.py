"""Carries a migration out: asks engines and the stream's owner what `coordinator_step` wants to know.

In flow a request's id, two engines and the owner; out flows exactly one `Outcome`. Questions are repeated until they
are answered or their time is over, since saying them twice changes nothing; to watch is a question that the engine
answers when something has changed. Whoever cancels the task leaves everything to leases at the engines and to the
owner's deadline, as if this process had died.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from llmfleet.api import Compatibility, DestinationPhase, Feature, Reason, compatibility, differences
from llmfleet.api.migration_messages import (
    AnyAnswer,
    AnyAsk,
    Cancel,
    Capabilities,
    Destination,
    DestinationStatus,
    EngineCapabilities,
    Freeze,
    ListRequests,
    Precopy,
    Prepare,
    Prepared,
    Refused,
    Release,
    RequestList,
    Resume,
    RunningRequest,
    SourceStatus,
    Status,
)
from llmfleet.migration import coordinator as program
from llmfleet.migration.coordinator import (
    Coordinator,
    CoordinatorEffect,
    CoordinatorPhase,
    DestinationIs,
    Heard,
    NoAnswer,
    OwnerSays,
    Result,
    SourceIs,
    coordinator_step,
)
from llmfleet.migration.outcome import Outcome, Replay, replay
from llmfleet.migration.ports import Delivered, Engine, Owner
from llmfleet.migration.questions import Patience, persistently
from llmfleet.migration.resumption import Leaving, resume_at

log = logging.getLogger(__name__)

REPLAYABLE = frozenset({Reason.INCOMPATIBLE, Reason.LAGGING})
"""Reasons to stay that say nothing against computing the tokens so far at the destination."""


@dataclass(frozen=True)
class Settings:
    """How a migration is carried out."""

    patience: Patience = field(default_factory=Patience)
    replay: Replay = Replay.NEVER
    """Where KV cannot go along: the least exact replay that is wanted in place of staying. NEVER: none."""
    precopy: bool = True
    """False: cut at the next token. Of a request whose prompt is still computed that is its first one: prefill here,
    decode there. Of one that is decoded it is stop and copy, with everything in the gap."""


async def migrate(
    request: str, source: Engine, destination: Engine, owner: Owner, *, settings: Settings | None = None
) -> Outcome:
    """Moves a running request, named by the `X-Request-Id` that its owner gave it, from one engine to another.

    Never raises because of an engine; what an owner raises comes through, and leases end the rest.
    """
    settings = settings or Settings()
    subject = await _inspected(request, source, destination, settings.patience)
    if isinstance(subject, Outcome):
        return subject
    outcome = _obstacle(subject)
    if outcome is None:
        epoch = await owner.begin()
        if epoch is None:
            return _stays(Refused(reason=Reason.BUSY, detail="the stream moves already, or has ended"), subject)
        outcome = await _Course(subject, source, destination, owner, epoch, settings).run()
    wanted = settings.replay is not Replay.NEVER and outcome.replay in (settings.replay, Replay.EXACT)
    if outcome.result is Result.STAYED and outcome.reason in REPLAYABLE and wanted:
        return await _replayed(subject, destination, owner, settings.patience, outcome)
    return outcome


@dataclass(frozen=True)
class _Subject:
    """What is to be moved, and between what."""

    request: RunningRequest
    source: EngineCapabilities
    destination: EngineCapabilities

    @property
    def replay(self) -> Replay:
        return replay(
            self.source.fingerprint, self.destination.fingerprint, self.request.features, self.request.adapter
        )


async def _inspected(request: str, source: Engine, destination: Engine, patience: Patience) -> _Subject | Outcome:
    here, there, requests = await asyncio.gather(
        persistently(source, Capabilities, patience, final_if_busy=True),
        persistently(destination, Capabilities, patience, final_if_busy=True),
        persistently(source, lambda: ListRequests(request=request), patience, final_if_busy=True),
    )
    for engine, answer in ((source, here), (destination, there), (source, requests)):
        if answer is None or isinstance(answer, Refused):
            return _stays(answer or Refused(reason=Reason.PEER_LOST, detail=f"{engine.name} does not answer"))
    if (
        not isinstance(here, EngineCapabilities)
        or not isinstance(there, EngineCapabilities)
        or not isinstance(requests, RequestList)
    ):
        return _stays(Refused(reason=Reason.MALFORMED, detail="an engine answered another question"))
    if not requests.requests:
        return _stays(Refused(reason=Reason.UNKNOWN_REQUEST, detail=f"{request} does not run on {source.name}"))
    return _Subject(requests.requests[0], here, there)


def _obstacle(subject: _Subject) -> Outcome | None:
    """What is known to be in the way before anything is asked of anybody."""
    if subject.source.instance == subject.destination.instance:
        return _stays(Refused(reason=Reason.SAME_ENGINE, detail="source and destination are one engine"))
    if subject.request.refusal is not None:
        cause = subject.request.refusal
        return _stays(Refused(reason=cause.reason, field=cause.field, detail=cause.detail), subject)
    here, there = subject.source.fingerprint, subject.destination.fingerprint
    differing = differences(here, there, subject.request.adapter)
    if compatibility(differing) is Compatibility.COPY:
        return None
    name = differing[0]
    detail = f"{name}: {getattr(here, name)} at the source, {getattr(there, name)} at the destination"
    return _stays(Refused(reason=Reason.INCOMPATIBLE, field=name, detail=detail[:1024]), subject)


def _stays(refused: Refused, subject: _Subject | None = None) -> Outcome:
    left = Replay.NEVER if subject is None or refused.reason is Reason.UNSUPPORTED else subject.replay
    return Outcome(Result.STAYED, reason=refused.reason, field=refused.field, detail=refused.detail, replay=left)


async def _replayed(
    subject: _Subject, destination: Engine, owner: Owner, patience: Patience, stayed: Outcome
) -> Outcome:
    """Computes the tokens so far at the destination. The source's part ends when the owner closes its leg."""
    epoch = await owner.begin()
    if epoch is None:
        return stayed
    request = subject.request
    leaving = Leaving(subject.source.fingerprint, request.most_tokens, request.features, request.adapter)
    resumption = await resume_at(leaving, destination, owner, epoch=epoch, patience=patience)
    ended = resumption.outcome
    if ended.result is Result.RESUMED:
        return replace(ended, reason=stayed.reason, field=stayed.field, detail=stayed.detail)
    if resumption.source_given_up:
        await owner.resume()
        return replace(ended, result=Result.RESUMED)
    await owner.stays()
    return replace(stayed, reason=ended.reason, field=ended.field, detail=ended.detail)


@dataclass
class _Party:
    """One of the two engines as this course has heard of it."""

    engine: Engine
    lost: NoAnswer
    seen: int | None = None
    """Revision of its last answer in this phase."""
    question: asyncio.Task[None] | None = None
    """The one that is under way: a new one gives it up."""


class _Course:
    def __init__(
        self, subject: _Subject, source: Engine, destination: Engine, owner: Owner, epoch: int, settings: Settings
    ) -> None:
        self._subject = subject
        self._owner = owner
        self._settings = settings
        self._patience = settings.patience
        self._migration = secrets.token_hex(16)
        self._about: dict[str, Any] = {"migration": self._migration, "epoch": epoch}
        self._source = _Party(source, NoAnswer.SOURCE)
        self._destination = _Party(destination, NoAnswer.DESTINATION)
        self._state = Coordinator()
        self._heard: asyncio.Queue[Heard | Exception] = asyncio.Queue()
        self._now_s = asyncio.get_running_loop().time
        self._entered_s = self._now_s()
        self._phases_ms: dict[CoordinatorPhase, float] = {}
        self._data: Destination | None = None
        self._delivered = Delivered([], False)
        self._refused: Refused | None = None
        self._copied: SourceStatus | None = None
        self._computed_tokens: int | None = None
        self._owner_resumes = False
        self._last_words: list[asyncio.Task[AnyAnswer | None]] = []

    async def run(self) -> Outcome:
        try:
            self._ask(self._destination, self._prepare, first=True)
            while self._state.phase is not CoordinatorPhase.OVER:
                await self._hear(await self._next())
            await asyncio.gather(*self._last_words)
        finally:
            tasks = [*self._last_words]
            tasks += [one.question for one in (self._source, self._destination) if one.question is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._outcome()

    async def _next(self) -> Heard:
        ends_s = self._entered_s + self._time_s()
        try:
            async with asyncio.timeout(max(0.0, ends_s - self._now_s())):
                heard = await self._heard.get()
        except TimeoutError:
            return self._late()
        if isinstance(heard, Exception):
            raise heard
        return heard

    def _time_s(self) -> float:
        patience = self._patience
        return {
            CoordinatorPhase.PREPARING: patience.prepare_s,
            CoordinatorPhase.OPENING: patience.prepare_s,
            CoordinatorPhase.COPYING: patience.copy_s,
            CoordinatorPhase.PARKING: patience.park_s,
            CoordinatorPhase.FREEZING: patience.freeze_s if self._settings.precopy else patience.copy_s,
            CoordinatorPhase.HANDING_OVER: patience.hand_over_s,
            CoordinatorPhase.RECOVERING: patience.recover_s,
        }.get(self._state.phase, patience.release_s)

    def _late(self) -> Heard:
        """What to make of a phase that takes too long though its engine may have answered."""
        match self._state.phase:
            case CoordinatorPhase.PREPARING | CoordinatorPhase.HANDING_OVER | CoordinatorPhase.RECOVERING:
                return NoAnswer.DESTINATION
            case CoordinatorPhase.COPYING:
                return program.Refused(Reason.LAGGING)
            case CoordinatorPhase.PARKING:
                return program.Refused(Reason.EXPIRED)
        return NoAnswer.SOURCE

    async def _hear(self, heard: Heard) -> None:
        before = self._state.phase
        self._state, effects = coordinator_step(self._state, heard)
        if self._state.phase is not before:
            now_s = self._now_s()
            self._phases_ms[before] = 1000 * (now_s - self._entered_s)
            self._entered_s = now_s
            self._source.seen = self._destination.seen = None
        for effect in effects:
            await self._carry_out(effect)

    async def _carry_out(self, effect: CoordinatorEffect) -> None:
        match effect:
            case CoordinatorEffect.ASK_PRECOPY:
                self._ask(self._source, self._precopy, first=True)
            case CoordinatorEffect.WATCH_SOURCE:
                self._ask(self._source, lambda: self._status(self._source), poll=True)
            case CoordinatorEffect.WATCH_DESTINATION:
                self._ask(self._destination, lambda: self._status(self._destination), poll=True)
            case CoordinatorEffect.ASK_FREEZE:
                self._ask(self._source, lambda: Freeze(**self._about, wait_s=self._patience.poll_s), poll=True)
            case CoordinatorEffect.ASK_RESUME:
                tokens = self._delivered.tokens
                self._ask(self._destination, lambda: Resume(**self._about, tokens=tokens))
            case CoordinatorEffect.ASK_RELEASE:
                self._ask(self._source, lambda: Release(**self._about))
            case CoordinatorEffect.CANCEL_SOURCE:
                self._say_last(self._source)
            case CoordinatorEffect.CANCEL_DESTINATION:
                self._say_last(self._destination)
            case CoordinatorEffect.OWNER_PARK:
                await self._park()
            case CoordinatorEffect.OWNER_FREEZE:
                agreed = await self._owner.freeze()
                self._heard.put_nowait(OwnerSays.AGREED if agreed else OwnerSays.GAVE_UP)
            case CoordinatorEffect.OWNER_FINISHED:
                await self._owner.finished()
            case CoordinatorEffect.OWNER_STAYS:
                await self._owner.stays()
            case CoordinatorEffect.OWNER_SOURCE_LOST:
                self._delivered = await self._owner.source_lost()
            case CoordinatorEffect.OWNER_RESUME:
                self._owner_resumes = True
                await self._owner.resume()

    def _prepare(self) -> Prepare:
        request = self._subject.request
        return Prepare(
            **self._about,
            fingerprint=self._subject.source.fingerprint,
            tokens=request.prompt_tokens + request.output_tokens,
            most_tokens=request.most_tokens,
            features=request.features,
            adapter=request.adapter,
            prompt_digest=request.prompt_digest,
        )

    def _precopy(self) -> Precopy:
        assert self._data is not None
        return Precopy(**self._about, request=self._subject.request.request, destination=self._data)

    def _status(self, party: _Party) -> Status:
        return Status(**self._about, seen=party.seen, wait_s=self._patience.poll_s)

    async def _park(self) -> None:
        try:
            async with asyncio.timeout(self._patience.park_s):
                await self._owner.park(self._destination.engine.name, self._migration)
        except TimeoutError:
            self._heard.put_nowait(program.Refused(Reason.EXPIRED))

    def _ask(self, party: _Party, question: Callable[[], AnyAsk], *, poll: bool = False, first: bool = False) -> None:
        """`poll`: the engine may keep it. `first`: the engine need not know the migration yet."""
        if party.question is not None:
            party.question.cancel()
        party.question = asyncio.create_task(self._tell(party, question, poll, first))

    async def _tell(self, party: _Party, question: Callable[[], AnyAsk], poll: bool, first: bool) -> None:
        try:
            self._heard.put_nowait(await self._answered(party, question, poll, first))
        except Exception as error:
            self._heard.put_nowait(error)

    async def _answered(self, party: _Party, question: Callable[[], AnyAsk], poll: bool, first: bool) -> Heard:
        while True:
            answer = await persistently(party.engine, question, self._patience, poll=poll, final_if_busy=first)
            if answer is None:
                return party.lost
            if isinstance(answer, SourceStatus | DestinationStatus):
                if answer.revision == party.seen:
                    continue
                party.seen = answer.revision
            return self._understood(party, answer, first)

    def _understood(self, party: _Party, answer: AnyAnswer, first: bool) -> Heard:
        match answer:
            case Refused(reason=reason):
                if reason is Reason.UNKNOWN_REQUEST and not first:
                    reason = Reason.RESTARTED
                    answer = Refused(reason=reason, detail=f"{party.engine.name} knows nothing of the migration")
                self._refused = answer
                return program.Refused(reason)
            case _ if getattr(answer, "migration", None) != self._migration:
                pass
            case Prepared(destination=data) if party is self._destination:
                self._data = data
                return DestinationIs(DestinationPhase.RESERVED)
            case SourceStatus() if party is self._source:
                self._copied = answer
                caught_up = answer.caught_up or not self._settings.precopy
                return SourceIs(answer.phase, caught_up, answer.tail, answer.reason)
            case DestinationStatus() if party is self._destination:
                self._computed_tokens = answer.computed_tokens
                return DestinationIs(answer.phase, answer.parked, answer.reason)
        detail = f"{party.engine.name} answered another question, with {answer.kind}"
        self._refused = Refused(reason=Reason.MALFORMED, detail=detail)
        return program.Refused(Reason.MALFORMED)

    def _say_last(self, party: _Party) -> None:
        """Said once, and not waited for beyond one answer's time: leases see to the rest."""
        reason = self._state.reason or Reason.CANCELLED
        once = replace(self._patience, silence_s=0.0)
        if party.question is not None:
            party.question.cancel()
        self._last_words.append(
            asyncio.create_task(persistently(party.engine, lambda: Cancel(**self._about, reason=reason), once))
        )

    def _outcome(self) -> Outcome:
        assert self._state.result is not None
        reason = self._state.reason
        refused = self._refused if self._refused is not None and self._refused.reason is reason else None
        return Outcome(
            self._state.result,
            migration=self._migration,
            reason=reason,
            field=refused.field if refused else "",
            detail=refused.detail if refused else "",
            exact=self._exact(),
            replay=self._subject.replay if self._state.result is Result.STAYED else Replay.NEVER,
            computed_tokens=self._computed_tokens or 0,
            bytes_sent=self._copied.bytes_sent if self._copied else 0,
            stages=self._copied.stages if self._copied else 0,
            phases_ms=self._phases_ms,
        )

    def _exact(self) -> bool:
        match self._state.result:
            case Result.MOVED if self._computed_tokens == 0:
                return Feature.SAMPLING not in self._subject.request.features
            case Result.MOVED:
                return self._subject.replay is Replay.EXACT
            case Result.RESUMED:
                return not self._owner_resumes and self._subject.replay is Replay.EXACT
        return True
