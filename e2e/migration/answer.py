"""What an answer says, whichever of OpenAI's three APIs it comes from, streamed or whole.

In: the JSON documents of a response. Out: an `Answer`, which is a set of fields that only grow: texts by characters
(content, reasoning, each tool call's arguments) and lists by entries (token ids, logprobs). Streamed or not, the same
generation has the same fields, so answers can be compared with each other.

A leg of a migrated stream begins by repeating what was delivered. `Answer.take` is the splice: of every field it takes
what is beyond its own length, and nothing is tokenized or counted in tokens for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

FieldPath = tuple[str | int, ...]
"""Where in an answer, the number of the choice or of the output item first: `(0, "text")`, `(0, "tool", 1, "name")`."""
Document = Mapping[str, Any]

_LOGPROBS = "logprobs"
_NOT_OF_THE_ANSWER = ("prompt_tokens_details", "cached_tokens", "cache_write_tokens", "cached_tokens_per_turn")
"""Parts of the usage that tell how the engine's prefix cache was, not what was answered."""


class Api(StrEnum):
    """An endpoint of the engine."""

    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"
    RESPONSES = "/v1/responses"


@dataclass
class Growth:
    """What one document adds to an answer. finish: per choice, why it ended. over: nothing follows."""

    fields: dict[FieldPath, str | list[Any]] = field(default_factory=dict)
    finish: dict[int, tuple[str | None, ...]] = field(default_factory=dict)
    usage: Any = None
    over: bool = False
    error: str | None = None

    def put(self, path: FieldPath, value: Any) -> None:
        """Add a text or a list, unless it is empty."""
        if value:
            self.fields[path] = value

    def parted(self) -> tuple[Growth, Growth]:
        """The lists, and all the rest."""
        lists = {path: value for path, value in self.fields.items() if isinstance(value, list)}
        texts = {path: value for path, value in self.fields.items() if isinstance(value, str)}
        return Growth(dict(lists)), Growth(dict(texts), self.finish, self.usage, self.over)


@dataclass(frozen=True)
class Mismatch:
    """A leg repeated something else than what was delivered: field, place in it, what was delivered and what came."""

    path: FieldPath
    place: int
    delivered: Any
    repeated: Any


@dataclass
class Answer:
    """All that was said so far."""

    fields: dict[FieldPath, str | list[Any]] = field(default_factory=dict)
    finish: dict[int, tuple[str | None, ...]] = field(default_factory=dict)
    usage: Any = None

    def add(self, growth: Growth) -> None:
        """What the same engine says next."""
        for path, piece in growth.fields.items():
            self.fields[path] = _joined(self.fields.get(path), piece)
        self.finish |= growth.finish
        self.usage = growth.usage if growth.usage is not None else self.usage

    def beyond(self, delivered: Answer) -> int:
        """By how many characters and entries this one is ahead, over all fields."""
        return sum(max(0, len(value) - len(delivered.fields.get(path, ()))) for path, value in self.fields.items())

    def take(self, leg: Answer) -> Growth:
        """Take from a leg's answer what is beyond this one, and return it."""
        growth = Growth()
        for path, value in leg.fields.items():
            growth.put(path, value[len(self.fields.get(path, ())) :])
        self.add(growth)
        return growth

    def mismatches(self, leg: Answer) -> Iterator[Mismatch]:
        """Where a leg's answer is not the same as this one, as far as both go.

        Logprobs count by number only: after a crash nobody has those of the tokens that a leg repeats.
        """
        for path, value in leg.fields.items():
            mine = self.fields.get(path)
            if mine is None or _LOGPROBS in path:
                continue
            both = min(len(mine), len(value))
            if mine[:both] != value[:both]:
                place = next(i for i in range(both) if mine[i] != value[i])
                window = slice(place, min(both, place + 8))
                yield Mismatch(path, place, mine[window], value[window])

    def tokens(self, choice: int = 0) -> list[int]:
        """The ids that `return_token_ids` brought."""
        ids = self.fields.get((choice, "token_ids"), [])
        assert isinstance(ids, list)
        return ids


def read_event(api: Api, document: Document) -> Growth:
    """One event of a streamed response."""
    if "error" in document or document.get("type") in ("error", "response.failed"):
        return Growth(error=str(document.get("error", document)), over=True)
    if api is Api.RESPONSES:
        return _response_event(document)
    growth = Growth(usage=_usage(document.get("usage")) if not document["choices"] else None)
    for choice in document["choices"]:
        _choice(growth, api, choice, choice.get("delta", {}))
    return growth


def read_whole(api: Api, document: Document) -> Growth:
    """The body of a response that is not streamed."""
    if "error" in document:
        return Growth(error=str(document["error"]), over=True)
    growth = Growth(usage=_usage(document["usage"]), over=True)
    if api is Api.RESPONSES:
        for number, item in enumerate(document["output"]):
            _output_item(growth, number, item)
        growth.finish[0] = (document["status"], (document.get("incomplete_details") or {}).get("reason"))
    else:
        for choice in document["choices"]:
            _choice(growth, api, choice, choice.get("message", {}))
    return growth


def _choice(growth: Growth, api: Api, choice: Document, message: Document) -> None:
    number = choice["index"]
    growth.put((number, "text"), choice.get("text") if api is Api.COMPLETIONS else message.get("content"))
    growth.put((number, "reasoning"), message.get("reasoning"))
    growth.put((number, "token_ids"), choice.get("token_ids"))
    for place, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", {})
        for part in ("name", "arguments"):
            growth.put((number, "tool", call.get("index", place), part), function.get(part))
    for name, entries in (choice.get("logprobs") or {}).items():
        growth.put((number, _LOGPROBS, name), entries)
    if choice.get("finish_reason") is not None:
        stop = choice.get("stop_reason")
        growth.finish[number] = (choice["finish_reason"], None if stop is None else str(stop))


_DELTAS = {
    "response.output_text.delta": "text",
    "response.reasoning_text.delta": "reasoning",
    "response.function_call_arguments.delta": "arguments",
}


def _response_event(event: Document) -> Growth:
    kind = event["type"]
    growth = Growth()
    if kind in _DELTAS:
        place = (event["output_index"], _DELTAS[kind], event.get("content_index", 0))
        growth.put(place, event["delta"])
        growth.put((*place, _LOGPROBS), event.get("logprobs"))
    elif kind in ("response.completed", "response.incomplete"):
        whole = read_whole(Api.RESPONSES, event["response"])
        growth.finish, growth.usage, growth.over = whole.finish, whole.usage, True
    return growth


def _output_item(growth: Growth, number: int, item: Document) -> None:
    match item["type"]:
        case "message" | "reasoning":
            kind = "text" if item["type"] == "message" else "reasoning"
            for place, part in enumerate(item.get("content") or ()):
                growth.put((number, kind, place), part.get("text"))
                growth.put((number, kind, place, _LOGPROBS), part.get("logprobs"))
        case "function_call":
            growth.put((number, "arguments", 0), item.get("arguments"))


def _usage(usage: Any) -> Any:
    if isinstance(usage, dict):
        return {key: _usage(value) for key, value in usage.items() if key not in _NOT_OF_THE_ANSWER}
    return usage


def _joined(before: str | list[Any] | None, piece: str | list[Any]) -> str | list[Any]:
    if isinstance(piece, str):
        assert before is None or isinstance(before, str)
        return (before or "") + piece
    assert before is None or isinstance(before, list)
    joined = [] if before is None else before
    joined += piece
    return joined
