"""Whatever fails while a request moves between two real vLLMs, its client gets the same answer, and nothing is held.

Engines compute in float32, where an answer that goes on elsewhere is exact even where its KV cache is computed anew.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from e2e.migration import cases
from e2e.migration.compare import differences
from e2e.migration.faults import Harm, Moment, Rerouted, Unreliable, Wire, at_moment
from e2e.migration.owner import StreamOwner, Transcript
from e2e.migration.pair import Pair, start_pair
from e2e.migration.rig import Rig
from llmfleet.api import Reason
from llmfleet.api.migration_messages import Capabilities, Refused
from llmfleet.migration.control import connect
from llmfleet.migration.coordinator import Result
from llmfleet.migration.course import migrate
from llmfleet.migration.outcome import Outcome

pytestmark = [pytest.mark.node, pytest.mark.full, pytest.mark.timeout(600)]

CALL = cases.completion({**cases.SAMPLING["all penalties, seed"], "max_tokens": 250}, cases.prompt_tokens(300))
MOMENTS = list(Moment)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with start_pair("float32") as pair:
        yield pair


@pytest.fixture
async def rig(pair: Pair) -> AsyncIterator[Rig]:
    async with Rig.of(pair) as rig:
        yield rig
        assert await rig.held() == []


@pytest.fixture
async def fresh() -> AsyncIterator[Rig]:
    """Engines that may be killed."""
    with start_pair("float32") as pair:
        async with Rig.of(pair) as rig:
            yield rig


class Going:
    """A client's request on its way, begun at `a`."""

    def __init__(self, rig: Rig, owner: StreamOwner) -> None:
        self.rig, self.owner = rig, owner
        self.client = asyncio.create_task(owner.run())

    @classmethod
    async def begun(cls, rig: Rig, patience_s: float = 3.0) -> Going:
        going = cls(rig, rig.owner(cases.apart(CALL), patience_s=patience_s))
        await going.owner.arrived(10)
        return going

    async def answer(self) -> Transcript:
        async with asyncio.timeout(60):
            return await self.client


def assert_same(expected: Transcript, got: Transcript) -> None:
    assert [str(one) for one in differences(expected, got)] == []


@pytest.mark.parametrize("seed", range(6))
async def test_lost_late_and_repeated_messages_change_nothing(rig: Rig, seed: int) -> None:
    expected = await rig.undisturbed(CALL)
    going = await Going.begun(rig, patience_s=10)
    a, b = (Unreliable(rig.engines[name], seed * 2 + place) for place, name in enumerate("ab"))
    outcome = await migrate(going.owner.request, a, b, going.owner)
    assert_same(expected, await going.answer())
    assert isinstance(outcome, Outcome)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_coordinator_that_dies_leaves_the_stream_whole(rig: Rig, moment: Moment) -> None:
    expected = await rig.undisturbed(CALL)
    going = await Going.begun(rig)

    async def die() -> None:
        moving.cancel()

    at_moment(going.owner, moment, die)
    moving = asyncio.create_task(rig.move(going.owner))
    with pytest.raises(asyncio.CancelledError):
        await moving
    assert_same(expected, await going.answer())


@pytest.mark.parametrize("delay_s", [0.0, 0.002, 0.01])
async def test_a_coordinator_that_dies_after_the_cut_leaves_the_stream_whole(rig: Rig, delay_s: float) -> None:
    expected = await rig.undisturbed(CALL)
    going = await Going.begun(rig)

    async def die_soon() -> None:
        asyncio.get_running_loop().call_later(delay_s, moving.cancel)

    at_moment(going.owner, Moment.FREEZE, die_soon)
    moving = asyncio.create_task(rig.move(going.owner))
    await asyncio.gather(moving, return_exceptions=True)
    assert_same(expected, await going.answer())


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_client_that_goes_away_leaves_nothing_behind(rig: Rig, moment: Moment) -> None:
    going = await Going.begun(rig)

    async def leave() -> None:
        going.client.cancel()
        await asyncio.sleep(0)

    at_moment(going.owner, moment, leave)
    outcome = await rig.move(going.owner)
    assert outcome.result is not Result.MOVED
    with pytest.raises(asyncio.CancelledError):
        await going.client


