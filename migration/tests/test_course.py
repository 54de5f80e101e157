"""The whole course of a migration over real sockets, between engines made of the protocol's own state machines.

The engines' tokens are made up and their KV is a count of blocks; everything else is as it is in earnest: an engine
that steps, leases that end, long polls, a control port, an owner that splices legs. A request's tokens follow from its
name, so that whatever engine goes on, the client must get just these.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

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
from llmfleet.migration.control import ControlConnection, connect
from llmfleet.migration.control_server import ControlServer, Peer, serve
from llmfleet.migration.coordinator import CoordinatorPhase, Result
from llmfleet.migration.course import Settings, migrate
from llmfleet.migration.destination import (
    Destination,
    DestinationEffect,
    DestinationEvent,
    DestinationInput,
    Placed,
    destination_step,
)
from llmfleet.migration.outcome import Outcome, Replay
from llmfleet.migration.ports import Delivered, migration_of, request_id
from llmfleet.migration.questions import Patience
from llmfleet.migration.resumption import Leaving, resume_elsewhere
from llmfleet.migration.source import (
    Acknowledged,
    Source,
    SourceEffect,
    SourceEvent,
    SourceInput,
    Stepped,
    source_step,
)
from llmfleet.migration.stream import (
    LegBroken,
    LegEnded,
    Stream,
    StreamEffect,
    StreamEvent,
    StreamInput,
    Tokens,
    stream_step,
)

KEY = b"k" * 32
STEP_S, LEASE_S, OWNER_WAITS_S, SOON_S = 0.001, 0.4, 1.5, 5.0
NO_DATA = ["127.0.0.1:1"]
BLOCK_TOKENS, TOTAL_BLOCKS = 4, 40_000
PROMPT_TOKENS, ANSWER_TOKENS = 40, 120
PATIENCE = Patience(
    ask_s=0.1, poll_s=0.1, silence_s=0.3, prepare_s=1, copy_s=2, park_s=1, freeze_s=0.4, hand_over_s=0.6, recover_s=0.6,
    release_s=0.4,
)  # fmt: skip
QUICK = Settings(PATIENCE)
FINGERPRINT = Fingerprint(
    vllm_version="0.32.0", model="tiny", model_hash="1234", dtype="float32", kv_dtype="auto", block_size=BLOCK_TOKENS,
    layout="2x4x64", attention_backend="CPU_ATTN", instruction_set="avx512", tp=1,
)  # fmt: skip
ENGINES: dict[str, ModelEngine] = {}
"""By instance: where the data channel leads. An engine that is dead is not in it."""


def answer_of(name: str, length: int = ANSWER_TOKENS) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(100_000) for _ in range(length)]


def now_s() -> float:
    return asyncio.get_running_loop().time()


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


@dataclass
class Running:
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
    state: Source
    request: str
    destination: str
    revision: int = 0
    upto: int = 0
    """What it had generated when it ended."""
    held_tokens: int = 0


@dataclass
class Comer:
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
        self.hurries = False
        """Nobody looks any more: end soon."""
        self._changed = asyncio.Event()
        self._server: ControlServer | None = None
        self._stepping: asyncio.Task[None] | None = None

    async def start(self, port: int = 0) -> None:
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
        return self.instance in ENGINES

    @property
    def free_blocks(self) -> int:
        used = sum(blocks_of(request.tokens) for request in self.running.values())
        held = sum(blocks_of(one.held_tokens) for one in self.leaving.values())
        return self.total_blocks - used - held - self.reserved_blocks

    @property
    def reserved_blocks(self) -> int:
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
                await asyncio.sleep(PATIENCE.ask_s / 2)
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
                    lease_s=LEASE_S, incoming=100, outgoing=100, incoming_tokens=10**6, incoming_kv_share=1
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
                state = Source(LEASE_S, now_s() + LEASE_S)
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
        self.coming[ask.migration] = Comer(Destination(LEASE_S, now_s() + LEASE_S), ask.most_tokens)
        return self._prepared(ask)

    def _prepared(self, ask: Prepare) -> Prepared:
        where = Where(instance=self.instance, data=NO_DATA)
        return Prepared(migration=ask.migration, epoch=ask.epoch, lease_s=LEASE_S, destination=where)

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


class Client:
    """The stream's owner, and its client."""

    def __init__(self, name: str, engines: dict[str, ModelEngine], length: int) -> None:
        self.name = name
        self.answer: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self.delivered: list[int] = []
        self.stream = Stream()
        self.gives_up = False
        self._engines = engines
        self._length = length
        self._legs: dict[int, tuple[ModelEngine, str, asyncio.Task[None]]] = {}
        self._next = ("", "")

    def begin_at(self, engine: ModelEngine) -> None:
        self._open(1, engine, self.name)

    def leave(self) -> None:
        self._hear(StreamEvent.CLIENT_GONE)

    async def begin(self) -> int | None:
        if StreamEffect.REFUSE in self._hear(StreamEvent.BEGIN):
            return None
        asyncio.get_running_loop().call_later(OWNER_WAITS_S, self._hear, StreamEvent.DEADLINE)
        return self.stream.epoch + 1

    async def park(self, destination: str, migration: str) -> None:
        self._next = (destination, request_id(migration))
        self._hear(StreamEvent.PARK)

    async def freeze(self) -> bool:
        if self.gives_up:
            self._hear(StreamEvent.DEADLINE)
        return StreamEffect.AGREE in self._hear(StreamEvent.FREEZE)

    async def finished(self) -> None:
        self._hear(StreamEvent.FINISHED)

    async def stays(self) -> None:
        self._hear(StreamEvent.STAYS)

    async def source_lost(self) -> Delivered:
        self._hear(StreamEvent.SOURCE_LOST)
        return Delivered(list(self.delivered), False)

    async def resume(self) -> None:
        self._hear(StreamEvent.RESUME)

    def _open(self, epoch: int, engine: ModelEngine, request: str) -> None:
        leg = engine.submit(request, self.name, self._length)
        self._legs[epoch] = (engine, request, asyncio.create_task(self._read(epoch, leg)))

    async def _read(self, epoch: int, leg: asyncio.Queue[int | str]) -> None:
        while not isinstance(told := await leg.get(), str):
            self._hear(Tokens(epoch, told))
        self._hear(LegEnded(epoch) if told == "ended" else LegBroken(epoch))

    def _close(self, epoch: int) -> None:
        engine, request, _ = self._legs.pop(epoch)
        engine.abort(request)

    def _hear(self, event: StreamInput) -> tuple[StreamEffect, ...]:
        before = self.stream.epoch
        self.stream, effects = stream_step(self.stream, event)
        for effect in effects:
            match effect:
                case StreamEffect.DELIVER:
                    answer = answer_of(self.name, self._length)
                    self.delivered += answer[len(self.delivered) : self.stream.delivered_tokens]
                case StreamEffect.SUBMIT_NEXT:
                    name, request = self._next
                    self._open(before + 1, self._engines[name], request)
                case StreamEffect.CLOSE_NEXT:
                    self._close(before + 1)
                case StreamEffect.CLOSE_PRESENT:
                    self._close(before)
                case StreamEffect.RESUME:
                    engine = next(engine for engine in self._engines.values() if engine.alive)
                    self._open(self.stream.epoch, engine, f"{self.name}-again-{self.stream.epoch}")
                case StreamEffect.END_CLIENT:
                    self.answer.set_result(self.delivered)
        return effects


