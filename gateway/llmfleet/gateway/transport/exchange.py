"""One request from its assignment to its end.

    waiting <-> connecting -> sent -> (first byte) -> streaming -> done
       ^            |          |
       +------------+----------+  the engine failed before the first byte: assign again

Callbacks instead of a coroutine: no task per request and none per token. No timer either: the deadline moves with the
state, and the client's connection has a timer that wakes the exchange no later than that.

Until its answer is committed (`answer.Answer`) an engine's failure is invisible: the request goes to another engine.
An engine that *took* the request and died may have died of it, so that happens at most once; whoever tries further
kills one engine after another. A failed connection attempt costs nothing and is repeated until the request has waited
as long as it may.

Once the answer is committed, a failure becomes the stream's last event, unless another engine goes on with it
(`moving_exchange`).
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, NamedTuple

from llmfleet.gateway.fleet import Engine, Service
from llmfleet.gateway.keys import ApiKey, Priority
from llmfleet.gateway.policy import Claim, Ticket, Usage, expected_service, service_of
from llmfleet.gateway.tallies import VariantTallies
from llmfleet.gateway.transport import errors
from llmfleet.gateway.transport.answer import Answer, Client
from llmfleet.gateway.transport.body import Completion
from llmfleet.gateway.transport.http import Headers, request_head
from llmfleet.gateway.transport.upstream import EngineConnection

if TYPE_CHECKING:
    from llmfleet.gateway.transport.plane import Plane

RETRYABLE = frozenset((502, 503, 504))
"""Statuses by which an engine, or a proxy before it, says that it cannot serve now. 500 is not among them: it may
be the request's fault, and a client must not be able to eject engines."""
MAX_TAKEN = 2
"""Engines that may take a request and die before it is given up."""
MAX_REFUSED = 3
"""Engines that may answer with a RETRYABLE status before the request is given up."""


class Standing(NamedTuple):
    """What a client may claim for its request."""

    key: ApiKey
    priority: Priority
    """No higher than the key allows."""
    within_s: float
    """Time from now in which the first token should come; infinite where the client has not said."""
    paid_tokens: float
    """What the key's rate was charged in advance."""
    explain: bool
    """Whether it asks why its request goes where it goes, and may."""