@pytest.mark.parametrize("harm", list(Harm))
@pytest.mark.parametrize("after_bytes", [1, 200_000, 900_000])
async def test_a_broken_data_channel_is_not_seen_by_the_client(rig: Rig, harm: Harm, after_bytes: int) -> None:
    expected = await rig.undisturbed(CALL)
    going = await Going.begun(rig, patience_s=20)
    async with Wire(harm, after_bytes).open() as wire:
        destination = Rerouted(rig.engines["b"], wire)
        outcome = await migrate(going.owner.request, rig.engines["a"], destination, going.owner)
        assert_same(expected, await going.answer())
    assert wire.done
    assert outcome.reason is not None or outcome.computed_tokens == 0


@pytest.mark.parametrize("max_tokens", range(11, 60, 4))
async def test_a_request_that_ends_while_it_moves_ends_as_it_would_have(rig: Rig, max_tokens: int) -> None:
    call = cases.completion({**cases.SAMPLING["seed"], "max_tokens": max_tokens}, cases.prompt_tokens(300))
    expected = await rig.undisturbed(call)
    transcript, _ = await rig.moved(call, [8])
    assert_same(expected, transcript)


@pytest.mark.parametrize("letters", range(10, 50, 4))
async def test_a_grammar_that_ends_at_the_cut_ends_as_it_would_have(rig: Rig, letters: int) -> None:
    grammar = {"temperature": 0, "structured_outputs": {"regex": f"[a-z]{{{letters}}}"}}
    call = cases.completion(grammar, cases.prompt_tokens(300))
    expected = await rig.undisturbed(call)
    assert expected.answer.finish[0][0] == "stop"
    transcript, _ = await rig.moved(call, [6])
    assert_same(expected, transcript)


async def test_a_request_moves_once_at_a_time(rig: Rig) -> None:
    expected = await rig.undisturbed(CALL)
    going = await Going.begun(rig)
    outcomes = await asyncio.gather(rig.move(going.owner), rig.move(going.owner))
    assert_same(expected, await going.answer())
    assert [outcome.reason for outcome in outcomes].count(Reason.BUSY) == 1
    assert [outcome.result for outcome in outcomes].count(Result.MOVED) == 1


async def test_an_engine_is_no_destination_of_its_own_requests(rig: Rig) -> None:
    going = await Going.begun(rig)
    outcome = await migrate(going.owner.request, rig.engines["a"], rig.engines["a"], going.owner)
    assert (outcome.result, outcome.reason) == (Result.STAYED, Reason.SAME_ENGINE)
    await going.answer()


async def test_a_peer_without_the_key_gets_no_answer_and_does_no_harm(rig: Rig) -> None:
    stranger = connect(rig.pair.a.control, b"x" * 64, "stranger")
    answer = await stranger.ask(Capabilities(), 5.0)
    assert isinstance(answer, Refused)
    assert answer.reason is Reason.UNAUTHORIZED
    await stranger.close()
    await rig.ask("a", Capabilities())


async def test_bytes_that_mean_nothing_do_no_harm(rig: Rig) -> None:
    host, port = rig.pair.b.control.split(":")
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000)):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(noise)
        writer.close()
    transcript, (outcome,) = await rig.moved(CALL)
    assert outcome.result is Result.MOVED
    assert transcript.error is None


async def test_a_destination_without_room_is_refused_before_anything_is_copied(rig: Rig) -> None:
    long = cases.completion({"temperature": 0, "max_tokens": 600}, cases.prompt_tokens(7600))
    others = [rig.owner(cases.apart(long), engine="b") for _ in range(4)]
    clients = [asyncio.create_task(owner.run()) for owner in others]
    await asyncio.gather(*(owner.arrived(1) for owner in others))
    going = Going(rig, rig.owner(cases.apart(cases.completion({"temperature": 0}, cases.prompt_tokens(4000)))))
    await going.owner.arrived(5)
    outcome = await rig.move(going.owner)
    assert (outcome.result, outcome.reason) == (Result.STAYED, Reason.NO_ROOM)
    assert (await going.answer()).error is None
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


@pytest.mark.parametrize("moment", [Moment.PARK, Moment.FREEZE])
@pytest.mark.parametrize("victim", ["a", "b"])
async def test_an_engine_that_is_killed_costs_no_token(fresh: Rig, victim: str, moment: Moment) -> None:
    expected = await fresh.undisturbed(CALL)
    going = await Going.begun(fresh)

    async def kill() -> None:
        (member,) = [member for member in fresh.pair.members if member.name == victim]
        for pid in member.server.pids():
            os.kill(pid, signal.SIGKILL)

    at_moment(going.owner, moment, kill)
    outcome = await fresh.move(going.owner)
    assert outcome.result is not Result.MOVED
    assert_same(expected, await going.answer())