@dataclass
class World:
    """Two engines, a connection to each, and clients of the first."""

    engines: dict[str, ModelEngine]
    to_a: ControlConnection
    to_b: ControlConnection
    clients: list[Client] = field(default_factory=list)

    @property
    def a(self) -> ModelEngine:
        return self.engines["a"]

    @property
    def b(self) -> ModelEngine:
        return self.engines["b"]

    def client(self, name: str = "r", length: int = ANSWER_TOKENS) -> Client:
        client = Client(name, self.engines, length)
        client.begin_at(self.a)
        self.clients.append(client)
        return client

    async def move(self, client: Client, settings: Settings = QUICK) -> Outcome:
        async with asyncio.timeout(SOON_S):
            return await migrate(client.name, self.to_a, self.to_b, client, settings=settings)

    async def all_ended_well(self) -> None:
        """Every client has its answer, and all blocks are free."""
        self.a.hurries = self.b.hurries = True
        async with asyncio.timeout(SOON_S):
            for client in self.clients:
                answer = await client.answer
                assert answer == answer_of(client.name, len(answer))
                assert len(answer) == client._length
            while any(engine.free_blocks != engine.total_blocks for engine in (self.a, self.b) if engine.alive):  # noqa: ASYNC110 - leases, data and steps free them
                await asyncio.sleep(STEP_S)


