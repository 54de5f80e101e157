"""The whole course of a migration over real sockets, between engines made of the protocol's own state machines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from e2e.migration.protocol_client import Client
from e2e.migration.protocol_engine import FINGERPRINT, KEY, PROMPT_TOKENS, STEP_S, ModelEngine, answer_of
from llmfleet.api import Feature, Fingerprint, Reason
from llmfleet.api.migration_messages import (
    AnyAsk,
    Cause,
    Freeze,
    Resume,
    Status,
)
from llmfleet.migration.control import ControlConnection, connect
from llmfleet.migration.coordinator import CoordinatorPhase, Result
from llmfleet.migration.course import Settings, migrate
from llmfleet.migration.outcome import Outcome, Replay
from llmfleet.migration.ports import Delivered, request_id
from llmfleet.migration.questions import Patience
from llmfleet.migration.resumption import Leaving, resume_elsewhere

ANSWER_TOKENS, SOON_S = 120, 30.0
PATIENCE = Patience(
    ask_s=0.15, poll_s=0.15, silence_s=0.6, prepare_s=2, copy_s=5, park_s=2, freeze_s=0.8, hand_over_s=1, recover_s=1,
    release_s=0.8,
)  # fmt: skip
QUICK = Settings(PATIENCE)
PATIENT = Settings(Patience(ask_s=5, silence_s=20, prepare_s=20, park_s=20, freeze_s=20, hand_over_s=20, release_s=20))


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
        async with asyncio.timeout(2 * SOON_S):
            return await migrate(client.name, self.to_a, self.to_b, client, settings=settings)

    async def all_ended_well(self) -> None:
        """Every client has its answer, and all blocks are free."""
        self.a.hurries = self.b.hurries = True
        async with asyncio.timeout(SOON_S):
            for client in self.clients:
                answer = await client.answer
                assert answer == answer_of(client.name, len(answer))
                assert len(answer) == client.length
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
        # The destination says that the request is parked only when it has ended at the source, on any machine.
        here.b.fault = lambda ask: "unanswered" if isinstance(ask, Status) and here.a.running else None
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
        here.b.lease_s = 5.0

        def cut_off(ask: AnyAsk) -> str | None:
            if isinstance(ask, Freeze):
                here.a.channel = False
                return "lost"
            return None

        here.a.fault = cut_off
        client = here.client(length=2000)
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
        here.a.lease_s = here.b.lease_s = 30.0  # one process has all the work, on a machine that may be busy
        clients = [here.client(f"r{number}", length=1400) for number in range(100)]
        for client in clients:
            client.waits_s = 30.0
        outcomes = await asyncio.gather(*(here.move(client, PATIENT) for client in clients))
        assert {(outcome.result, outcome.reason) for outcome in outcomes} == {(Result.MOVED, None)}


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
        self.leg = self.client.engines[destination].submit(request_id(migration), self.client.name, 50)

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
