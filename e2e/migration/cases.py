"""Requests that between them use all that has to survive a migration.

Each case is the parameters of a request, for any endpoint that has them. What of an answer only an engine's state knows
(generator, penalties, grammar, text held back for a stop string) differs visibly when that state is lost: the tiny
model is chaotic, so one other token changes all that follow.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping
from typing import Any

from e2e.engine.tiny_model import MODEL_NAME
from e2e.migration.answer import Api
from e2e.migration.leg import Call

MAX_TOKENS = 160
_SEEDED = {"temperature": 1.0, "seed": 20261121}
_MULTIPLES = {"type": "array", "items": {"type": "integer", "multipleOf": 3}, "minItems": 60}
"""With `multipleOf`, which xgrammar does not know, so that llguidance is taken."""
_FREQUENT = list(range(64, 90))


def object_of(length: int) -> dict[str, Any]:
    """The schema of an object with a text of so many characters, or up to twice as many."""
    return {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": length, "maxLength": 2 * length},
            "size": {"type": "integer"},
        },
        "required": ["name", "size"],
        "additionalProperties": False,
    }


def characters_of_many_bytes(length: int) -> dict[str, Any]:
    """So many characters, most of which the engine makes of several tokens."""
    return {**_SEEDED, "structured_outputs": {"regex": f"[ä-ü€-₿😀-😏]{{{length}}}"}}


SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0},
    "seed": _SEEDED,
    "top-p, top-k": {**_SEEDED, "top_p": 0.9, "top_k": 20},
    "presence penalty": {"temperature": 0, "presence_penalty": 0.9},
    "frequency penalty": {"temperature": 0, "frequency_penalty": 0.7},
    "repetition penalty": {"temperature": 0, "repetition_penalty": 1.3},
    "all penalties, seed": {**_SEEDED, "presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
    "min tokens": {"temperature": 0, "min_tokens": 100, "stop_token_ids": _FREQUENT},
    "logit bias": {"temperature": 0, "logit_bias": {"40": 3.0, "41": 2.0}},
}
"""Parameters that every API for completions and chat has."""
GRAMMARS: Mapping[str, Mapping[str, Any]] = {
    "regular expression": {"temperature": 0, "structured_outputs": {"regex": "[a-f]{50}-[0-9]{50}-(yes|no)"}},
    "JSON schema": {**_SEEDED, "structured_outputs": {"json": object_of(100)}},
    "llguidance": {**_SEEDED, "structured_outputs": {"json": _MULTIPLES}},
    "characters of many bytes": characters_of_many_bytes(60),
}


def tools(length: int) -> dict[str, Any]:
    """One tool, which must be called with at least so many characters."""
    tool = {"type": "function", "function": {"name": "measure", "parameters": object_of(length)}}
    return {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "measure"}}}


TOOLS = tools(100)


def prompt_tokens(count: int, number: int = 0) -> list[int]:
    """A prompt of random bytes; each number is another one."""
    chosen = random.Random(number * 100_003 + count)
    return [chosen.randrange(256) for _ in range(count)]


def completion(parameters: Mapping[str, Any], prompt: list[int], *, streamed: bool = True) -> Call:
    return Call(Api.COMPLETIONS, _body({"prompt": prompt, "return_token_ids": True, **parameters}, streamed))


def chat(parameters: Mapping[str, Any], text: str, *, streamed: bool = True) -> Call:
    messages = [{"role": "user", "content": text}]
    return Call(Api.CHAT, _body({"messages": messages, "return_token_ids": True, **parameters}, streamed))


def response(parameters: Mapping[str, Any], text: str, *, streamed: bool = True) -> Call:
    body = {"model": MODEL_NAME, "input": text, "max_output_tokens": MAX_TOKENS, **parameters}
    return Call(Api.RESPONSES, {**body, "stream": streamed})


def apart(call: Call) -> Call:
    """The same request, but nothing of it is in a prefix cache: a prefill in other portions may round differently."""
    return Call(call.api, {**call.body, "cache_salt": secrets.token_hex(8)})


def _body(body: dict[str, Any], streamed: bool) -> dict[str, Any]:
    body = {"model": MODEL_NAME, "max_tokens": MAX_TOKENS, **body}
    if streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body
