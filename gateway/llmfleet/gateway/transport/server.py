"""A client's connection: HTTP/1.1 requests in, answers out, one at a time.

Requests are parsed by httptools (llhttp), which refuses what request smuggling lives on. The connection keeps being
read while an answer is on its way, because that is how a client's leaving is noticed; what a client sends ahead
(pipelining) is parsed and waits, and a client that sends too much of it is not read any further.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import random
import re
import sys
import termios
from collections import deque
from collections.abc import Callable
from typing import cast

import httptools

from llmfleet.gateway.fleet import ANY_MODEL, Service
from llmfleet.gateway.keys import ApiKey, Priority, key_digest
from llmfleet.gateway.transport import errors
from llmfleet.gateway.transport.body import APIS, Api, Completion, parse_completion
from llmfleet.gateway.transport.exchange import Exchange, Standing
from llmfleet.gateway.transport.http import CONTINUE, DECISION_HEADER, Fields, Headers, fields_of, response_head
from llmfleet.gateway.transport.limits import HEAD_BYTES, PIPELINE_BYTES, WRITE_HIGH_BYTES
from llmfleet.gateway.transport.moving_exchange import MovingExchange
from llmfleet.gateway.transport.plane import Plane

_PATHS = {b"POST": tuple(APIS), b"GET": (b"/v1/models", b"/health", b"/readyz")}
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")
_JSON: Headers = [(b"content-type", b"application/json")]

DEADLINE_HEADER = b"x-llmfleet-deadline-ms"
"""Time to the first token, in milliseconds, beyond which the client has no use for the answer."""
_DEADLINE_DIGITS = 9
_LINGER_S = 5.0
"""How long a client that was refused in the middle of its request may go on sending."""


class Request:
    """One parsed request."""

    __slots__ = ("body", "body_bytes", "digest", "error", "fields", "headers", "keep_alive", "method", "target")

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.headers: Headers = []
        self.fields: Fields = {}
        """Of the headers; empty until all are there."""
        self.digest: bytes | None = None
        """Of the API key."""
        self.body: list[bytes] = []
        self.body_bytes = 0
        self.keep_alive = True
        self.error: errors.ApiError | None = None


class ClientConnection(asyncio.Protocol):
    """One client connection. It owns at most one exchange at a time."""

    __slots__ = (
        "_ahead",
        "_deaf",
        "_exchange",
        "_head_bytes",
        "_held_bytes",
        "_idle_since",
        "_keep_alive",
        "_on_lost",
        "_on_made",
        "_parser",
        "_pending",
        "_plane",
        "_request",
        "_request_id",
        "_timer",
        "_transport",
        "chunked",
        "paused",
    )

    def __init__(
        self,
        plane: Plane,
        on_made: Callable[[ClientConnection], bool],
        on_lost: Callable[[ClientConnection], None],
    ) -> None:
        """`on_made` says whether there is room for a client more; one for whom there is none is told so."""
        self._plane = plane
        self._on_made = on_made
        self._on_lost = on_lost
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._request: Request | None = None
        self._pending: deque[Request] = deque()
        self._exchange: Exchange | None = None
        self._idle_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._held_bytes = 0
        self._ahead = 0
        self._keep_alive = True
        self._deaf = False
        self._request_id = b""
        self.paused = False
        self.chunked = True

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._plane.metrics.connections.inc()
        if not self._on_made(self):
            self._refuse_rest(errors.too_many_connections(self._plane.limits.connections))
            self._next()
        else:
            self._await_request()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._exchange is not None:
            self._ahead += len(data)
            if self._ahead > PIPELINE_BYTES and self._transport is not None:
                self._transport.pause_reading()
        if self._request is None or not self._request.method:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The parser gives up at the end of the head: it takes the body for the other protocol.
            self._pending.pop()
            self._refuse_rest(errors.invalid_request("Leave out the header 'Upgrade': only HTTP/1.1 is spoken here."))
        except httptools.HttpParserError as error:
            self._refuse_rest(
                errors.invalid_request(f"The request is not valid HTTP/1.1: {error}", code="invalid_http")
            )
        else:
            if self._head_bytes > HEAD_BYTES and self._request is not None and not self._request.method:
                message = f"The request head is larger than the {HEAD_BYTES} bytes that this gateway accepts."
                self._refuse_rest(errors.invalid_request(message, status=431, code="head_too_large"))
        self._next()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._plane.metrics.connections.dec()
        self._stop_timer()
        self._pending.clear()
        self._transport = None
        if self._exchange is not None:
            self._exchange.cancel()
            self._exchange = None
        self._let_go()
        self._on_lost(self)

    def pause_writing(self) -> None:
        self.paused = True
        if self._exchange is not None:
            self._exchange.client_paused()

    def resume_writing(self) -> None:
        self.paused = False
        if self._exchange is not None:
            self._exchange.client_resumed()

    # httptools

    def on_message_begin(self) -> None:
        self._request = Request()

    def on_url(self, url: bytes) -> None:
        if self._request is not None:
            self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # A trailer comes when the head, with its method, is complete; nothing may be decided by it any more.
        if self._request is not None and not self._request.method:
            self._request.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        request = self._request
        if request is None:
            return
        self._head_bytes = 0
        request.method = self._parser.get_method()
        fields = request.fields = fields_of(request.headers)
        request.digest = _digest(fields.get(b"authorization"))
        declared = fields.get(b"content-length")
        if declared is not None and int(declared) > self._plane.limits.body_bytes:
            self._refuse_rest(errors.too_large(self._plane.limits.body_bytes))
        elif request.method == b"POST" and not self._plane.fleet.knows(request.digest):
            self._refuse_rest(errors.wrong_key(request.digest is not None))
        elif fields.get(b"expect", b"").lower() == b"100-continue" and self._idle():
            self.send(CONTINUE)

    def on_body(self, body: bytes) -> None:
        request = self._request
        if request is None or request.error is not None:
            return
        request.body_bytes += len(body)
        if request.body_bytes > self._plane.limits.body_bytes:
            self._refuse_rest(errors.too_large(self._plane.limits.body_bytes))
        elif self._plane.bodies_bytes + len(body) > self._plane.limits.all_bodies_bytes:
            self._refuse_rest(errors.too_much_at_once(self._plane.limits.all_bodies_bytes))
        else:
            request.body.append(body)
            self._plane.bodies_bytes += len(body)
            self._held_bytes += len(body)

    def on_message_complete(self) -> None:
        request, self._request = self._request, None
        if request is not None and request.error is None:
            request.keep_alive = self._parser.should_keep_alive()
            self._pending.append(request)

    def _refuse_rest(self, error: errors.ApiError) -> None:
        """Nothing that follows on this connection can be understood: answers what came before, then the error."""
        if self._deaf:
            return
        self._deaf = True
        request = self._request or Request()
        request.error = error
        request.fields = fields_of(request.headers)
        request.keep_alive = False
        self._pending.append(request)

    # One request after the other

    def _idle(self) -> bool:
        return self._exchange is None and not self._pending

    def _next(self) -> None:
        while self._pending and self._exchange is None and self._transport is not None:
            self._handle(self._pending.popleft())

    def _handle(self, request: Request) -> None:
        self._keep_alive = request.keep_alive and not self._plane.draining
        given = request.fields.get(b"x-request-id")
        self._request_id = given if given and _REQUEST_ID.match(given) else b"%032x" % random.getrandbits(128)
        try:
            if request.error is not None:
                raise request.error
            self._route(request)
        except errors.ApiError as error:
            self._plane.metrics.refused.labels(error.code).inc()
            self.answer_error(error)

    def _route(self, request: Request) -> None:
        path = request.target.partition(b"?")[0]
        api = APIS.get(path)
        if api is not None and request.method == b"POST":
            self._complete(request, api, path)
        elif path not in _PATHS.get(request.method, ()):
            allowed = [method for method, paths in _PATHS.items() if path in paths]
            raise _no_such_route(request.method, path, allowed)
        elif path == b"/v1/models":
            self._answer_json(self._models(request))
        elif path == b"/readyz" and (self._plane.draining or not self._plane.synced):
            raise errors.shutting_down() if self._plane.draining else errors.not_synced()
        else:
            self._answer_json({"status": "ok"})

    def _complete(self, request: Request, api: Api, path: bytes) -> None:
        completion = parse_completion(b"".join(request.body), api)
        if not self._plane.synced:
            raise errors.not_synced()
        service, key = self._service(request.digest, completion.model)
        _check_context(completion, service)
        standing = self._standing(request, completion, service, key)
        self.chunked = self._parser.get_http_version() != "1.0"
        exchange = MovingExchange(
            self._plane, self, service, completion, path, request.headers, self._request_id, standing
        )
        self._exchange = exchange
        exchange.start()

    def _service(self, digest: bytes | None, model: str) -> tuple[Service, ApiKey]:
        """The service that answers, and what the client may do there. Raises ApiError if there is none for it."""
        offering = self._plane.fleet.offering(model)
        for service in offering:
            key = service.rights(digest, model)
            if key is not None:
                return service, key
        raise errors.wrong_key(digest is not None) if offering else errors.unknown_model(model)

    def _standing(self, request: Request, completion: Completion, service: Service, key: ApiKey) -> Standing:
        """Raises ApiError for a claim that the key does not allow, or a rate that is used up."""
        if completion.engine_priority < 0 and key.max_priority < Priority.HIGH:
            raise errors.invalid_request(
                f"priority must be 0 or more with this key, got {completion.engine_priority}.", param="priority"
            )
        within_s = _deadline_s(request.fields.get(DEADLINE_HEADER))
        tokens = self._plane.router.prompt_tokens(service.key, completion.shape)
        exceeded = self._plane.rates.take(service.key, key, tokens, self._plane.now())
        if exceeded is not None:
            if exceeded.of == "requests at once":
                raise errors.too_many_at_once(key.concurrent_requests or 0, exceeded.wait_s)
            raise errors.rate_exceeded(exceeded.of, exceeded.wait_s)
        explain = key.decisions and DECISION_HEADER in request.fields
        return Standing(key, min(completion.priority, key.max_priority), within_s, tokens, explain)

    def _models(self, request: Request) -> dict[str, object]:
        services = self._plane.fleet.services.values()
        mine = [service for service in services if service.rights(request.digest, service.table.served_name)]
        if services and not mine:
            raise errors.wrong_key(request.digest is not None)
        names: dict[str, Service] = {}
        for service in mine:
            if service.table.served_name != ANY_MODEL:
                names.setdefault(service.table.served_name, service)
        models = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "llmfleet",
                "max_model_len": service.table.context_length,
            }
            for name, service in sorted(names.items())
        ]
        return {"object": "list", "data": models}

    # Client, as the exchange sees it

    def send(self, data: bytes) -> None:
        """See Client."""
        if self._transport is not None:
            self._transport.write(data)

    def closing(self) -> bool:
        """See Client."""
        return not self._keep_alive or self._plane.draining

    def unsent_bytes(self) -> int:
        """See Client."""
        if self._transport is None:
            return 0
        in_kernel = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self._transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)

    def abort(self) -> None:
        """See Client."""
        if self._transport is not None:
            self._transport.abort()

    def answer_error(self, error: errors.ApiError) -> None:
        """See Client."""
        self._answer(error.status, [*_JSON, *error.headers], error.body())

    def answer_done(self, *, close: bool) -> None:
        """See Client."""
        self._exchange = None
        if not self._pending and self._request is None:
            self._let_go()
        transport = self._transport
        if transport is None:
            return
        if self._deaf and not self._pending:
            self._linger(transport)
            return
        if close or self.closing():
            transport.close()
            return
        self._ahead = 0
        if not transport.is_reading():
            transport.resume_reading()
        self._await_request()
        if self._pending:
            self._plane.loop.call_soon(self._next)

    def _let_go(self) -> None:
        """None of this connection's bodies is needed any more."""
        self._plane.bodies_bytes -= self._held_bytes
        self._held_bytes = 0

    def _linger(self, transport: asyncio.Transport) -> None:
        """Closes without losing the answer: closing while the client still sends would reset the connection, and
        the client might never read why."""
        if transport.can_write_eof():
            transport.write_eof()  # TLS knows no half-closed connections
        self._stop_timer()
        self._timer = self._plane.loop.call_later(_LINGER_S, self.abort)

    @property
    def busy(self) -> bool:
        """Whether a request is in progress."""
        return not self._idle()

    def drain(self) -> None:
        """Closes the connection as soon as no request is in progress."""
        if self._idle() and self._transport is not None:
            self._transport.close()

    def _answer_json(self, document: object) -> None:
        self._answer(200, _JSON, json.dumps(document, separators=(",", ":")).encode())

    def _answer(self, status: int, headers: Headers, body: bytes) -> None:
        head = response_head(status, headers, self._request_id, length=len(body), chunked=False, close=self.closing())
        self.send(head + body)
        self.answer_done(close=False)

    # The one timer, which is seldom set: it may fire too early, and is then set anew

    def wake_at(self, at_s: float) -> None:
        """See Client."""
        if self._timer is not None:
            if self._timer.when() <= at_s:
                return
            self._timer.cancel()
        self._timer = self._plane.loop.call_at(at_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        if self._transport is None:
            return
        idle_until_s = self._idle_since + self._plane.limits.client_idle_s
        if self._exchange is not None:
            self._exchange.wake()
        elif self._plane.now() < idle_until_s:
            self.wake_at(idle_until_s)
        else:
            self._transport.close()

    def _await_request(self) -> None:
        """Notes that the client's turn begins."""
        self._idle_since = self._plane.now()
        self.wake_at(self._idle_since + self._plane.limits.client_idle_s)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _digest(authorization: bytes | None) -> bytes | None:
    if authorization is None:
        return None
    scheme, _, key = authorization.partition(b" ")
    return key_digest(key.strip()) if scheme.lower() == b"bearer" else None


def _deadline_s(given: bytes | None) -> float:
    """Raises ApiError (400) for what is not a number of milliseconds."""
    if given is None:
        return math.inf
    if not given.isdigit() or not int(given[:_DEADLINE_DIGITS]) > 0 or len(given) > _DEADLINE_DIGITS:
        raise errors.invalid_request(
            f"{DEADLINE_HEADER.decode()} must be a whole number of milliseconds from 1 to {'9' * _DEADLINE_DIGITS}, "
            f"got {given[:40].decode(errors='replace')!r}.",
            param=DEADLINE_HEADER.decode(),
        )
    return int(given) * 1e-3


def _check_context(completion: Completion, service: Service) -> None:
    """Raises ApiError (400) if the prompt is longer than the model's context, whatever the tokenizer makes of it."""
    context = service.table.context_length
    # The implicit service does not know its models.
    if completion.least_prompt_tokens > context and service.table.served_name != ANY_MODEL:
        raise errors.context_exceeded(completion.api.prompt_field, completion.least_prompt_tokens, context)


def _no_such_route(method: bytes, path: bytes, allowed: list[bytes]) -> errors.ApiError:
    shown = path[:200].decode(errors="replace")
    if not allowed:
        paths = ", ".join(sorted(p.decode() for group in _PATHS.values() for p in group))
        return errors.invalid_request(f"There is no {shown!r} here; there is {paths}.", code="not_found", status=404)
    names = b", ".join(allowed)
    error = errors.invalid_request(
        f"{shown} accepts {names.decode()}, got {method.decode(errors='replace')}.",
        code="method_not_allowed",
        status=405,
    )
    error.headers = ((b"allow", names),)
    return error
