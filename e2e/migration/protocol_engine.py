"""An engine made of the protocol's own state machines, for tests of what is between engines.

Its tokens are made up and its KV is a count of blocks; everything else is as it is in earnest: it steps, leases end, it
answers long polls on a real control port, and its data channels take a moment. A request's tokens follow from its name,
so that whatever engine goes on, the client must get just these.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from llmfleet.api import DestinationPhase, Feature, Fingerprint, Reason, SourcePhase
from llmfleet.api.fingerprint import Compatibility, compatibility, differences
from llmfleet.api.migration_messages import (
    AnyAnswer,
    AnyAsk,
    Cancel,
    Capabilities,
    Cause,
    DestinationStatus,
    EngineCapabilities,
    EngineLimits,
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
from llmfleet.api.migration_messages import Destination as Where
from llmfleet.migration.control_server import ControlServer, Peer, serve
from llmfleet.migration.destination import (
    Destination,
    DestinationEffect,
    DestinationEvent,
    DestinationInput,
    Placed,
    destination_step,
)
from llmfleet.migration.ports import migration_of, request_id
from llmfleet.migration.source import (
    Acknowledged,
    Source,
    SourceEffect,
    SourceEvent,
    SourceInput,
    Stepped,
    source_step,
)

KEY = b"k" * 32
STEP_S, LEASE_S, LATE_S = 0.001, 0.8, 0.05
NO_DATA = ["127.0.0.1:1"]
BLOCK_TOKENS, TOTAL_BLOCKS = 4, 40_000
PROMPT_TOKENS = 40
FINGERPRINT = Fingerprint(
    vllm_version="0.32.0", model="tiny", model_hash="1234", dtype="float32", kv_dtype="auto", block_size=BLOCK_TOKENS,
    layout="2x4x64", attention_backend="CPU_ATTN", instruction_set="avx512", tp=1,
)  # fmt: skip
ENGINES: dict[str, ModelEngine] = {}
"""By instance: where the data channel leads. An engine that is dead is not in it."""


def answer_of(name: str, length: int) -> list[int]:
    """The tokens that a request of this name must get."""
    draw = random.Random(name)
    return [draw.randrange(100_000) for _ in range(length)]


def now_s() -> float:
    """The engines' clock."""
    return asyncio.get_running_loop().time()


