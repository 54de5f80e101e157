"""A request with whose answer another engine can go on: the client's side of a stream that moves.

    Exchange         one request, one engine after another until the answer begins
    MovingExchange   and then, too: legs of the answer, of which the client gets one (RFC 2, RFC 4)

In flow what the owner of the stream decides (`moving.owner`), and what those who move streams ask for (`moving.moves`);
out flow connections to engines and one answer to the client. Where an engine or its service has no migration plug-in
nothing of this is used, and costs nothing.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from llmfleet.gateway.fleet import Engine, Service
from llmfleet.gateway.keys import Priority
from llmfleet.gateway.moving.owner import Leg, MovingStream
from llmfleet.gateway.policy import Ticket
from llmfleet.gateway.transport import errors
from llmfleet.gateway.transport.answer import Client
from llmfleet.gateway.transport.body import MOVING_APIS, Completion, holds_back
from llmfleet.gateway.transport.exchange import MAX_TAKEN, Exchange, Standing
from llmfleet.gateway.transport.http import Headers
from llmfleet.gateway.transport.upstream import EngineConnection
from llmfleet.migration.ports import Delivered
from llmfleet.migration.stream import StreamPhase

if TYPE_CHECKING:
    from llmfleet.gateway.transport.plane import Plane

MAX_RESUMES = 4
"""Engines under which a stream may break before it is given up."""


class MovingExchange(Exchange):
    """See the module."""

    __slots__ = ("_ended", "_owner", "_resumes")

    def __init__(
        self,
        plane: Plane,
        client: Client,
        service: Service,
        completion: Completion,
        path: bytes,
        headers: Headers,
        request_id: bytes,
        standing: Standing,
    ) -> None:
        super().__init__(plane, client, service, completion, path, headers, request_id, standing)
        self._owner: MovingStream | None = None
        self._ended: EngineConnection | None = None
        """Of an answer that is complete, while that says nothing."""
        self._resumes = 0

    # Exchange's hooks

    def _placed(self) -> None:
        self._plane.moves.sent(self)

    def _unplaced(self) -> None:
        self._plane.moves.left(self)

    def _undecided(self) -> bool:
        return self._owner is not None and self._owner.undecided

    def _ends_undecided(self, connection: EngineConnection) -> None:
        self._ended = connection
        self.owner().present_ended()

    def _between(self) -> bool:
        return self._owner is not None and self._owner.between

    def _goes_on(self, reason: str) -> bool:
        if self._answer.parted:
            return False
        if self._owner is not None and self._owner.phase is not StreamPhase.STREAMING:
            self._plane.log_engine(self._engine, reason)
        elif self._answer.committed and self.can_move:
            self._plane.log_engine(self._engine, reason)
            self._plane.router.engine_lost(self._ticket)
        else:
            return False
        self.owner().present_broken()
        return True

    def _finish(self, outcome: str) -> None:
        super()._finish(outcome)
        if self._owner is not None:
            self._owner.close()
        ended, self._ended = self._ended, None
        if ended is not None:
            ended.abort()

    # moving.moves.Moved

    @property
    def ticket(self) -> Ticket:
        """See Moved."""
        return self._ticket

    @property
    def engine(self) -> Engine | None:
        """See Moved."""
        return self._engine

    @property
    def engine_request(self) -> str:
        """See Moved."""
        return self._engine_request.decode()

    @property
    def client_request(self) -> str:
        """See Moved."""
        return self._request_id.decode()

    @property
    def streamed(self) -> bool:
        """See Moved."""
        return self._completion.stream

    @property
    def begun(self) -> bool:
        """See Moved."""
        return self._answer.committed

    @property
    def can_move(self) -> bool:
        """See Moved."""
        return (
            self._engine is not None
            and self._engine.control is not None
            and self._service.peer_key is not None
            and self._completion.api in MOVING_APIS
            and self._completion.shape.sequences == 1
            and (self._completion.stream or not self._answer.committed)
        )

    @property
    def high(self) -> bool:
        """See Moved."""
        return self.claim.priority is Priority.HIGH

    def answered_tokens(self) -> int:
        """See Moved."""
        return self._answer.tokens

    def remaining_tokens(self) -> float:
        """See Moved."""
        longest = self._completion.shape.max_output_tokens
        expected = self._ticket.prediction.output_tokens
        return (longest if longest is not None else expected) - self._answer.tokens

    def most_tokens(self) -> int:
        """See Moved."""
        longest = self._completion.shape.max_output_tokens
        answer = longest if longest is not None else self._ticket.prediction.output_tokens
        most = math.ceil(self._ticket.prediction.prompt_tokens + answer)
        return max(1, min(most, self._service.table.context_length))

    def body(self) -> dict[str, Any]:
        """See Moved."""
        document = json.loads(self._completion.body)
        assert isinstance(document, dict), "it was one when it came"
        return document

    def told_logprobs(self) -> int | None:
        """See Moved."""
        # Completions ask by a number, 0 included; chat by a boolean.
        asked = self.body().get("logprobs")
        return None if asked is None or asked is False else self._answer.told_logprobs()

    def owner(self) -> MovingStream:
        """See Moved."""
        if self._owner is None:
            self._owner = MovingStream(self)
        return self._owner

    def restart(self) -> None:
        """See Moved."""
        if self.finished or self._answer.committed or self._connection is None:
            return
        self._drop_connection()
        self._unplaced()
        self._plane.router.unassigned(self._ticket)
        self._engine = None
        self._answer = self._new_answer()
        self._first = 0.0
        self.start()

    def give_up(self, reason: str) -> None:
        """See Moved."""
        if not self.finished:
            self._break_off(errors.engine_lost(reason))

    # moving.owner.Spliced

    async def open_leg(self, leg: Leg) -> None:
        """See Spliced."""
        # Not one of the pool, which the engine may be about to close.
        leg.connection = connection = await self._plane.pool.connect(leg.engine)
        connection.send(leg, self._request(leg.engine, leg.request.encode()))

    def switch(self, leg: Leg) -> None:
        """See Spliced."""
        connection = leg.connection
        if connection is None or self.finished:
            return
        ended, self._ended = self._ended, None
        if ended is not None:
            ended.release()
        self._drop_connection()
        self._unplaced()
        self._plane.router.moved(self._ticket, leg.engine)
        self._engine, self._engine_request = leg.engine, leg.request.encode()
        self._connection = connection
        connection.pass_to(self)
        self._placed()
        if self._answer.committed:
            self._plane.metrics.gap_s.observe(self._plane.now() - self._last)
            self._answer.next_leg(keep_texts=not holds_back(self.body()))
        else:
            self._answer = self._new_answer()
        if self._client.paused:
            connection.pause()
        data, leg.data = leg.data, b""
        if data or leg.complete:
            self.engine_data(connection, data, leg.complete)

    def drop_present(self) -> None:
        """See Spliced."""
        self._drop_connection()

    def guard(self) -> None:
        """See Spliced."""
        self._answer.guard()

    def thaw(self) -> None:
        """See Spliced."""
        self._answer.thaw()

    def conclude(self) -> None:
        """See Spliced."""
        connection, self._ended = self._ended, None
        self._answer.thaw()
        if connection is None or not self._answer.take(connection, b"", complete=True):
            self.give_up("closed the connection at the end of its answer")
            return
        if not self._first:
            self._first = self._last
        self._complete(connection)

    def resume(self) -> None:
        """See Spliced."""
        if self.finished:
            return
        self._drop_connection()
        self._resumes += 1
        if self._resumes > MAX_RESUMES:
            self.give_up(f"and {MAX_RESUMES} others were lost")
        elif self._answer.committed:
            self._plane.moves.resume(self)
        else:
            owner, self._owner = self._owner, None
            if owner is not None:
                owner.close()
            self._taken += 1
            self._fail("was lost while the request moved", give_up=self._taken >= MAX_TAKEN)

    def delivered(self) -> Delivered:
        """See Spliced."""
        return self._plane.moves.delivered(self)
