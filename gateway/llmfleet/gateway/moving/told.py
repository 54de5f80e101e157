"""What a client has been told by a stream, and what of the next engine's answer it has not.

A leg of a stream (RFC 2) begins by repeating the answer from its first token. In flow the JSON documents of its events;
out flow those parts that are beyond what was told: texts by characters, lists (logprobs, token ids) by entries, and
what is said once (role, names and ids of tool calls, the finish reason) not again. Nothing is tokenized for it, and
nothing has to be known of how the engine cut its tokens into events.

A leg that repeats another text than what was told is no continuation of it: `RepeatError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Document = dict[str, Any]
Path = tuple[str | int, ...]
"""Where in an answer, the number of the choice first: `(0, "content")`, `(0, "tool", 1, "arguments")`."""

_ONCE = frozenset(("role", "id", "type", "name", "finish_reason", "stop_reason"))
"""What is whole wherever it stands. An engine numbers tool calls at random, so that another leg has other ids."""
_IDENTITY = ("id", "created")
_LISTS = ("token_ids", "prompt_token_ids")


class RepeatError(Exception):
    """A leg repeats something else than what was told."""


class Told:
    """How much of each field has been told."""

    __slots__ = ("identity", "lists", "once", "texts")

    def __init__(self, like: Told | None = None) -> None:
        """Nothing; or as much as another one."""
        self.texts: dict[Path, str] = dict(like.texts) if like else {}
        self.lists: dict[Path, int] = dict(like.lists) if like else {}
        """Entries."""
        self.once: set[Path] = set(like.once) if like else set()
        self.identity: Document = {}
        """What the first event said for itself: all that follow have the same."""

    def add(self, document: Document) -> None:
        """An event was told as it is."""
        if not self.identity:
            self.identity = {name: document[name] for name in _IDENTITY if name in document}
        for path, holder, name in _parts(document):
            value = holder[name]
            if name in _ONCE:
                self.once.add(path)
            elif isinstance(value, str):
                self.texts[path] = self.texts.get(path, "") + value
            else:
                self.lists[path] = self.lists.get(path, 0) + len(value)

    def logprobs(self) -> int:
        """Tokens whose log probabilities were told."""
        return max((entries for path, entries in self.lists.items() if "logprobs" in path), default=0)

    def covers(self, other: Told) -> bool:
        """Whether it is as far as the other one in every field."""
        return (
            other.once <= self.once
            and all(len(self.texts.get(path, "")) >= len(text) for path, text in other.texts.items())
            and all(self.lists.get(path, 0) >= entries for path, entries in other.lists.items())
        )


def cut(document: Document, told: Told, leg: Told) -> bool:
    """Takes out of a leg's event what was told, and adds the event to both. Whether anything is left to tell.

    `leg`: what this leg has said so far. Raises RepeatError.
    """
    left = not document.get("choices")
    for path, holder, name in list(_parts(document)):
        value = holder[name]
        if name in _ONCE:
            leg.once.add(path)
            if path in told.once:
                if name.endswith("_reason"):
                    holder[name] = None
                else:
                    del holder[name]
            else:
                told.once.add(path)
                left = True
        elif isinstance(value, str):
            before, known = leg.texts.get(path, ""), told.texts.get(path, "")
            repeated = max(0, min(len(known) - len(before), len(value)))
            if known[len(before) : len(before) + repeated] != value[:repeated]:
                raise RepeatError("/".join(map(str, path)))
            leg.texts[path] = before + value
            told.texts[path] = known + value[repeated:]
            holder[name] = value[repeated:]
            left |= repeated < len(value)
        else:
            said, entries = leg.lists.get(path, 0), told.lists.get(path, 0)
            repeated = max(0, min(entries - said, len(value)))
            leg.lists[path] = said + len(value)
            told.lists[path] = entries + len(value) - repeated
            holder[name] = value[repeated:]
            left |= repeated < len(value)
    return left


def without_end(document: Document, *, keep_texts: bool) -> bool:
    """Makes of an answer's last event one in its middle. Whether it says anything then.

    An engine that was cut ends its answer as if it had reached its length, and then lets out what it had held back,
    lest it began a stop string or belonged to a tool call: `keep_texts` False takes that out.
    """
    left = False
    for _, holder, name in list(_parts(document)):
        if name.endswith("_reason"):
            holder[name] = None
        elif name not in _ONCE and isinstance(holder[name], str) and not keep_texts:
            holder[name] = ""
        else:
            left = True
    return left


def finishes(document: Document) -> bool:
    """Whether the event says why a choice ends."""
    choices = document.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") is not None for choice in choices
    )


def _parts(document: Document) -> Iterator[tuple[Path, Document, str]]:
    """Every field that says something: where it is in the answer, and where in the document."""
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        number = choice.get("index", 0)
        yield from _named((number,), choice, ("text", "finish_reason", "stop_reason", *_LISTS))
        delta, logprobs = choice.get("delta"), choice.get("logprobs")
        if isinstance(delta, dict):
            yield from _named((number,), delta, delta)
            calls = delta.get("tool_calls")
            for call in calls if isinstance(calls, list) else ():
                yield from _call(number, call)
        if isinstance(logprobs, dict):
            yield from _named((number, "logprobs"), logprobs, logprobs)


def _call(number: int, call: Any) -> Iterator[tuple[Path, Document, str]]:
    if not isinstance(call, dict):
        return
    path = (number, "tool", call.get("index", 0))
    yield from _named(path, call, ("id", "type"))
    function = call.get("function")
    if isinstance(function, dict):
        yield from _named(path, function, ("name", "arguments"))


def _named(path: Path, holder: Document, names: Any) -> Iterator[tuple[Path, Document, str]]:
    for name in list(names):
        value = holder.get(name)
        if name != "tool_calls" and value and isinstance(value, str | list):
            yield (*path, name), holder, name
