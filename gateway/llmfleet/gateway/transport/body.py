"""What the gateway reads of a request's body: model, stream, and how large it is.

The body goes to the engine as the client wrote it, with one exception. The plan needs to know what requests use, and
an engine tells the usage of a stream only when asked. Where the client did not ask, `stream_options.include_usage`
is added here, and `sse.StreamTap` takes the additional event out again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llmfleet.gateway.policy import RequestShape
from llmfleet.gateway.transport.errors import invalid_request

_ASK = b',"stream_options":{"include_usage":true}}'


@dataclass(frozen=True, slots=True)
class Completion:
    """A request for a completion."""

    model: str
    stream: bool
    shape: RequestShape
    body: bytes
    """What goes to the engine."""
    strip_usage: bool
    """Whether the usage event was asked for by the gateway alone."""


def parse_completion(raw: bytes) -> Completion:
    """Reads a body of /v1/chat/completions or /v1/completions.

    Raises ApiError (400) naming the field. Everything that the engine checks itself is left to the engine.
    """
    try:
        document = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise invalid_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise invalid_request(f"The body must be a JSON object, got {type(document).__name__}.", code="invalid_json")
    model = document.get("model")
    if not isinstance(model, str) or not model:
        raise invalid_request(f"model must be the name of a model, got {_shown(model)}.", param="model")
    stream = document.get("stream")
    if stream not in (None, True, False):
        raise invalid_request(f"stream must be true or false, got {_shown(stream)}.", param="stream")
    body, strip = _ask_for_usage(raw, document) if stream else (raw, False)
    return Completion(model, bool(stream), _shape(document), body, strip)


def _ask_for_usage(raw: bytes, document: dict[str, Any]) -> tuple[bytes, bool]:
    options = document.get("stream_options")
    if options is None:
        # The object holds at least `model`, so the comma is right; of equal keys JSON parsers take the last.
        return raw.rstrip()[:-1] + _ASK, True
    if not isinstance(options, dict):
        raise invalid_request(f"stream_options must be an object, got {_shown(options)}.", param="stream_options")
    if options.get("include_usage"):
        return raw, False
    document["stream_options"] = options | {"include_usage": True}
    return json.dumps(document, separators=(",", ":")).encode(), True


def _shape(document: dict[str, Any]) -> RequestShape:
    bound = document.get("max_completion_tokens")
    if bound is None:
        bound = document.get("max_tokens")
    sequences = document.get("n")
    size, tokens = _prompt_size(document)
    return RequestShape(
        prompt_bytes=size,
        prompt_tokens=tokens,
        max_output_tokens=bound if type(bound) is int and bound > 0 else None,
        sequences=sequences if type(sequences) is int and sequences > 0 else 1,
    )


def _prompt_size(document: dict[str, Any]) -> tuple[int, int | None]:
    """(bytes of text, exact tokens where the prompt is token ids)."""
    prompt = document.get("prompt")
    if isinstance(prompt, list):
        if prompt and all(type(token) is int for token in prompt):
            return 0, len(prompt)
        return sum(_text_bytes(part) for part in prompt), None
    messages = document.get("messages")
    if not isinstance(messages, list):
        return _text_bytes(prompt), None
    return sum(_text_bytes(m.get("content")) for m in messages if isinstance(m, dict)), None


def _text_bytes(content: object) -> int:
    """Bytes of a string, or of the text parts of a list of content parts. Images and sound do not count as text."""
    if isinstance(content, str):
        return len(content) if content.isascii() else len(content.encode(errors="replace"))
    if isinstance(content, list):
        return sum(_text_bytes(part.get("text")) for part in content if isinstance(part, dict))
    return 0


def _shown(value: object) -> str:
    return json.dumps(value)[:100]
