"""The answer on its way to the client. Each engine that is tried gets a new one.

Nothing is sent, not even the status, before there is something that the client will keep: of a stream the first
event, of any other answer the whole of it (up to HOLD_BYTES). From that moment the answer is *committed* and there is
no other engine, unless the stream is spliced (`splice`): then others go on with it.
"""

from __future__ import annotations

from typing import Protocol

from llmfleet.gateway.policy import Usage
from llmfleet.gateway.transport.errors import ApiError
from llmfleet.gateway.transport.http import DECISION_HEADER, LAST_CHUNK, chunk, response_head
from llmfleet.gateway.transport.limits import HOLD_BYTES
from llmfleet.gateway.transport.splice import SplicedTap
from llmfleet.gateway.transport.sse import StreamTap, error_event, says_nothing_yet, usage_of_answer
from llmfleet.gateway.transport.upstream import EngineConnection

_EVENTS = b"text/event-stream"


class Client(Protocol):
    """The connection that the answer goes to."""

    paused: bool
    """Whether the client does not keep up."""
    chunked: bool
    """Whether the client knows the chunked coding."""

    def send(self, data: bytes) -> None:
        """Writes bytes of an answer."""

    def answer_error(self, error: ApiError) -> None:
        """Answers with an error; nothing was written before. Ends the exchange."""

    def answer_done(self, *, close: bool) -> None:
        """The answer is complete; `close`: the connection must not be used again."""

    def abort(self) -> None:
        """Ends the connection at once."""

    def closing(self) -> bool:
        """Whether the connection ends after this answer."""

    def unsent_bytes(self) -> int:
        """What was written and not yet received at the other end."""

    def wake_at(self, at_s: float) -> None:
        """The exchange is to be woken at this time of the loop's clock at the latest, unless it has ended."""


class Answer:
    """What one engine has answered to one request."""

    __slots__ = (
        "_client",
        "_framed",
        "_guarded",
        "_held",
        "_request_id",
        "_strip_usage",
        "_tap",
        "begun",
        "close_after",
        "committed",
        "decision",
        "splices",
    )

    def __init__(self, client: Client, request_id: bytes, strip_usage: bool, *, splices: bool = False) -> None:
        """`splices`: another engine may go on with the stream."""
        self._client = client
        self._request_id = request_id
        self._strip_usage = strip_usage
        self._tap: StreamTap | None = None
        self._guarded = False
        self._held: list[bytes] = []
        self._framed = False
        self.splices = splices
        """Whether another engine may go on with the stream."""
        self.begun = False
        """Whether anything for the client has come."""
        self.committed = False
        """Whether anything has gone to the client."""
        self.decision = b""
        """Why the engine was chosen, for a client that may know; goes with the head."""
        self.close_after = False
        """Whether the end of the answer is the end of the client's connection."""

    def take(self, connection: EngineConnection, data: bytes, complete: bool) -> bool:
        """Takes in what was read. False if the answer has ended too early to be whole; then nothing is sent."""
        tap = self._tap
        if tap is None and not self.begun and connection.fields.get(b"content-type", b"").startswith(_EVENTS):
            tap = self._tap = self._new_tap()
        if tap is not None:
            if complete and connection.close_delimited and not tap.done:
                return False
            data = tap.feed(data)
            if tap.failed is not None:
                if self.committed:
                    self._relay(data, complete=False)
                return False
            if complete:
                data += tap.end()
        if data and not self.begun:
            self.begun = tap is None or not says_nothing_yet(data)
        if self.committed:
            self._relay(data, complete)
            return True
        if data:
            self._held.append(data)
        if complete or (tap is not None and self.begun) or (not self._guarded and self._held_bytes() > HOLD_BYTES):
            self._commit(connection, complete)
        return True

    def _held_bytes(self) -> int:
        return sum(map(len, self._held))

    def _new_tap(self) -> StreamTap:
        if not self.splices:
            return StreamTap(self._strip_usage)
        tap = SplicedTap(self._strip_usage)
        if self._guarded:
            tap.guard()
        return tap

    @property
    def stream(self) -> bool:
        """Whether these are server-sent events."""
        return self._tap is not None

    @property
    def failed(self) -> str | None:
        """Why nothing more can be made of what the engine says; None: all is well."""
        return None if self._tap is None else self._tap.failed

    @property
    def parted(self) -> bool:
        """Whether an engine that was to go on with the answer gave another one."""
        return self._tap is not None and self._tap.parted

    def guard(self) -> None:
        """The end of what the engine says may not be the answer's end from now on."""
        self._guarded = True
        if isinstance(self._tap, SplicedTap):
            self._tap.guard()

    def thaw(self) -> None:
        """It is again."""
        self._guarded = False
        if isinstance(self._tap, SplicedTap):
            self._relay(self._tap.thaw(), complete=False)

    def next_leg(self, *, keep_texts: bool) -> None:
        """Another engine goes on with the stream, and begins by repeating it. See SplicedTap."""
        self._guarded = False
        if isinstance(self._tap, SplicedTap):
            self._relay(self._tap.next_leg(keep_texts=keep_texts), complete=False)

    def _commit(self, connection: EngineConnection, complete: bool) -> None:
        self.committed = True
        body = b"".join(self._held)
        if not complete:
            self._held.clear()
        self._framed = not complete and self._client.chunked
        self.close_after = not complete and not self._framed
        headers = connection.headers
        if self.decision:
            headers = [*headers, (DECISION_HEADER, self.decision)]
        head = response_head(
            connection.status,
            headers,
            self._request_id,
            length=len(body) if complete else None,
            chunked=self._framed,
            close=self.close_after or self._client.closing(),
        )
        self._client.send(head + (chunk(body) if self._framed and body else body))

    def _relay(self, data: bytes, complete: bool) -> None:
        if self._framed:
            data = chunk(data) if data else b""
            if complete:
                data += LAST_CHUNK
        if data:
            self._client.send(data)

    def break_off(self, error: ApiError) -> None:
        """Ends a committed answer that will never be whole: a stream by an event, any other by the connection's end."""
        if self.stream:
            event = error_event(error.body())
            self._client.send(chunk(event) + LAST_CHUNK if self._framed else event)
            self._client.answer_done(close=True)
        else:
            self._client.abort()

    @property
    def tokens(self) -> int:
        """Tokens of a stream, by its events: close enough where the engine tells no usage."""
        return 0 if self._tap is None else self._tap.events

    def told_logprobs(self) -> int:
        """Tokens whose log probabilities the client has."""
        return self._tap.told_logprobs() if isinstance(self._tap, SplicedTap) else 0

    def usage(self) -> Usage | None:
        """What the engine says that the request has used. Unknown for a large answer that was passed on in parts."""
        return usage_of_answer(b"".join(self._held)) if self._tap is None else self._tap.usage