@asynccontextmanager
async def world(there: Fingerprint = FINGERPRINT) -> AsyncIterator[World]:
    a, b = ModelEngine(FINGERPRINT), ModelEngine(there)
    await a.start()
    await b.start()
    here = World({"a": a, "b": b}, connect(f"127.0.0.1:{a.port}", KEY, "a"), connect(f"127.0.0.1:{b.port}", KEY, "b"))
    try:
        yield here
        await here.all_ended_well()
    finally:
        await asyncio.gather(here.to_a.close(), here.to_b.close())
        for engine in (here.a, here.b):
            if engine.alive:
                await engine.kill()


async def test_a_request_moves_with_its_cache_and_its_client_sees_nothing_of_it() -> None:
    async with world() as here:
        client = here.client()
        outcome = await here.move(client)
        assert (outcome.result, outcome.reason, outcome.exact) == (Result.MOVED, None, True)
        assert outcome.computed_tokens == 0
        assert outcome.bytes_sent > 0
        assert {CoordinatorPhase.COPYING, CoordinatorPhase.FREEZING} <= set(outcome.phases_ms)
        assert client.stream.epoch == 2
        assert not here.a.running


async def test_a_request_that_ends_while_it_is_copied_stays_where_it_was() -> None:
    async with world() as here:
        client = here.client(length=12)
        here.b.fault = lambda ask: "late" if isinstance(ask, Status) else None
        outcome = await here.move(client)
        assert outcome.result in (Result.STAYED, Result.FINISHED)
        assert outcome.reason in (Reason.FINISHED, Reason.CANCELLED), "its owner may have taken the parked one back"
        assert outcome.exact
        assert client.stream.epoch == 1


@pytest.mark.parametrize("length", range(20, 60, 5))
async def test_wherever_the_answer_ends_it_is_told_once_and_whole(length: int) -> None:
    async with world() as here:
        await here.move(here.client(length=length))


@pytest.mark.parametrize("fault", ["lost", "unanswered", "late", "twice", "busy"])
@pytest.mark.parametrize("kind", ["prepare", "precopy", "status", "freeze", "release"])
async def test_a_question_that_goes_wrong_once_is_asked_again(fault: str, kind: str) -> None:
    async with world() as here:
        done = set()

        def once(ask: AnyAsk) -> str | None:
            if ask.kind != kind or kind in done:
                return None
            done.add(kind)
            return fault

        here.a.fault = here.b.fault = once
        outcome = await here.move(here.client(length=1000))
        if fault == "busy" and kind in ("prepare", "precopy"):
            assert (outcome.result, outcome.reason) == (Result.STAYED, Reason.BUSY)
        else:
            assert (outcome.result, outcome.reason) == (Result.MOVED, None)
        assert done == {kind}


@pytest.mark.parametrize("kind", ["prepare", "precopy", "status", "freeze", "release"])
@pytest.mark.parametrize("who", ["a", "b"])
async def test_an_engine_that_dies_at_any_question_costs_no_token(kind: str, who: str) -> None:
    async with world() as here:
        dying: list[asyncio.Task[None]] = []
        engine = here.a if who == "a" else here.b
        other = here.b if who == "a" else here.a

        def dies(ask: AnyAsk) -> str | None:
            if ask.kind == kind and not dying:
                dying.append(asyncio.create_task(engine.kill()))
                return "lost"
            return None

        here.a.fault = here.b.fault = dies
        client = here.client(length=1000)
        outcome = await here.move(client)
        assert dying
        assert other.alive
        expected = {Result.STAYED, Result.RESUMED} if kind != "release" else {Result.MOVED}
        assert outcome.result in expected
        if outcome.result is Result.STAYED:
            assert outcome.reason is Reason.PEER_LOST
        await asyncio.gather(*dying)


@pytest.mark.parametrize("kind", ["prepare", "precopy", "status", "freeze", "release"])
async def test_a_destination_that_is_restarted_knows_nothing_and_costs_no_token(kind: str) -> None:
    async with world() as here:
        restarting: list[asyncio.Task[None]] = []

        async def restart() -> None:
            port, dead = here.b.port, here.b
            here.engines["b"] = ModelEngine(FINGERPRINT)
            await dead.kill()
            await here.b.start(port)

        def restarts(ask: AnyAsk) -> str | None:
            if ask.kind == kind and not restarting:
                restarting.append(asyncio.create_task(restart()))
                return "lost"
            return None

        here.a.fault = here.b.fault = restarts
        outcome = await here.move(here.client(length=1000))
        await asyncio.gather(*restarting)
        if outcome.result is Result.STAYED:
            assert outcome.reason in (Reason.RESTARTED, Reason.PEER_LOST)
        elif kind == "prepare":
            assert outcome.result is Result.MOVED, "the question was asked again, of the new engine"


