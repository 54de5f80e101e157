"""Keeping what a stream tells its client, at next to no cost per token.

In flow the bytes that pass; out flows `Told`, once it is asked for. Consecutive events of a stream differ in nothing
but the text of one field:

    data: {"id":"c-1",...,"choices":[{"index":0,"delta":{"content":"  hello  "},"finish_reason":null}]}\n\n
    |------------------------ prefix ------------------------------| text |---------- suffix ----------|

Once a prefix and a suffix are learnt, a read that begins and ends with them is recorded by a slice and an append. The
text stays as it is inside the quotes, where JSON can be put together like strings. A read of several events has suffix
and prefix between their texts. Reads of any other form are kept as they are and parsed later, some at a time; the last
of them is the next form to learn. That it is exact rests on what JSON strings cannot hold: a raw line feed, and a
quote without a backslash.
"""

from __future__ import annotations

import json
import re

from llmfleet.gateway.moving.told import Document, Told, finishes

FIRST_READS, MORE_READS = 4, 16
"""Reads that are kept before the form is learnt: short streams never pay for it. Later, how many are parsed at once."""
KEPT_BYTES = 32 * 1024
"""Of reads that are not parsed yet."""
_BOUNDARY = re.compile(rb"\r?\n\r?\n")
_UNESCAPED_QUOTE = re.compile(rb'(?<!\\)(?:\\\\)*"')
_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*')
_FIELDS = (b'"content":"', b'"text":"', b'"arguments":"', b'"reasoning":"', b'"reasoning_content":"')
_HEAD = re.compile(rb'data: \{"id":"[^"\\]*","object":"[^"\\]*","created":\d+,')
_NEVER = b"\x00"


class Recorder:
    """One stream, over all its legs."""

    __slots__ = ("_between", "_kept", "_kept_bytes", "_prefix", "_reads", "_start", "_suffix", "_tail", "_text", "head")

    def __init__(self) -> None:
        self._kept: list[bytes] = []
        """In order: events as they passed, and texts of forms that are not spoken any more, as documents."""
        self._kept_bytes = 0
        self._reads = FIRST_READS
        self._text = bytearray()
        """Of the present form, after all that is in `_kept`."""
        self.forget_form()
        self.head: bytes | None = None
        """How the first leg's events begin, up to `created`, where they all begin alike."""

    def forget_form(self) -> None:
        """The next leg's events look otherwise."""
        self._prefix = self._suffix = self._between = _NEVER
        self._start = self._tail = 0

    def take(self, data: bytes) -> int:
        """Records a read of the learnt form. How many events it has; 0: it has another form and is not recorded."""
        if not (data.startswith(self._prefix) and data.endswith(self._suffix)):
            return 0
        text = data[self._start : -self._tail]
        events = 1
        if b"\n" in text:
            events += text.count(self._between)
            text = text.replace(self._between, b"")
            if b"\n" in text:
                return 0
        if b'"' in text and _UNESCAPED_QUOTE.search(text):
            return 0
        self._text += text
        return events

    def keep(self, events: bytes, told: Told) -> None:
        """Records whole events of any form. `told` gets what becomes too much to be kept unread."""
        self._end_form()
        self._kept.append(events)
        self._kept_bytes += len(events)
        if len(self._kept) >= self._reads or self._kept_bytes > KEPT_BYTES:
            self._reads = MORE_READS
            self.settle(told)
            self._learn(events)

    def settle(self, told: Told) -> None:
        """Everything that is recorded so far, to `told`."""
        self._end_form()
        for events in self._kept:
            for event in _BOUNDARY.split(events):
                document = document_of(event)
                if document is not None:
                    told.add(document)
        if self.head is None and self._kept and (found := _HEAD.match(self._kept[0])):
            self.head = found[0]
        self._kept.clear()
        self._kept_bytes = 0

    def _end_form(self) -> None:
        if self._text:
            self._kept.append(b"".join((self._prefix, self._text, self._suffix)))
            self._kept_bytes += len(self._kept[-1])
            self._text.clear()

    def _learn(self, events: bytes) -> None:
        """Takes the last event's form, if it is one text and nothing that is said once or in lists."""
        event = events[events.rfind(b"\n\n", 0, -2) + 2 :] if b"\n\n" in events[:-2] else events
        document = document_of(event)
        if document is None or not event.endswith(b"\n\n") or b"\r" in event or b"\n" in event[:-2]:
            return
        said = Told()
        said.add(document)
        if len(said.texts) != 1 or said.once or said.lists or finishes(document) or "usage" in document:
            return
        for field in _FIELDS:
            start = event.find(field) + len(field)
            if start < len(field):
                continue
            text = _STRING.match(event, start)
            end = text.end() if text else start
            again = document_of(event[:start] + b"?" + event[end:])
            probe = Told()
            if again is not None:
                probe.add(again)
            if list(probe.texts) == list(said.texts) and set(probe.texts.values()) == {"?"}:
                self._prefix, self._suffix = event[:start], event[end:]
                self._start, self._tail = len(self._prefix), len(self._suffix)
                self._between = self._suffix + self._prefix
                return


def document_of(event: bytes) -> Document | None:
    """The JSON document of an event; None: it has none."""
    start = event.find(b"data:")
    if start < 0:
        return None
    try:
        document = json.loads(event[start + 5 :])
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def head_of(event: bytes) -> bytes | None:
    """How an event begins up to `created`, in the form that vLLM writes; None: it has another."""
    found = _HEAD.match(event)
    return found[0] if found else None
