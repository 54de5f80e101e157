"""What the gateway reads of a request's body: model, stream, class, and how large it is.

The body goes to the engine as the client wrote it, with two exceptions.

The plan needs to know what requests use, and an engine tells the usage of a stream only when asked. Where the client
did not ask, `stream_options.include_usage` is added here, and `sse.StreamTap` takes the additional event out again.
(The Responses API always tells it.)

`kv_transfer_params` and `ec_transfer_params` tell an engine from whom to fetch caches, over which network. That is
between engines and their owner, so they end here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NamedTuple

from pydantic_core import from_json

from llmfleet.gateway.keys import Priority
from llmfleet.gateway.policy import RequestShape
from llmfleet.gateway.policy.prefix import BLOCK_CHARS, chain_of
from llmfleet.gateway.transport.errors import invalid_request, unknown_response

_ASK = b',"stream_options":{"include_usage":true}}'
_PRIORITIES = {"priority": Priority.HIGH, "flex": Priority.BATCH}
"""OpenAI's `service_tier`; `auto`, `default`, and whatever else an engine takes, are standard."""
_NOT_FROM_OUTSIDE = ("kv_transfer_params", "ec_transfer_params")
LONGEST_TOKEN_BYTES = 512
"""No token of any vocabulary is longer: the longest of those in use are runs of white space or rules of 128 bytes, and
few have pieces of more than 256."""


class Api(Enum):
    """What an engine can be asked for; the value is the path."""

    CHAT = b"/v1/chat/completions"
    COMPLETIONS = b"/v1/completions"
    RESPONSES = b"/v1/responses"
    EMBEDDINGS = b"/v1/embeddings"
    TOKENIZE = b"/tokenize"
    DETOKENIZE = b"/detokenize"

    @property
    def prompt_field(self) -> str:
        """Field of the body that holds the prompt."""
        return _PROMPT_FIELDS.get(self, "prompt")


APIS = {api.value: api for api in Api}
"""By path."""
_PROMPT_FIELDS = {Api.CHAT: "messages", Api.RESPONSES: "input", Api.EMBEDDINGS: "input", Api.DETOKENIZE: "tokens"}
_GENERATING = (Api.CHAT, Api.COMPLETIONS, Api.RESPONSES)
MOVING_APIS = (Api.CHAT, Api.COMPLETIONS)
"""Whose answers another engine can go on with, as `splice` understands them."""
_ON_CPU = (Api.TOKENIZE, Api.DETOKENIZE)


class Completion(NamedTuple):
    """A request for an engine's work."""

    api: Api
    model: str
    stream: bool
    shape: RequestShape
    body: bytes
    """What goes to the engine."""
    strip_usage: bool
    """Whether the usage event was asked for by the gateway alone."""
    priority: Priority
    """The class that the client asks for, by OpenAI's `service_tier`."""
    engine_priority: int
    """vLLM's own `priority`; those below 0 go before others in an engine's queue."""
    least_prompt_tokens: int
    """The longest prompt has at least so many tokens, whatever the tokenizer; 0 where the engine may shorten it."""


def holds_back(document: dict[str, Any]) -> bool:
    """Whether an engine keeps text back that the end of the answer would let out: it might begin a stop string, or
    belong to a tool call."""
    return any(document.get(name) for name in ("stop", "tools"))


def parse_completion(raw: bytes, api: Api = Api.CHAT) -> Completion:
    """Reads the body of a request.

    Raises ApiError (400, 404) naming the field. Everything that the engine checks itself is left to the engine.
    """
    document = _document(raw)
    model = document.get("model")
    if not isinstance(model, str) or not model:
        raise invalid_request(f"model must be the name of a model, got {_shown(model)}.", param="model")
    stream = document.get("stream")
    if stream not in (None, True, False):
        raise invalid_request(f"stream must be true or false, got {_shown(stream)}.", param="stream")
    if stream and api not in _GENERATING:
        raise invalid_request(f"stream must be false or left out: {api.value.decode()} has no stream.", param="stream")
    if api is Api.RESPONSES and (earlier := document.get("previous_response_id")) is not None:
        raise unknown_response(_shown(earlier))
    asks = stream and api is not Api.RESPONSES
    body, strip = _for_engine(raw, document, ask_for_usage=bool(asks))
    shape = _shape(document, api)
    before, tier = document.get("priority"), document.get("service_tier")
    return Completion(
        api,
        model,
        bool(stream),
        shape,
        body,
        strip,
        _PRIORITIES.get(tier, Priority.STANDARD) if isinstance(tier, str) else Priority.STANDARD,
        before if type(before) is int else 0,
        _least_prompt_tokens(document, api, shape),
    )


def _document(raw: bytes) -> dict[str, Any]:
    try:
        document = from_json(raw, cache_strings="keys")
    except ValueError:
        # It says less about what is wrong, and refuses lone surrogates and deep nesting, which engines may take.
        document = _slowly(raw)
    if not isinstance(document, dict):
        raise invalid_request(f"The body must be a JSON object, got {type(document).__name__}.", code="invalid_json")
    return document