async def test_a_data_channel_that_is_cut_leaves_the_request_where_it_was() -> None:
    async with world() as here:
        client = here.client(length=1000)
        here.a.channel = False
        outcome = await here.move(client)
        assert (outcome.result, outcome.reason) == (Result.STAYED, Reason.PEER_LOST)
        assert client.stream.epoch == 1


async def test_a_tail_that_does_not_arrive_makes_the_stream_resume() -> None:
    async with world() as here:

        def cut(ask: AnyAsk) -> None:
            if isinstance(ask, Freeze):
                here.a.channel = False

        here.a.fault = cut
        client = here.client(length=1000)
        outcome = await here.move(client)
        assert (outcome.result, outcome.reason) == (Result.RESUMED, Reason.PEER_LOST)
        assert not outcome.exact, "the owner chose where"
        assert client.stream.epoch == 2


async def test_a_source_that_is_lost_at_the_cut_leaves_the_destination_to_go_on_with_what_it_has() -> None:
    async with world() as here:
        here.a.fault = lambda ask: "lost" if isinstance(ask, Freeze) else None
        client = here.client(length=1000)
        outcome = await here.move(client)
        assert (outcome.result, outcome.reason) == (Result.RESUMED, Reason.PEER_LOST)
        assert outcome.exact
        assert outcome.computed_tokens > 0
        assert len(here.b.running) == 1


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.01, 0.02, 0.03])
async def test_a_coordinator_that_is_cancelled_leaves_the_rest_to_leases(after_s: float) -> None:
    async with world() as here:
        client = here.client(length=2000)
        moving = asyncio.create_task(here.move(client))
        await asyncio.sleep(after_s)
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)


async def test_a_client_that_leaves_takes_its_request_with_it() -> None:
    async with world() as here:
        client = here.client(length=2000)
        here.b.fault = lambda ask: client.leave() if isinstance(ask, Status) else None
        outcome = await here.move(client)
        here.clients.clear()
        assert outcome.result is Result.STAYED
        assert not here.a.running
        assert not here.b.running


async def test_an_owner_that_gave_up_meanwhile_is_not_cut_off() -> None:
    async with world() as here:
        client = here.client(length=500)
        client.gives_up = True
        outcome = await here.move(client)
        assert (outcome.result, outcome.reason) == (Result.STAYED, Reason.CANCELLED)
        assert not any(one.capped for one in here.a.running.values())


async def test_of_two_migrations_of_one_request_the_second_is_busy() -> None:
    async with world() as here:
        client = here.client(length=1000)
        first, second = await asyncio.gather(here.move(client), here.move(client))
        assert {first.result, second.result} == {Result.MOVED, Result.STAYED}
        assert Reason.BUSY in (first.reason, second.reason)


async def test_a_hundred_migrations_at_once_all_end() -> None:
    async with world() as here:
        clients = [here.client(f"r{number}", length=600) for number in range(100)]
        outcomes = await asyncio.gather(*(here.move(client) for client in clients))
        assert [outcome.result for outcome in outcomes] == [Result.MOVED] * 100


async def test_a_destination_without_room_is_told_by_its_own_words() -> None:
    async with world() as here:
        here.b.total_blocks = 5
        outcome = await here.move(here.client())
        assert (outcome.result, outcome.reason, outcome.detail) == (
            Result.STAYED, Reason.NO_ROOM, "5 blocks are free",
        )  # fmt: skip


async def test_what_cannot_be_moved_is_refused_before_the_owner_is_asked() -> None:
    async with world() as here:
        client = here.client(length=300)
        unknown = await migrate("nobody", here.to_a, here.to_b, client, settings=QUICK)
        same = await migrate("r", here.to_a, here.to_a, client, settings=QUICK)
        here.a.refusal = Cause(reason=Reason.UNSUPPORTED, field="multimodal", detail="images")
        refused = await here.move(client)
        assert [outcome.reason for outcome in (unknown, same, refused)] == [
            Reason.UNKNOWN_REQUEST, Reason.SAME_ENGINE, Reason.UNSUPPORTED,
        ]  # fmt: skip
        assert (refused.field, refused.detail, refused.replay) == ("multimodal", "images", Replay.NEVER)
        assert all(outcome.migration == "" for outcome in (unknown, same, refused))


async def test_another_key_is_said_to_be_one() -> None:
    async with world() as here:
        stranger = connect(f"127.0.0.1:{here.b.port}", b"x" * 32, name="b")
        outcome = await migrate("r", here.to_a, stranger, here.client(), settings=QUICK)
        assert (outcome.result, outcome.reason) == (Result.STAYED, Reason.UNAUTHORIZED)
        await stranger.close()


