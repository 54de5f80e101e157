"""Looking at a stream of server-sent events without getting in its way.

Most reads end with an event's boundary and hold nothing but tokens: their events are counted and the bytes pass as
they are. Only a read that cuts an event, or that mentions usage, is taken apart. `"usage"` with its quotes cannot
occur inside a JSON string, where quotes are escaped, so the search is exact.

The Responses API names its events (`event: response.completed` before the data) and begins with some that come before
the engine has done anything; those do not count as the answer's beginning.

A part of an event is held back until its rest comes, so that a client never sees half an event: if the engine dies
then, the stream still ends with a well-formed one.
"""

from __future__ import annotations

import json
import re

from llmfleet.gateway.policy import Usage
from llmfleet.gateway.transport.limits import HOLD_BYTES

BOUNDARY = re.compile(rb"\r?\n\r?\n")
USAGE_KEY = b'"usage"'
_DECODER = json.JSONDecoder()
_NAMED = re.compile(rb"^event:", re.MULTILINE)
_BEFORE_PREFILL = re.compile(rb"^event: ?response\.(?:created|queued|in_progress)\r?$", re.MULTILINE)


class StreamTap:
    """Counts the events of one stream, keeps its usage, and removes a usage event that the client did not ask for."""

    __slots__ = ("_held", "_strip", "done", "events", "failed", "parted", "usage")

    def __init__(self, strip_usage: bool) -> None:
        self._strip = strip_usage
        self._held = b""
        self.events = 0
        """Events seen, the final `[DONE]` not counted."""
        self.usage: Usage | None = None
        """Usage that the engine has told."""
        self.done = False
        """Whether `[DONE]` has come."""
        self.failed: str | None = None
        """Why nothing more can be made of what the engine says; None: all is well."""
        self.parted = False
        """Whether it failed because the engine gave another answer than the one before it."""

    def feed(self, data: bytes) -> bytes:
        """Takes in what was read and gives what the client gets now, possibly nothing."""
        if not self._held and data.endswith(b"\n\n") and USAGE_KEY not in data and b"[DONE]" not in data:
            self.events += data.count(b"\n\n")
            return data
        return self._take_apart(self._held + data)

    def end(self) -> bytes:
        """What is left when the stream has ended properly: an engine need not end its last event."""
        rest, self._held = self._held, b""
        return rest

    def _take_apart(self, data: bytes) -> bytes:
        passed: list[bytes] = []
        start = 0
        for boundary in BOUNDARY.finditer(data):
            event = data[start : boundary.end()]
            start = boundary.end()
            if self._keep(event):
                passed.append(event)
        self._held = data[start:]
        if len(self._held) > HOLD_BYTES:
            passed.append(self._held)
            self._held = b""
        return b"".join(passed)

    def _keep(self, event: bytes) -> bool:
        # Behind the event's name, where it has one.
        payload = event[event.find(b"data:") + 5 :].strip()
        if payload == b"[DONE]":
            self.done = True
            return True
        self.events += 1
        if USAGE_KEY not in event:
            return True
        try:
            document = json.loads(payload)
        except ValueError:
            return True
        usage = read_usage(document)
        if usage is None:
            return True
        self.usage = usage
        if document.get("choices") or "response" in document:
            return True
        self.events -= 1
        return not self._strip


def says_nothing_yet(events: bytes) -> bool:
    """Whether these events, the first of a stream, all come before the engine's work."""
    return events.startswith(b"event:") and len(_NAMED.findall(events)) == len(_BEFORE_PREFILL.findall(events))


def read_usage(document: object) -> Usage | None:
    """The `usage` of an answer or of a stream's event, if it has one."""
    if not isinstance(document, dict):
        return None
    usage = document.get("usage")
    if usage is None and isinstance(response := document.get("response"), dict):
        usage = response.get("usage")
    return _usage_in(usage)


def _usage_in(usage: object) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens", 0))
    if type(prompt) is not int or type(completion) is not int:
        return None
    return Usage(prompt, completion)


def usage_of_answer(body: bytes) -> Usage | None:
    """The usage of an answer that was not streamed, found without parsing the answer."""
    start = body.rfind(USAGE_KEY)
    if start < 0:
        return None
    try:
        tail = body[start + len(USAGE_KEY) :].decode().lstrip(" \t\r\n:")
        return _usage_in(_DECODER.raw_decode(tail)[0])
    except ValueError:
        return None


def error_event(body: bytes) -> bytes:
    """An error as the last event of a stream."""
    return b"data: %b\n\n" % body
