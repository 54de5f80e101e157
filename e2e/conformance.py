"""The same requests to an engine directly and through the gateway, and what may differ between the answers.

    asks(seed, count) -> [Ask] -> Exchanged (status, content type, what was said) -> equal

What was said is an answer without ids and times. A stream's events are joined: how many tokens an event holds is the
engine's timing, what the tokens are is not. Sampling is greedy or seeded, so two answers of one engine to one request
are equal; bad requests are among them, because an engine's own refusals have to pass as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

_UNLIKE = frozenset(
    (
        *("id", "created", "created_at", "completed_at", "item_id", "response_id", "request_id"),
        # What the prefix cache held, which is more for the second of two requests.
        *("cached_tokens", "cache_write_tokens"),
        # Of a stream vLLM says it in the usage event, where one is asked for: the one that the gateway asks for goes no
        # further.
        "system_fingerprint",
    )
)
"""Fields that no two answers share."""
_DIGITS = 3
"""Decimals of a log probability that do not depend on what else was in the batch or in the prefix cache."""
_PROMPTS = (
    "one",
    "A longer prompt, with digits 0123456789.",
    "tab\tand newline\n",
    "äöü € 漢字 🙂",
    '"quoted" \\ {json}',
)


@dataclass(frozen=True)
class Ask:
    """One request."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Exchanged:
    """What came back, comparable."""

    status: int
    content_type: str
    said: Any


def asks(seed: int, count: int, model: str) -> list[Ask]:
    """`count` requests of every kind in turn; the same for the same seed."""
    drawn = random.Random(seed)
    kinds = (_chat, _completion, _response, _token_ids, _tokenization, _bad)
    made = (kinds[number % len(kinds)](drawn) for number in range(count))
    return [Ask(ask.path, {"model": model} | ask.body) for ask in made]


async def exchange(client: httpx.AsyncClient, ask: Ask) -> Exchanged:
    """Sends one request and reads the answer to its end."""
    answer = await client.post(ask.path, json=ask.body)
    content_type = answer.headers.get("content-type", "").partition(";")[0]
    if content_type == "text/event-stream":
        return Exchanged(answer.status_code, content_type, _joined(answer.text))
    return Exchanged(answer.status_code, content_type, _comparable(answer.json()))


def _sampling(drawn: random.Random) -> dict[str, Any]:
    how: dict[str, Any] = drawn.choice(
        (
            {"temperature": 0},
            {"temperature": 1.0, "seed": drawn.randrange(1000)},
            {"temperature": 0.8, "top_p": 0.9, "seed": 7, "frequency_penalty": 0.5},
        )
    )
    streamed = drawn.choice(({}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}))
    return how | streamed


def _chat(drawn: random.Random) -> Ask:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": drawn.choice(_PROMPTS)}]
    more: dict[str, Any] = drawn.choice(
        ({}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}, {"stop": ["e", "zz"]}, {"return_token_ids": True})
    )
    return Ask(
        "/v1/chat/completions", {"messages": messages, "max_tokens": drawn.randint(1, 24)} | _sampling(drawn) | more
    )


def _completion(drawn: random.Random) -> Ask:
    more: dict[str, Any] = drawn.choice(({}, {"logprobs": 2}, {"echo": True}, {"min_tokens": 4}, {"ignore_eos": True}))
    prompt = drawn.choice((drawn.choice(_PROMPTS), list(_PROMPTS[:2])))
    return Ask("/v1/completions", {"prompt": prompt, "max_tokens": drawn.randint(4, 24)} | _sampling(drawn) | more)


def _response(drawn: random.Random) -> Ask:
    text = drawn.choice(_PROMPTS)
    given = drawn.choice((text, [{"role": "user", "content": text}]))
    body = {"input": given, "max_output_tokens": drawn.randint(4, 24), "temperature": 0, "store": False}
    return Ask("/v1/responses", body | drawn.choice(({}, {"stream": True}, {"instructions": "Be brief."})))