def blocks_of(tokens: int) -> int:
    """Blocks that so many tokens take."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass
class Running:
    """A request that runs or is parked."""

    name: str
    """What its tokens follow from: what the client asked."""
    answer: list[int]
    leg: asyncio.Queue[int | str]
    """Upto which token it is told, `ended`, `broken`."""
    upto: int = 0
    capped: bool = False

    @property
    def tokens(self) -> int:
        return PROMPT_TOKENS + self.upto


@dataclass
class Leaver:
    """A migration at its source."""

    state: Source
    request: str
    destination: str
    revision: int = 0
    upto: int = 0
    """What it had generated when it ended."""
    held_tokens: int = 0


@dataclass
class Comer:
    """A migration at its destination."""

    state: Destination
    most_tokens: int
    revision: int = 0
    parked: Running | None = None
    upto: int = 0
    """What the hand-over says was generated."""
    computed_tokens: int | None = None


class ModelEngine:
    """One engine: a loop of steps, and answers to asks."""

    def __init__(self, fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint
        self.instance = f"{random.getrandbits(128):032x}"
        self.total_blocks = TOTAL_BLOCKS
        self.running: dict[str, Running] = {}
        self.leaving: dict[str, Leaver] = {}
        self.coming: dict[str, Comer] = {}
        self.channel = True
        self.refusal: Cause | None = None
        self.features: list[Feature] = [Feature.SEED]
        self.fault: Callable[[AnyAsk], str | None] = lambda ask: None
        """What goes wrong with an ask: `lost`, `unanswered`, `late`, `twice`, `busy`."""
        self.lease_s = LEASE_S
        self.hurries = False
        """Nobody looks any more: end soon."""
        self._changed = asyncio.Event()
        self._server: ControlServer | None = None
        self._stepping: asyncio.Task[None] | None = None

    async def start(self, port: int = 0) -> None:
        """Steps and answers when it returns."""
        self._server = await serve(f"127.0.0.1:{port}", KEY, self._hear)
        self.port = self._server.port
        self._stepping = asyncio.create_task(self._steps())
        ENGINES[self.instance] = self

    async def kill(self) -> None:
        """As SIGKILL: nothing is said to anybody."""
        ENGINES.pop(self.instance, None)
        if self._stepping is not None:
            self._stepping.cancel()
        for request in [*self.running.values(), *(c.parked for c in self.coming.values() if c.parked)]:
            request.leg.put_nowait("broken")
        self.running.clear()
        assert self._server is not None
        await self._server.close()

    @property
    def alive(self) -> bool:
        """Neither killed nor not started yet."""
        return self.instance in ENGINES

    @property
    def free_blocks(self) -> int:
        """Neither used, held nor reserved."""
        used = sum(blocks_of(request.tokens) for request in self.running.values())
        held = sum(blocks_of(one.held_tokens) for one in self.leaving.values())
        return self.total_blocks - used - held - self.reserved_blocks

    @property
    def reserved_blocks(self) -> int:
        """For requests that come."""
        return sum(
            blocks_of(one.most_tokens) for one in self.coming.values() if one.state.phase is DestinationPhase.RESERVED
        )

    # The API server

    def submit(self, request: str, name: str, length: int) -> asyncio.Queue[int | str]:
        """A client's request. `request`: its id; `name`: what it asks."""
        leg: asyncio.Queue[int | str] = asyncio.Queue()
        running = Running(name, answer_of(name, length), leg)
        migration = migration_of(request)
        if not self.alive:
            leg.put_nowait("broken")
        elif migration is None:
            self.running[request] = running
        elif migration not in self.coming:
            leg.put_nowait("broken")
        else:
            comer = self.coming[migration]
            comer.parked = running
            self._comes(migration, DestinationEvent.PARKED)
        return leg

    def abort(self, request: str) -> None:
        """The client has closed its connection."""
        migration = migration_of(request)
        if self.running.pop(request, None) is not None:
            self._tell_sources(request, SourceEvent.ENDED)
        elif migration is not None and migration in self.coming:
            self._comes(migration, DestinationEvent.GONE)

    # The scheduler

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            for request, one in list(self.running.items()):
                one.upto = min(one.upto + (20 if self.hurries else 1), len(one.answer))
                one.leg.put_nowait(one.upto)
                self._tell_sources(request, Stepped((one.tokens - 1) // BLOCK_TOKENS, True))
                if one.upto < len(one.answer) and not one.capped:
                    continue
                del self.running[request]
                one.leg.put_nowait("ended")
                by_itself = one.upto == len(one.answer)
                self._tell_sources(request, SourceEvent.ENDED if by_itself else SourceEvent.CUT, one.upto)
            for migration in list(self.leaving):
                self._leaves(migration, SourceEvent.TICK)
            for migration in list(self.coming):
                self._comes(migration, DestinationEvent.TICK)

    def _tell_sources(self, request: str, event: SourceInput, upto: int = 0) -> None:
        for migration, leaver in self.leaving.items():
            if leaver.request == request and not leaver.state.over:
                leaver.upto = upto
                self._leaves(migration, event)

    # Migrations

    def _leaves(self, migration: str, event: SourceInput) -> None:
        leaver = self.leaving[migration]
        before = leaver.state
        leaver.state, effects = source_step(before, event, now_s())
        for effect in effects:
            match effect:
                case SourceEffect.SEND_BLOCKS:
                    self._send(migration, Placed(leaver.state.sent_blocks))
                case SourceEffect.CAP:
                    self.running[leaver.request].capped = True
                case SourceEffect.SEND_TAIL:
                    leaver.held_tokens = PROMPT_TOKENS + leaver.upto
                    self._send(migration, DestinationEvent.TAIL)
                case SourceEffect.TELL_DESTINATION:
                    self._send(migration, DestinationEvent.SOURCE_ENDED)
                case SourceEffect.FREE_BLOCKS:
                    leaver.held_tokens = 0
        if replace(leaver.state, lease_ends_s=0) != replace(before, lease_ends_s=0):
            leaver.revision += 1
            self._wake()

    def _comes(self, migration: str, event: DestinationInput) -> None:
        comer = self.coming[migration]
        before = comer.state
        comer.state, effects = destination_step(before, event, now_s())
        for effect in effects:
            match effect:
                case DestinationEffect.ADMIT:
                    assert comer.parked is not None
                    comer.parked.upto = comer.upto
                    comer.parked.leg.put_nowait(comer.upto)
                    kv_tokens = PROMPT_TOKENS + comer.upto - 1
                    came = kv_tokens if comer.state.complete else comer.state.blocks * BLOCK_TOKENS
                    comer.computed_tokens = max(0, kv_tokens - came)
                    self.running[request_id(migration)] = comer.parked
                case DestinationEffect.ABORT_REQUEST | DestinationEffect.REFUSE_REQUEST:
                    assert comer.parked is not None
                    comer.parked.leg.put_nowait("broken")
                case DestinationEffect.TAKE_TAIL:
                    self._reply(migration, SourceEvent.TAIL_TAKEN)
                case DestinationEffect.REFUSE_TAIL:
                    self._reply(migration, SourceEvent.TAIL_REFUSED)
        if isinstance(event, Placed):
            self._reply(migration, Acknowledged(comer.state.blocks))
        if replace(comer.state, lease_ends_s=0) != replace(before, lease_ends_s=0):
            comer.revision += 1
            self._wake()

    def _send(self, migration: str, event: DestinationInput) -> None:
        """Over the data channel, which takes a moment."""
        leaver = self.leaving[migration]

        def arrive() -> None:
            there = ENGINES.get(leaver.destination)
            if there is None or not self.channel or migration not in there.coming:
                if self.alive:
                    self._leaves(migration, SourceEvent.CHANNEL_LOST)
                return
            if event is DestinationEvent.TAIL:
                there.coming[migration].upto = leaver.upto
            there._comes(migration, event)

        asyncio.get_running_loop().call_later(STEP_S, arrive)

    def _reply(self, migration: str, event: SourceInput) -> None:
        def arrive() -> None:
            for engine in list(ENGINES.values()):
                if migration in engine.leaving and engine.channel:
                    engine._leaves(migration, event)

        asyncio.get_running_loop().call_later(STEP_S, arrive)

    # The control port

    async def _hear(self, ask: AnyAsk, peer: Peer) -> AnyAnswer:
        match self.fault(ask):
            case "lost":
                await asyncio.Event().wait()
            case "unanswered":
                self._do(ask)
                await asyncio.Event().wait()
            case "late":
                await asyncio.sleep(LATE_S)
            case "twice":
                self._do(ask)
            case "busy":
                return Refused(reason=Reason.BUSY)
        answer = self._do(ask)
        return await self._when_changed(ask) if isinstance(ask, Status | Freeze) else answer

    async def _when_changed(self, ask: Status | Freeze) -> AnyAnswer:
        ends_s = now_s() + ask.wait_s
        while True:
            changed, answer = self._changed, self._status(ask)
            if isinstance(ask, Status):
                wait = not isinstance(answer, Refused) and answer.revision == ask.seen
            else:
                wait = isinstance(answer, SourceStatus) and answer.phase is SourcePhase.FREEZING
            if not wait or now_s() >= ends_s:
                return answer
            with suppress(TimeoutError):
                async with asyncio.timeout(ends_s - now_s()):
                    await changed.wait()

    def _do(self, ask: AnyAsk) -> AnyAnswer:
        match ask:
            case Capabilities():
                limits = EngineLimits(
                    lease_s=self.lease_s, incoming=100, outgoing=100, incoming_tokens=10**6, incoming_kv_share=1
                )
                return EngineCapabilities(
                    instance=self.instance, fingerprint=self.fingerprint, transports=["tcp"], data=NO_DATA,
                    limits=limits,
                )  # fmt: skip
            case ListRequests():
                return RequestList(requests=[self._described(name) for name in self.running if name == ask.request])
            case Prepare() if ask.migration not in self.coming:
                return self._prepare(ask)
            case Prepare():
                return self._prepared(ask)
            case Precopy() if ask.migration not in self.leaving:
                if ask.request not in self.running:
                    return Refused(reason=Reason.UNKNOWN_REQUEST)
                state = Source(self.lease_s, now_s() + self.lease_s)
                self.leaving[ask.migration] = Leaver(state, ask.request, ask.destination.instance)
            case Resume() if ask.migration in self.coming:
                comer = self.coming[ask.migration]
                if comer.state.phase is DestinationPhase.RESERVED:
                    comer.upto = len(ask.tokens)
                self._comes(ask.migration, DestinationEvent.RESUME)
            case Cancel() if ask.migration in self.coming:
                self._comes(ask.migration, DestinationEvent.CANCEL)
            case Status() if ask.migration in self.coming:
                self._comes(ask.migration, DestinationEvent.ASKED)
            case Precopy() | Freeze() | Release() | Cancel() | Status() if ask.migration in self.leaving:
                events = {"freeze": SourceEvent.FREEZE, "release": SourceEvent.RELEASE, "cancel": SourceEvent.CANCEL}
                self._leaves(ask.migration, events.get(ask.kind, SourceEvent.ASKED))
        return self._status(ask)

    def _prepare(self, ask: Prepare) -> AnyAnswer:
        left = differences(ask.fingerprint, self.fingerprint, ask.adapter)
        accepted = {Compatibility.COPY} if ask.tokens else {Compatibility.COPY, Compatibility.REPLAY}
        if compatibility(left) not in accepted:
            return Refused(reason=Reason.INCOMPATIBLE, field=left[0])
        if blocks_of(ask.most_tokens) > self.free_blocks:
            return Refused(reason=Reason.NO_ROOM, detail=f"{self.free_blocks} blocks are free")
        self.coming[ask.migration] = Comer(Destination(self.lease_s, now_s() + self.lease_s), ask.most_tokens)
        return self._prepared(ask)

    def _prepared(self, ask: Prepare) -> Prepared:
        where = Where(instance=self.instance, data=NO_DATA)
        return Prepared(migration=ask.migration, epoch=ask.epoch, lease_s=self.lease_s, destination=where)

    def _described(self, name: str) -> RunningRequest:
        one = self.running[name]
        return RunningRequest(
            request=name, prompt_tokens=PROMPT_TOKENS, output_tokens=one.upto,
            most_tokens=PROMPT_TOKENS + len(one.answer), blocks=blocks_of(one.tokens), features=self.features,
            refusal=self.refusal,
        )  # fmt: skip

    def _status(self, ask: Any) -> SourceStatus | DestinationStatus | Refused:
        about = {"migration": ask.migration, "epoch": ask.epoch}
        if ask.migration in self.leaving:
            leaver = self.leaving[ask.migration]
            here = leaver.state
            return SourceStatus(
                **about, revision=leaver.revision, phase=here.phase, full_blocks=here.full_blocks,
                sent_blocks=here.sent_blocks, acknowledged_blocks=here.acknowledged_blocks, caught_up=here.caught_up,
                tail=here.tail, reason=here.reason, output_tokens=leaver.upto, bytes_sent=100 * here.sent_blocks,
                stages=1,
            )  # fmt: skip
        if ask.migration in self.coming:
            comer = self.coming[ask.migration]
            there = comer.state
            return DestinationStatus(
                **about, revision=comer.revision, phase=there.phase, blocks=there.blocks, parked=there.parked,
                complete=there.complete, reason=there.reason, computed_tokens=comer.computed_tokens,
            )  # fmt: skip
        return Refused(reason=Reason.UNKNOWN_REQUEST, detail="no such migration")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
