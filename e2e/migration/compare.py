"""Whether a client got the same from a stream that moved as from one that did not.

In: two transcripts. Out: every difference, by field and place. Token ids where the API gives them, text in every case,
logprobs to the last bit, why it ended, the usage. That an engine's events are cut otherwise (two tokens in one delta,
as engines do under load) is no difference; neither is what an engine numbers at random, such as ids of tool calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from e2e.migration.owner import Transcript


@dataclass(frozen=True)
class Difference:
    """field: its path, `finish`, `usage`, `error` or `repeated`. place: index of the first character or entry."""

    field: str
    place: int | None
    expected: Any
    got: Any

    def __str__(self) -> str:
        where = "" if self.place is None else f" at {self.place}"
        return f"{self.field}{where}: expected {self.expected!r}, got {self.got!r}"


_SHOWN = 12
"""Characters or entries of a field that a difference shows."""


def differences(expected: Transcript, got: Transcript) -> list[Difference]:
    """What differs; an empty list is what migration promises."""
    return list(_differences(expected, got))


def _differences(expected: Transcript, got: Transcript) -> Iterator[Difference]:
    for mismatch in got.mismatches:
        yield Difference(f"repeated {mismatch.path}", mismatch.place, mismatch.delivered, mismatch.repeated)
    if expected.error != got.error:
        yield Difference("error", None, expected.error, got.error)
    fields, others = expected.answer.fields, got.answer.fields
    for path in sorted(fields.keys() | others.keys(), key=str):
        one, other = fields.get(path, ""), others.get(path, "")
        if one != other:
            place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            place = min(len(one), len(other)) if place is None else place
            window = slice(max(0, place - 2), place + _SHOWN)
            yield Difference(str(path), place, one[window], other[window])
    if expected.answer.finish != got.answer.finish:
        yield Difference("finish", None, expected.answer.finish, got.answer.finish)
    if expected.answer.usage != got.answer.usage:
        yield Difference("usage", None, expected.answer.usage, got.answer.usage)