def _token_ids(drawn: random.Random) -> Ask:
    prompt = [drawn.randint(4, 60) for _ in range(drawn.randint(1, 30))]
    return Ask("/v1/completions", {"prompt": prompt, "max_tokens": drawn.randint(4, 16)} | _sampling(drawn))


def _tokenization(drawn: random.Random) -> Ask:
    if drawn.random() < 0.5:
        return Ask("/detokenize", {"tokens": [drawn.randint(4, 60) for _ in range(8)]})
    return Ask("/tokenize", {"prompt": drawn.choice(_PROMPTS), "return_token_strs": True})


def _bad(drawn: random.Random) -> Ask:
    wrong: dict[str, Any] = drawn.choice(
        (
            {"temperature": -1},
            {"max_tokens": 10**9},
            {"messages": "none"},
            {"top_p": 7},
            {"n": 0},
            {"stream": True, "max_tokens": -3},
            {"logprobs": True, "top_logprobs": -5},
        )
    )
    return Ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]} | wrong)


def _comparable(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _comparable(value) for key, value in document.items() if key not in _UNLIKE}
    if isinstance(document, list):
        return [_comparable(item) for item in document]
    return round(document, _DIGITS) if isinstance(document, float) else document


def _joined(text: str) -> list[Any]:
    """Events with their deltas added up: consecutive ones of one choice and kind are one."""
    said = [(name, part) for name, event in _events(text) for part in _parts(event)]
    # Which choice has a token first is the engine's timing, too.
    said.sort(key=lambda one: _choice_of(one[1]) if not one[0] else 0)
    joined: list[Any] = []
    for one in said:
        if joined and _adds_to(joined[-1], one):
            joined[-1] = (one[0], _sum(joined[-1][1], one[1]))
        else:
            joined.append(one)
    return joined


def _events(text: str) -> Iterator[tuple[str, Any]]:
    for block in filter(None, text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        payload = fields["data"]
        yield fields.get("event", ""), payload if payload == "[DONE]" else _comparable(json.loads(payload))


def _parts(event: Any) -> list[Any]:
    """An event of several choices as one of each; without its number, which depends on how many tokens an event has."""
    if not isinstance(event, dict):
        return [event]
    event.pop("sequence_number", None)
    if len(event.get("choices") or ()) < 2:
        return [event]
    return [event | {"choices": [choice]} for choice in event["choices"]]


def _choice_of(event: Any) -> int:
    choices = event.get("choices") if isinstance(event, dict) else None
    # Usage and [DONE] come behind every choice.
    return choices[0]["index"] if choices else 1_000_000


def _adds_to(before: tuple[str, Any], now: tuple[str, Any]) -> bool:
    (name, said), (next_name, more) = before, now
    if name != next_name or not isinstance(said, dict) or not isinstance(more, dict):
        return False
    if name.endswith(".delta"):
        return True
    one, other = said.get("choices"), more.get("choices")
    return bool(one and other and one[0]["index"] == other[0]["index"])


_ADDED = frozenset(("content", "text", "delta", "reasoning", "reasoning_content", "arguments"))


def _sum(one: Any, other: Any) -> Any:
    """Texts and lists add up, objects field by field; of anything else the later counts, unless it is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _sum_of(key, one.get(key), other.get(key)) for key in {**one, **other}}
    return one if other is None else other


def _sum_of(key: str, one: Any, other: Any) -> Any:
    if key == "choices":
        return [_sum(one[0], other[0])]
    if isinstance(one, list) and isinstance(other, list):
        return one + other
    if key in _ADDED and isinstance(one, str) and isinstance(other, str):
        return one + other
    return _sum(one, other)


def difference(ask: Ask, direct: Exchanged, through: Exchanged) -> list[str]:
    """What is not the same, in words."""
    if direct == through:
        return []
    return [f"{ask.path} {json.dumps(ask.body)}\n  directly: {direct}\n  through:  {through}"]
