"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`.

Every message says what was given and what would be accepted.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def body(self) -> bytes:
        """The JSON document."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, separators=(",", ":")).encode()


def invalid_request(
    message: str, *, param: str | None = None, code: str = "invalid_request", status: int = 400
) -> ApiError:
    """The client's mistake."""
    return ApiError(status, message, "invalid_request_error", code, param)


def wrong_key(presented: bool) -> ApiError:
    """No key, or one that opens nothing here."""
    what = "The API key is not valid for this model" if presented else "No API key was given"
    return ApiError(
        401,
        f"{what}. Send a key of the service as 'Authorization: Bearer <key>'.",
        "invalid_request_error",
        "invalid_api_key",
        headers=((b"www-authenticate", b"Bearer"),),
    )


def unknown_model(model: str) -> ApiError:
    """No service has this served name."""
    return ApiError(
        404,
        f"The model {model[:200]!r} does not exist. GET /v1/models lists the models that your key may use.",
        "invalid_request_error",
        "model_not_found",
        "model",
    )


def unknown_response(shown: str) -> ApiError:
    """A conversation was to go on that no engine remembers."""
    return ApiError(
        404,
        f"There is no response {shown}: responses are not stored here. Leave out previous_response_id and send the "
        f"conversation so far in 'input'.",
        "invalid_request_error",
        "previous_response_not_found",
        "previous_response_id",
    )


def context_exceeded(param: str, least_tokens: int, context_tokens: int) -> ApiError:
    """The prompt cannot fit, however it is tokenized."""
    return invalid_request(
        f"{param} has at least {least_tokens} tokens; the model's context is {context_tokens} tokens.",
        param=param,
        code="context_length_exceeded",
    )


def too_large(limit_bytes: int) -> ApiError:
    """The body exceeds the limit."""
    return invalid_request(
        f"The request body is larger than the {limit_bytes} bytes that this gateway accepts.",
        code="request_too_large",
        status=413,
    )


def no_engine(service: str, waited_s: float, retry_after_s: int) -> ApiError:
    """The request waited as long as it may."""
    return ApiError(
        503,
        f"No engine of service {service} became available within {waited_s:.0f} s. Try again later.",
        "server_error",
        "no_engine_available",
        headers=((b"retry-after", b"%d" % retry_after_s),),
    )


def queue_full(service: str, length: int, retry_after_s: int) -> ApiError:
    """Too many requests wait already."""
    return ApiError(
        429,
        f"{length} requests already wait for an engine of service {service}. Try again later.",
        "server_error",
        "queue_full",
        headers=((b"retry-after", b"%d" % retry_after_s),),
    )


def too_late(service: str, wait_s: float, left_s: float) -> ApiError:
    """The request would wait beyond its deadline."""
    return _overloaded(
        f"Service {service} would begin with this request in about {wait_s:.1f} s, and its deadline is in "
        f"{max(0.0, left_s):.1f} s. Try again later, or allow more time.",
        "deadline_unreachable",
        wait_s - left_s,
    )


def deadline_passed(service: str, waited_s: float) -> ApiError:
    """The request has waited until its deadline."""
    return _overloaded(
        f"Service {service} had no place for this request in the {waited_s:.1f} s of its deadline. Try again later.",
        "deadline_passed",
        waited_s,
    )


def rate_exceeded(of: str, wait_s: float) -> ApiError:
    """The key has asked for more than it may."""
    message = f"The rate of {of} that this key may use is used up. Try again in {wait_s:.1f} s."
    return _overloaded(message, "rate_limit_exceeded", wait_s)


def too_many_at_once(most: int, retry_s: float) -> ApiError:
    """The key has as many requests at once as it may."""
    message = f"This key may have {most} requests at once, and has them. Try again when one of them has ended."
    return _overloaded(message, "concurrency_exceeded", retry_s)


def _overloaded(message: str, code: str, retry_s: float) -> ApiError:
    retry_after = ((b"retry-after", b"%d" % max(1, math.ceil(retry_s))),)
    return ApiError(429, message, "rate_limit_error", code, headers=retry_after)


def shutting_down() -> ApiError:
    """This gateway is about to end."""
    return ApiError(
        503,
        "This gateway is shutting down. Try again.",
        "server_error",
        "shutting_down",
        headers=((b"retry-after", b"1"),),
    )


def engine_failed(reason: str) -> ApiError:
    """The engines that were tried failed before their first token."""
    return ApiError(502, f"The engines that were tried failed; the last one {reason}.", "server_error", "engine_failed")


def engine_timeout(reason: str) -> ApiError:
    """An engine took the request and stayed silent."""
    return ApiError(504, f"The engine {reason}.", "server_error", "engine_timeout")


def engine_lost(reason: str) -> ApiError:
    """An engine died in the middle of an answer; goes to the client as the stream's last event."""
    return ApiError(502, f"The answer is incomplete: the engine {reason}.", "server_error", "engine_lost")


def too_much_at_once(limit: int) -> ApiError:
    """More bodies of requests than this gateway keeps."""
    return ApiError(
        503,
        f"This gateway has {limit} bytes of requests already and takes no more. Try again later.",
        "server_error",
        "too_much_at_once",
        headers=((b"retry-after", b"1"),),
    )


def too_many_connections(limit: int) -> ApiError:
    """One connection more than this gateway bears."""
    return ApiError(
        503,
        f"This gateway has {limit} connections already and takes no more. Try again later.",
        "server_error",
        "too_many_connections",
        headers=((b"retry-after", b"1"),),
    )


def not_synced() -> ApiError:
    """This gateway has just started and does not know the fleet yet."""
    return ApiError(
        503,
        "This gateway has not read its routing tables yet. Try again.",
        "server_error",
        "not_ready",
        headers=((b"retry-after", b"1"),),
    )
