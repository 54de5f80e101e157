"""One client's stream out of several engines' answers.

    leg 1  a b c d|finish                         cut: the finish is kept back, and dropped
    leg 2          [a b c d e] f g h finish usage  what was told is taken out of the first events
    client a b c d          e  f g h finish usage  one id, one `created`, one role, one finish reason, one usage

A `SplicedTap` is a `StreamTap` that also records what it passes on (`moving.recorder`), so that the next leg can be cut
to what the client has not got. While nothing moves that is all it does. After a move every event gets the first
leg's id and time; where engines write them as vLLM does, that is one replacement per read.

From the moment at which a cut may come (`guard`), an event that says why the answer ends is kept back with all that
follows it: a cut looks like an answer that has reached its length.
"""

from __future__ import annotations

import json

from llmfleet.gateway.moving.recorder import Recorder, document_of, head_of
from llmfleet.gateway.moving.told import Document, RepeatError, Told, cut, finishes, without_end
from llmfleet.gateway.transport.limits import HOLD_BYTES
from llmfleet.gateway.transport.sse import BOUNDARY, USAGE_KEY, StreamTap

_ERROR = b'data: {"error"'


class SplicedTap(StreamTap):
    """A stream that may move. `failed` says why a leg brings no more of it."""

    __slots__ = ("_ended", "_guarded", "_identity", "_leg", "_recorder", "_rename", "_told")

    def __init__(self, strip_usage: bool) -> None:
        super().__init__(strip_usage)
        self._recorder = Recorder()
        self._told = Told()
        self._leg: Told | None = None
        """What the present leg has said, while it repeats what was told."""
        self._identity: Document | None = None
        """What every event of a later leg has to say for itself."""
        self._rename: tuple[bytes, bytes] | None = None
        """How this leg's events begin, and how the first one's did."""
        self._guarded = False
        self._ended: list[bytes] = []
        """Events kept back, from the one that finishes on."""

    def feed(self, data: bytes) -> bytes:
        """See StreamTap."""
        if not self._held:
            events = self._recorder.take(data)
            if events:
                self.events += events
                return data if self._rename is None else data.replace(*self._rename)
            if (
                self._leg is None
                and self._identity is None
                and not self._guarded
                and data.endswith(b"\n\n")
                and USAGE_KEY not in data
                and b"[DONE]" not in data
                and _ERROR not in data
            ):
                self.events += data.count(b"\n\n")
                self._recorder.keep(data, self._told)
                return data
        return self._take_apart(self._held + data)

    # Moving

    def told_logprobs(self) -> int:
        """Tokens whose log probabilities the client has."""
        self._recorder.settle(self._told)
        return self._told.logprobs()

    def guard(self) -> None:
        """The answer's end may be a cut from now on."""
        self._guarded = True

    def thaw(self) -> bytes:
        """It was no cut: what the client gets of what was kept back."""
        self._guarded = False
        ended, self._ended = self._ended, []
        return b"".join(map(self._one, ended))

    def next_leg(self, *, keep_texts: bool) -> bytes:
        """Another engine's answer follows, from its beginning. What the client gets of the cut one's last event.

        `keep_texts`: an engine holds no text back that the end of an answer would let out.
        """
        self._recorder.settle(self._told)
        self._recorder.forget_form()
        document = document_of(self._ended[0]) if self._ended else None
        rest = b""
        if (
            document is not None
            and without_end(document, keep_texts=keep_texts)
            and cut(document, self._told, self._leg or Told(self._told))
        ):
            rest = self._written(document)
        self._leg = Told()
        self._identity = self._told.identity
        self._rename = None
        self._guarded = self.done = False
        self._ended = []
        self._held = b""
        return rest

    # Event by event

    def _take_apart(self, data: bytes) -> bytes:
        passed: list[bytes] = []
        start = 0
        for boundary in BOUNDARY.finditer(data):
            if self.failed is not None:
                break
            passed.append(self._one(data[start : boundary.end()]))
            start = boundary.end()
        self._held = b"" if self.failed is not None else data[start:]
        if len(self._held) > HOLD_BYTES:
            self.failed = f"sent an event of more than {HOLD_BYTES} bytes"
        return b"".join(passed)

    def _one(self, event: bytes) -> bytes:
        """What the client gets of an event."""
        if self._ended:
            self._ended.append(event)
            return b""
        if self._identity is None and not self._guarded and not event.startswith(_ERROR):
            # The common case, and the end of every stream that has not moved: not parsed.
            keep = self._keep(event)
            self._recorder.keep(event, self._told)
            return event if keep else b""
        document = document_of(event)
        if self._guarded and document is not None and finishes(document):
            self._ended.append(event)
            return b""
        if document is not None and "error" in document and "choices" not in document:
            self.failed = f"reported an error: {json.dumps(document['error'])[:200]}"
            return b""
        keep = self._keep(event)
        if document is None:
            # [DONE], or a comment.
            return event
        if self._leg is not None:
            return self._repeated(document) if keep else b""
        self._recorder.keep(event, self._told)
        return self._renamed(event, document) if keep else b""

    def _repeated(self, document: Document) -> bytes:
        leg = self._leg
        assert leg is not None
        try:
            left = cut(document, self._told, leg)
        except RepeatError as error:
            self.failed = f"repeated another {error} than was told"
            self.parted = True
            return b""
        if leg.covers(self._told):
            self._leg = None
        if not left:
            self.events -= 1
            return b""
        return self._written(document)

    def _renamed(self, event: bytes, document: Document) -> bytes:
        if self._identity is None:
            return event
        if self._rename is None and (head := head_of(event)) and self._recorder.head is not None:
            self._rename = head, self._recorder.head
        if self._rename is not None and event.startswith(self._rename[0]):
            return event.replace(*self._rename)
        return self._written(document)

    def _written(self, document: Document) -> bytes:
        if self._identity is not None:
            document |= self._identity
        return b"data: %b\n\n" % json.dumps(document, separators=(",", ":")).encode()