class Exchange:
    """One admitted request. Owned by its client connection; ended by `finish`, which both sides lead to."""

    __slots__ = (
        "_answer",
        "_arrived",
        "_client",
        "_completion",
        "_connecting",
        "_connection",
        "_deadline",
        "_engine",
        "_engine_request",
        "_first",
        "_headers",
        "_last",
        "_path",
        "_paused",
        "_plane",
        "_refused",
        "_request_id",
        "_sent",
        "_service",
        "_standing",
        "_taken",
        "_ticket",
        "_unsent",
        "_usage",
        "claim",
        "finished",
    )

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
        self._plane = plane
        self._client = client
        self._service = service
        self._completion = completion
        self._path = path
        self._headers = headers
        self._request_id = request_id
        self._ticket: Ticket = plane.router.admit(service.key, completion.shape)
        self._ticket.explains = standing.explain
        self._arrived = plane.now()
        self._standing = standing
        self.claim = Claim(
            standing.priority,
            standing.key.tenant,
            self._arrived + min(standing.within_s, plane.limits.queue_wait_s),
            expected_service(self._ticket.prediction, completion.shape.sequences),
        )
        self._connection: EngineConnection | None = None
        self._connecting: asyncio.Task[EngineConnection] | None = None
        self._engine: Engine | None = None
        self._engine_request = b""
        self._deadline = math.inf
        self._first = 0.0
        self._last = 0.0
        self._answer = self._new_answer()
        self._taken = 0
        self._refused = 0
        self._unsent = 0
        self._paused = False
        self._sent = False
        self._usage: Usage | None = None
        self.finished = False

    # Finding an engine

    def dispatch(self) -> bool:
        """Sends the request to an engine; False if it has to wait for one. Called again when there may be one."""
        engine = self._plane.router.assign(self._ticket, batch=self.claim.priority is Priority.BATCH)
        if engine is None:
            return False
        self._engine = engine
        if self._ticket.decision is not None:
            self._answer.decision = self._ticket.decision.text().encode()
        self._sent = True
        connection = self._plane.pool.take(engine)
        if connection is not None:
            self._send(connection)
        else:
            self._connect(engine)
        return True

    def start(self) -> None:
        """Dispatches, or waits as long as is allowed, behind those who have more right to be served."""
        if self._sent:
            self._plane.rooms.again(self)
        elif (refusal := self._plane.rooms.enter(self)) is not None:
            self._end_with(refusal)
            return
        if self._connection is not None or self._connecting is not None or self.finished:
            return
        if self._plane.now() >= self.claim.deadline_s:
            self._wait_is_over()
        else:
            self._arm(self.claim.deadline_s)

    @property
    def size(self) -> object:
        """Where one request of a size finds no place, no other does."""
        return self._ticket.bucket, self.claim.priority is Priority.BATCH

    @property
    def service_key(self) -> str:
        """`namespace/name` of the service."""
        return self._service.key

    @property
    def model(self) -> str:
        """Model name that the client asked for."""
        return self._completion.model

    def _connect(self, engine: Engine) -> None:
        self._deadline = math.inf
        self._connecting = self._plane.loop.create_task(self._plane.pool.connect(engine))
        self._connecting.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[EngineConnection]) -> None:
        self._connecting = None
        if task.cancelled():
            return
        error = task.exception()
        if self.finished:
            if error is None:
                task.result().abort()
        elif error is None:
            self._send(task.result())
        else:
            self._plane.log_engine(self._engine, f"could not be connected to: {str(error) or type(error).__name__}")
            self._give_back_failed()
            self.start()

    def _send(self, connection: EngineConnection) -> None:
        self._connection = connection
        limits = self._plane.limits
        self._arm(self._plane.now() + (limits.first_byte_s if self._completion.stream else limits.answer_s))
        self._engine_request = self._plane.engine_request_id()
        if self.can_move is not self._answer.splices:
            self._answer = self._new_answer()
        self._placed()
        connection.send(self, self._request(connection.engine, self._engine_request))
        if self._client.paused:
            self._paused = True
            connection.pause()

    def _request(self, engine: Engine, request_id: bytes) -> bytes:
        body = self._completion.body
        return request_head(b"POST", self._path, self._headers, engine.authority, request_id, len(body)) + body

    # What the engine answers

    def engine_data(self, connection: EngineConnection, data: bytes, complete: bool) -> None:
        """See Receiver."""
        answer = self._answer
        if not answer.begun and connection.status in RETRYABLE:
            self._refused += 1
            self._fail(f"answered {connection.status}", give_up=self._refused >= MAX_REFUSED)
            return
        was_committed = answer.committed
        undecided = complete and self._undecided()
        if not answer.take(connection, data, complete and not undecided):
            connection.abort()
            self.engine_lost(connection, answer.failed or "closed the connection in the middle of its answer")
            return
        if undecided:
            self._connection = None
            self._ends_undecided(connection)
            return
        self._last = self._plane.now()
        if answer.begun and not self._first:
            self._first = self._last
            if answer.stream or not complete:
                self._plane.router.started(self._ticket)
                self._plane.rooms.wake(self._service.key)
        if complete:
            self._complete(connection)
        elif answer.committed and not was_committed:
            self._arm(self._last + self._plane.limits.idle_s)

    def _complete(self, connection: EngineConnection) -> None:
        if 200 <= connection.status < 300:
            usage = self._usage = self._answer.usage()
            # Of an engine that was not read for a while, the times are not its own.
            self._plane.router.completed(self._ticket, usage, timed=self._answer.stream and not self._paused)
            self._observe(usage)
        else:
            self._plane.router.started(self._ticket)
            self._plane.router.abandoned(self._ticket)
        self._connection = None
        self._finish(str(connection.status))
        connection.release()
        self._client.answer_done(close=self._answer.close_after)

    def engine_lost(self, connection: EngineConnection, reason: str) -> None:
        """See Receiver."""
        self._connection = None
        if self._goes_on(reason):
            return
        if self._answer.committed:
            self._break_off(errors.engine_lost(reason))
        elif connection.reused and not connection.answered and self._engine is not None:
            # The engine closed an idle connection just when it was used again: nobody's failure.
            self._unplaced()
            self._connect(self._engine)
        else:
            self._taken += 1
            self._fail(reason, give_up=self._taken >= MAX_TAKEN)

    # Failures

    def _fail(self, reason: str, *, give_up: bool) -> None:
        """The engine failed before the first byte."""
        self._plane.log_engine(self._engine, reason)
        self._drop_connection()
        self._give_back_failed()
        self._first = 0.0
        self._answer = self._new_answer()
        if give_up:
            self._end_with(errors.engine_failed(reason))
        else:
            self.start()

    def _give_back_failed(self) -> None:
        if self._engine is not None:
            self._tallies(self._engine.variant).retries += 1
        self._unplaced()
        self._plane.router.failed(self._ticket)

    def _break_off(self, error: errors.ApiError) -> None:
        """The engine failed after the first byte: the client is told, and the connection ends."""
        self._plane.log_engine(self._engine, error.message)
        self._plane.router.broke(self._ticket)
        self._finish(error.code)
        self._answer.break_off(error)

    def wake(self) -> None:
        """Looks whether the deadline has passed. Called at the time that was asked for, or too early."""
        if self.finished or self._deadline == math.inf:
            return
        now = self._plane.now()
        if self._answer.committed:
            self._deadline = max(self._deadline, self._last + self._plane.limits.idle_s)
        if now < self._deadline:
            self._arm(self._deadline)
        elif self._between():
            self._arm(now + self._plane.limits.idle_s)
        elif self._connection is None:
            self._wait_is_over()
        elif not self._answer.committed:
            limits = self._plane.limits
            waited = limits.first_byte_s if self._completion.stream else limits.answer_s
            reason = f"gave no first byte within {waited:g} s"
            self._taken += 1
            if self._taken >= MAX_TAKEN:
                self._plane.log_engine(self._engine, reason)
                self._drop_connection()
                self._give_back_failed()
                self._end_with(errors.engine_timeout(reason))
            else:
                self._fail(reason, give_up=False)
        elif self._client.paused and (unsent := self._client.unsent_bytes()) < self._unsent:
            self._unsent = unsent
            self._last = now
            self._arm(now + self._plane.limits.idle_s)
        elif self._client.paused:
            self.cancel("client_stalled")
            self._client.abort()
        else:
            self._drop_connection()
            self._break_off(errors.engine_lost(f"was silent for {self._plane.limits.idle_s:g} s"))

    def _wait_is_over(self) -> None:
        waited_s = self._plane.now() - self._arrived
        if self._standing.within_s < self._plane.limits.queue_wait_s:
            self._end_with(errors.deadline_passed(self._service.key, waited_s))
        else:
            self._end_with(self._plane.no_engine(self._service.key, waited_s))

    def refuse(self, error: errors.ApiError) -> None:
        """Ends a waiting request with an error."""
        self._end_with(error)

    def _end_with(self, error: errors.ApiError) -> None:
        """The request, which waits, ends without an answer of an engine."""
        self._plane.router.abandoned(self._ticket)
        self._finish(error.code)
        self._client.answer_error(error)

    def cancel(self, outcome: str = "client_gone") -> None:
        """The client is gone: the engine stops working on the request. Does nothing after the end."""
        if self.finished:
            return
        self._drop_connection()
        if self._connecting is not None:
            self._connecting.cancel()
        self._plane.router.abandoned(self._ticket)
        self._finish(outcome)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    # Hooks of a request that may go on at another engine (`moving_exchange`)

    @property
    def can_move(self) -> bool:
        """Whether another engine can go on with it."""
        return False

    def _placed(self) -> None:
        """It is sent to its engine."""

    def _unplaced(self) -> None:
        """It is not there any more."""

    def _undecided(self) -> bool:
        """Whether the end of the engine's answer may not be the answer's end."""
        return False

    def _ends_undecided(self, connection: EngineConnection) -> None:
        """It has come meanwhile."""

    def _goes_on(self, reason: str) -> bool:
        """The engine brings nothing more. Whether somebody else sees to the request."""
        return False

    def _between(self) -> bool:
        """Whether the next engine's answer is awaited, by somebody who has a deadline."""
        return False

    # Bookkeeping

    def _new_answer(self) -> Answer:
        return Answer(self._client, self._request_id, self._completion.strip_usage, splices=self.can_move)

    def client_paused(self) -> None:
        """The client does not keep up: its engine is not read for a while."""
        self._paused = True
        self._last = self._plane.now()
        self._unsent = self._client.unsent_bytes()
        if self._connection is not None:
            self._connection.pause()

    def client_resumed(self) -> None:
        """The client reads again."""
        self._last = self._plane.now()
        if self._connection is not None:
            self._connection.resume()

    def _finish(self, outcome: str) -> None:
        self.finished = True
        self._unplaced()
        self._plane.rooms.leave(self)
        self._settle()
        self._plane.rooms.wake(self._service.key)
        self._tallies(self._engine.variant if self._engine is not None else "").outcomes[outcome] += 1

    def _settle(self) -> None:
        """Charges tenant and rate for what was used, now that it is known."""
        usage = self._usage
        if usage is None:
            # Broken off, or told by nobody: what the client has got, for what was predicted of the prompt.
            prompt = self._ticket.prediction.prompt_tokens if self._first else 0.0
            usage = Usage(math.ceil(prompt), self._answer.tokens)
        if self._sent:
            self._plane.rooms.settle(self, service_of(usage.prompt_tokens, usage.completion_tokens))
        used = usage.prompt_tokens + usage.completion_tokens
        self._plane.rates.settle(self._service.key, self._standing.key, used - self._standing.paid_tokens)

    def _observe(self, usage: Usage | None) -> None:
        if self._engine is None:
            return
        now = self._plane.now()
        tallies = self._tallies(self._engine.variant)
        tallies.duration_s.observe(now - self._arrived)
        tokens = self._answer.tokens
        if usage is not None:
            tokens = usage.completion_tokens
            tallies.prompt_tokens += usage.prompt_tokens
        tallies.completion_tokens += tokens
        if self._answer.stream and self._first:
            tallies.ttft_s.observe(self._first - self._arrived)
            if tokens > 1:
                tallies.tpot_s.observe((now - self._first) / (tokens - 1))

    def _tallies(self, variant: str) -> VariantTallies:
        table = self._service.table
        return self._plane.metrics.of_requests.variant(table.namespace, table.service, variant)

    def _arm(self, deadline: float) -> None:
        self._deadline = deadline
        self._client.wake_at(deadline)
