"""HTTP/1.1 heads and framing: what goes over the wire, and what does not get through.

Only end-to-end headers pass. Hop-by-hop headers (RFC 9110, 7.6.1) end here in both directions, as do the client's
credentials on the way in: an engine never sees a key. `accept-encoding` ends here too, because the gateway reads the
usage in the answer and does not want to decompress it. Headers by which an engine takes orders from its owner (its
request ids, vLLM's priority and data-parallel rank) and the gateway's own (`x-llmfleet-`) do not come from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

Headers = list[tuple[bytes, bytes]]
"""Lower-case names."""
Fields = Mapping[bytes, bytes]
"""Of headers with the same name the first."""

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_NOT_TO_ENGINE = _HOP_BY_HOP | {
    b"accept-encoding",
    b"api-key",
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"x-api-key",
    b"x-data-parallel-rank",
    b"x-request-id",
}
_OWNERS_PREFIXES = (b"x-llmfleet-", b"x-vllm-")
DECISION_HEADER = b"x-llmfleet-decision"
"""In a request, with any value: why it goes where it goes is wanted. In an answer: that."""
_NOT_TO_CLIENT = _HOP_BY_HOP | {b"content-length", b"server", b"set-cookie", b"x-request-id"}

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk of the chunked coding; `data` must not be empty, which would end the message."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _kept(headers: Headers, dropped: frozenset[bytes], prefixes: tuple[bytes, ...] = ()) -> list[bytes]:
    """Lines of the headers that pass: neither `dropped`, nor with one of the prefixes, nor named by Connection."""
    kept, connection = [], []
    for field in headers:
        name = field[0]
        if name in dropped:
            if name == b"connection":
                connection.append(field[1])
        elif not name.startswith(prefixes):
            kept.append(field)
    if connection and connection != [b"keep-alive"]:
        named = {token.strip().lower() for token in b",".join(connection).split(b",")}
        kept = [field for field in kept if field[0] not in named]
    return [b"%b: %b\r\n" % field for field in kept]


def request_head(
    method: bytes, path: bytes, headers: Headers, host: bytes, request_id: bytes, body_bytes: int
) -> bytes:
    """Head of a request to an engine, always with a Content-Length of its own."""
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\nx-request-id: %b\r\n" % (method, path, host, request_id)]
    lines += _kept(headers, _NOT_TO_ENGINE, _OWNERS_PREFIXES)
    lines.append(b"content-length: %d\r\n\r\n" % body_bytes)
    return b"".join(lines)


def response_head(
    status: int, headers: Headers, request_id: bytes, *, length: int | None, chunked: bool, close: bool
) -> bytes:
    """Head of an answer to a client. With neither `length` nor `chunked` the body ends with the connection."""
    lines = [b"HTTP/1.1 %d %b\r\nx-request-id: %b\r\n" % (status, _REASONS.get(status, b""), request_id)]
    lines += _kept(headers, _NOT_TO_CLIENT)
    if length is not None:
        lines.append(b"content-length: %d\r\n" % length)
    elif chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    lines.append(b"connection: close\r\n\r\n" if close else b"\r\n")
    return b"".join(lines)


def fields_of(headers: Headers) -> Fields:
    """Values by name."""
    return dict(reversed(headers))