def newer(**changes: str) -> Fingerprint:
    return FINGERPRINT.model_copy(update={"vllm_version": "0.33.0", **changes})


async def test_to_another_version_a_request_does_not_move_and_the_outcome_says_what_is_left() -> None:
    async with world(newer()) as here:
        outcome = await here.move(here.client())
        assert (outcome.result, outcome.reason, outcome.field) == (Result.STAYED, Reason.INCOMPATIBLE, "vllm_version")
        assert outcome.detail == "vllm_version: 0.32.0 at the source, 0.33.0 at the destination"
        assert outcome.replay is Replay.INEXACT


async def test_to_another_version_a_request_is_replayed_where_that_is_wanted() -> None:
    async with world(newer()) as here:
        client = here.client(length=300)
        outcome = await here.move(client, Settings(PATIENCE, replay=Replay.INEXACT))
        assert (outcome.result, outcome.reason, outcome.exact) == (Result.RESUMED, Reason.INCOMPATIBLE, False)
        assert outcome.computed_tokens > 0
        assert client.stream.epoch == 2
        assert not here.a.running


async def test_an_inexact_replay_is_not_made_where_only_an_exact_one_is_wanted() -> None:
    async with world(newer()) as here:
        outcome = await here.move(here.client(), Settings(PATIENCE, replay=Replay.EXACT))
        assert outcome.result is Result.STAYED


async def test_another_models_engine_never_goes_on_with_a_request() -> None:
    async with world(newer(model_hash="5678")) as here:
        outcome = await here.move(here.client(), Settings(PATIENCE, replay=Replay.INEXACT))
        assert (outcome.result, outcome.field, outcome.replay) == (Result.STAYED, "model_hash", Replay.NEVER)


async def test_a_replay_that_the_destination_refuses_leaves_the_request_where_it_was() -> None:
    async with world(newer()) as here:
        client = here.client(length=300)
        here.b.total_blocks = 5
        outcome = await here.move(client, Settings(PATIENCE, replay=Replay.INEXACT))
        assert (outcome.result, outcome.reason) == (Result.STAYED, Reason.NO_ROOM)
        assert client.stream.epoch == 1


async def test_an_answer_without_a_seed_is_not_called_exact() -> None:
    async with world() as here:
        here.a.features = [Feature.SAMPLING]
        outcome = await here.move(here.client())
        assert (outcome.result, outcome.exact) == (Result.MOVED, False)


async def test_stop_and_copy_moves_the_request_as_well() -> None:
    async with world() as here:
        outcome = await here.move(here.client(), Settings(PATIENCE, precopy=False))
        assert (outcome.result, outcome.exact) == (Result.MOVED, True)


@dataclass
class AfterACrash:
    """An owner whose source is gone: the tokens are in its journal."""

    client: Client
    leg: asyncio.Queue[int | str] | None = None

    async def park(self, destination: str, migration: str) -> None:
        self.leg = self.client._engines[destination].submit(request_id(migration), self.client.name, 50)

    async def source_lost(self) -> Delivered:
        return Delivered(answer_of(self.client.name, 50)[:20], lagged=True)


async def test_after_a_crash_a_request_goes_on_elsewhere_from_the_journal() -> None:
    async with world() as here:
        owner = AfterACrash(here.client(length=50))
        leaving = Leaving(FINGERPRINT, most_tokens=PROMPT_TOKENS + 50, features=[])
        outcome = await resume_elsewhere(leaving, here.to_b, owner, epoch=2, patience=PATIENCE)
        assert (outcome.result, outcome.exact, outcome.computed_tokens) == (Result.RESUMED, True, PROMPT_TOKENS + 19)
        assert "journal was behind" in outcome.detail
        assert owner.leg is not None
        assert await owner.leg.get() == 20


async def test_where_nothing_can_be_resumed_another_engine_can_be_tried() -> None:
    async with world() as here:
        owner = AfterACrash(here.client(length=50))
        here.b.fault = lambda ask: "busy" if isinstance(ask, Resume) else None
        leaving = Leaving(FINGERPRINT, most_tokens=PROMPT_TOKENS + 50, features=[])
        outcome = await resume_elsewhere(leaving, here.to_b, owner, epoch=2, patience=PATIENCE)
        assert (outcome.result, outcome.reason) == (Result.FAILED, Reason.BUSY)
        await here.b.kill()
        outcome = await resume_elsewhere(leaving, here.to_b, owner, epoch=3, patience=PATIENCE)
        assert (outcome.result, outcome.reason) == (Result.FAILED, Reason.PEER_LOST)