def _slowly(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise invalid_request(f"The body is not valid JSON: {error}", code="invalid_json") from None


def _for_engine(raw: bytes, document: dict[str, Any], *, ask_for_usage: bool) -> tuple[bytes, bool]:
    """(the body that goes to the engine, whether it asks for a usage that the client did not ask for)."""
    internal = [field for field in _NOT_FROM_OUTSIDE if field in document]
    for field in internal:
        del document[field]
    options = document.get("stream_options") if ask_for_usage else None
    if options is not None and not isinstance(options, dict):
        raise invalid_request(f"stream_options must be an object, got {_shown(options)}.", param="stream_options")
    strip = ask_for_usage and not (options or {}).get("include_usage")
    if not internal and not strip:
        return raw, False
    if not internal and options is None:
        # The object holds at least `model`, so the comma is right; of equal keys JSON parsers take the last.
        return raw.rstrip()[:-1] + _ASK, True
    if strip:
        document["stream_options"] = (options or {}) | {"include_usage": True}
    return json.dumps(document, separators=(",", ":")).encode(), strip


def _shape(document: dict[str, Any], api: Api) -> RequestShape:
    if api in _ON_CPU:
        return RequestShape(prompt_bytes=0, counted=False)
    size, tokens = _SIZES[api](document)
    if api is Api.EMBEDDINGS:
        return RequestShape(prompt_bytes=size, prompt_tokens=tokens, max_output_tokens=1)
    bound = document.get("max_output_tokens" if api is Api.RESPONSES else "max_completion_tokens")
    if bound is None:
        bound = document.get("max_tokens")
    sequences = document.get("n")
    return RequestShape(
        prompt_bytes=size,
        prompt_tokens=tokens,
        chain=chain_of(list(_texts(document, api))) if size >= BLOCK_CHARS else (),
        max_output_tokens=bound if type(bound) is int and bound > 0 else None,
        sequences=sequences if type(sequences) is int and sequences > 0 else 1,
    )


def _least_prompt_tokens(document: dict[str, Any], api: Api, shape: RequestShape) -> int:
    if document.get("truncate_prompt_tokens") is not None or document.get("truncation") == "auto":
        return 0
    if api is Api.EMBEDDINGS:
        # Its tokenizer may drop any amount of white space.
        return 0
    prompts = document.get("prompt")
    if api is Api.COMPLETIONS and isinstance(prompts, list) and prompts and type(prompts[0]) is not int:
        return max(_least_tokens(*_prompt_size(prompt)) for prompt in prompts)
    return _least_tokens(shape.prompt_bytes, shape.prompt_tokens)


def _least_tokens(size: int, tokens: int | None) -> int:
    return tokens if tokens is not None else size // LONGEST_TOKEN_BYTES


def _chat_size(document: dict[str, Any]) -> tuple[int, int | None]:
    messages = document.get("messages")
    if not isinstance(messages, list):
        return 0, None
    return sum(_text_bytes(m.get("content")) for m in messages if isinstance(m, dict)), None


def _completion_size(document: dict[str, Any]) -> tuple[int, int | None]:
    return _prompt_size(document.get("prompt"))


def _response_size(document: dict[str, Any]) -> tuple[int, int | None]:
    size = _text_bytes(document.get("instructions"))
    given = document.get("input")
    if not isinstance(given, list):
        return size + _text_bytes(given), None
    for item in given:
        if isinstance(item, dict):
            # A message's content, what a tool has given, or what it was called with.
            size += sum(_text_bytes(item.get(field)) for field in ("content", "output", "arguments"))
    return size, None


def _embedding_size(document: dict[str, Any]) -> tuple[int, int | None]:
    return _chat_size(document) if "messages" in document else _prompt_size(document.get("input"))


_SIZES: dict[Api, Callable[[dict[str, Any]], tuple[int, int | None]]] = {
    Api.CHAT: _chat_size,
    Api.COMPLETIONS: _completion_size,
    Api.RESPONSES: _response_size,
    Api.EMBEDDINGS: _embedding_size,
}
"""(bytes of text, exact tokens where the prompt is token ids)"""


def _texts(document: dict[str, Any], api: Api) -> Iterator[str]:
    """The prompt's text from its beginning, in the order in which an engine reads it. Of several prompts the first."""
    if api is Api.COMPLETIONS:
        prompt = document.get("prompt")
        yield from _texts_of(prompt[0] if isinstance(prompt, list) and prompt else prompt)
        return
    if api is Api.RESPONSES:
        yield from _texts_of(document.get("instructions"))
    turns = document.get("input" if api is Api.RESPONSES else "messages")
    if not isinstance(turns, list):
        yield from _texts_of(turns)
        return
    for turn in turns:
        if isinstance(turn, dict):
            for field in ("content", "output", "arguments") if api is Api.RESPONSES else ("content",):
                yield from _texts_of(turn.get(field))


def _texts_of(content: object) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from (part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def _prompt_size(prompt: object) -> tuple[int, int | None]:
    """Of a text, token ids, or a list of either."""
    if not isinstance(prompt, list):
        return _text_bytes(prompt), None
    if prompt and all(type(token) is int for token in prompt):
        return 0, len(prompt)
    if prompt and all(isinstance(part, list) for part in prompt):
        return 0, sum(map(len, prompt))
    return sum(_text_bytes(part) for part in prompt), None


def _text_bytes(content: object) -> int:
    """Bytes of a string, or of the text parts of a list of content parts. Images and sound do not count as text."""
    if isinstance(content, str):
        return len(content) if content.isascii() else len(content.encode(errors="replace"))
    if isinstance(content, list):
        return sum(_text_bytes(part.get("text")) for part in content if isinstance(part, dict))
    return 0


def _shown(value: object) -> str:
    return json.dumps(value)[:100]
