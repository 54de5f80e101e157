"""Clients of two engines, and a coordinator between them.

In: a `Pair`. Out: what a client gets of a request that stays (`undisturbed`) or moves (`moved`), and whether the
engines have given back all that they held (`settled`). Belongs to one event loop; the engines outlive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence

import aiohttp

from e2e.migration.cases import apart
from e2e.migration.leg import Call
from e2e.migration.owner import StreamOwner, Transcript
from e2e.migration.pair import MAX_MODEL_LEN_TOKENS, Pair
from llmfleet.api.migration_messages import (
    AnyAnswer,
    AnyAsk,
    Capabilities,
    EngineCapabilities,
    GetLoad,
    ListRequests,
    Load,
    RequestList,
    RunningRequest,
)
from llmfleet.migration.control import ControlConnection, connect
from llmfleet.migration.coordinator import Result
from llmfleet.migration.course import Settings, migrate
from llmfleet.migration.outcome import Outcome
from llmfleet.migration.ports import Delivered, request_id
from llmfleet.migration.resumption import Leaving, resume_elsewhere

_ASK_S = 5.0
_SETTLE_S = 20.0
_POLL_S = 0.01


class Rig:
    """Two engines by name, as a coordinator and as a client see them."""

    def __init__(self, pair: Pair, session: aiohttp.ClientSession, engines: dict[str, ControlConnection]) -> None:
        self.pair = pair
        self.engines = engines
        self._session = session
        self._urls = {member.name: member.url for member in pair.members}

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, pair: Pair) -> AsyncIterator[Rig]:
        """Connected to both engines."""
        engines = {member.name: connect(member.control, pair.key, member.name) for member in pair.members}
        connector = aiohttp.TCPConnector(limit=0)
        try:
            async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
                yield cls(pair, session, engines)
        finally:
            for engine in engines.values():
                await engine.close()

    def owner(self, call: Call, *, engine: str = "a", patience_s: float = 10.0) -> StreamOwner:
        """A client's request that begins at `engine`, under a new id; where it breaks it resumes at either."""
        name = f"client-{secrets.token_hex(8)}"
        return StreamOwner(
            self._session, self._urls, call, request=name, engine=engine, resumption=self._resume, patience_s=patience_s
        )

    async def undisturbed(self, call: Call, engine: str = "a") -> Transcript:
        """What the client gets when nothing happens."""
        return await self.owner(apart(call), engine=engine).run()

    async def moved(
        self, call: Call, at: Sequence[int] = (10,), settings: Settings | None = None
    ) -> tuple[Transcript, list[Outcome]]:
        """Begin at `a` and move to the other engine whenever so many tokens have been made: once for each of `at`."""
        owner = self.owner(apart(call))
        client = asyncio.create_task(owner.run())
        try:
            outcomes = []
            for tokens in at:
                await self.made(owner, tokens)
                outcomes.append(await self.move(owner, settings))
            return await client, outcomes
        finally:
            client.cancel()
            await asyncio.gather(client, return_exceptions=True)

    async def move(self, owner: StreamOwner, settings: Settings | None = None) -> Outcome:
        """Move a request from where it is to the other engine."""
        other = "b" if owner.engine == "a" else "a"
        request = owner.request
        outcome = await migrate(request, self.engines[owner.engine], self.engines[other], owner, settings=settings)
        if outcome.result is Result.MOVED:
            # The destination runs; its first token may still be on its way to the owner.
            await owner.leg_after(request)
        return outcome

    async def made(self, owner: StreamOwner, tokens: int) -> None:
        """Wait until the engine has made so many tokens of the answer, or the answer has ended."""
        while not owner.over:
            running = await self.running(owner.engine, owner.request)
            if running is not None and running.output_tokens >= tokens:
                return
            await asyncio.sleep(_POLL_S)

    async def running(self, engine: str, request: str) -> RunningRequest | None:
        """A request as its engine describes it; None if it does not run there."""
        answer = await self.ask(engine, ListRequests(request=request))
        assert isinstance(answer, RequestList)
        return answer.requests[0] if answer.requests else None

    async def ask(self, engine: str, message: AnyAsk) -> AnyAnswer:
        return await self.engines[engine].ask(message, _ASK_S)

    async def load(self, engine: str) -> Load:
        answer = await self.ask(engine, GetLoad())
        assert isinstance(answer, Load)
        return answer

    async def held(self) -> list[str]:
        """What an engine has not given back though all should be settled."""
        return [f"{name}: {load}" for name, load in (await self.settled()).items() if not _idle(load)]

    async def settled(self) -> dict[str, Load]:
        """Wait until nothing runs, comes or is held, or until that has taken too long; the last loads."""
        deadline = asyncio.get_running_loop().time() + _SETTLE_S
        while True:
            loads = {name: await self.load(name) for name in self.engines}
            if all(map(_idle, loads.values())) or asyncio.get_running_loop().time() > deadline:
                return loads
            await asyncio.sleep(0.1)

    async def _resume(self, owner: StreamOwner, delivered: Delivered) -> None:
        """At whichever engine will: first the other one than the leg was at."""
        names = sorted(self.engines, key=lambda name: name == owner.engine)
        tried = []
        for name in names:
            try:
                capabilities = await self.ask(name, Capabilities())
                assert isinstance(capabilities, EngineCapabilities)
                leaving = Leaving(capabilities.fingerprint, MAX_MODEL_LEN_TOKENS, [])
                outcome = await resume_elsewhere(
                    leaving, self.engines[name], _Resuming(owner, delivered), epoch=owner.epoch
                )
            except Exception as error:
                tried.append(f"{name}: {error!r}")
                continue
            if outcome.result is Result.RESUMED:
                return
            tried.append(f"{name}: {outcome.reason} {outcome.detail}")
        raise LookupError("; ".join(tried))


def _idle(load: Load) -> bool:
    held = load.running or load.incoming or load.outgoing or load.blocks_reserved or load.blocks_held
    return not held and load.blocks_free == load.blocks_total


class _Resuming:
    """The owner of a stream whose leg has broken."""

    def __init__(self, owner: StreamOwner, delivered: Delivered) -> None:
        self._owner, self._delivered = owner, delivered

    async def park(self, destination: str, migration: str) -> None:
        self._owner.open_resumed(destination, request_id(migration))

    async def source_lost(self) -> Delivered:
        return self._delivered
