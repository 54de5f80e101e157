"""Token ids of running requests, told to whoever holds their streams.

In flow the outputs of each scheduler step; out flow, per subscriber, batches of the new tokens of the requests that it
asked for. A stream whose engine dies resumes from what was told here. Who subscribes late is told from the first token.

A subscriber is woken when there is something for it, and takes all of it at once. One that reads slowly gets fewer and
larger batches, told that they lag; no token is left out. All of it is used under the monitor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llmfleet.api.migration_messages import MOST_REQUESTS, JournalEntry

MOST_TOLD_TOKENS = 65_536
"""In one event: half a MiB."""


@dataclass(eq=False)
class Subscriber:
    """One connection of an owner. `wake` is called, in any thread, when there is something to take."""

    wake: Callable[[], None]
    told: dict[str, int] = field(default_factory=dict)
    """By the name of the request: how many of its tokens are told or pending."""
    pending: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    """By the name: index of the first token that is not told yet, and tokens."""

    def take(self) -> dict[str, tuple[int, list[int]]]:
        """What is to be told now."""
        taken, self.pending = self.pending, {}
        return taken

    def put_back(self, taken: dict[str, tuple[int, list[int]]]) -> None:
        """It could not be told; what has come meanwhile follows it."""
        for name, (_, newer) in self.pending.items():
            index, older = taken.get(name, (0, []))
            taken[name] = (index, older + newer) if name in taken else self.pending[name]
        self.pending = taken


class Journal:
    """All subscriptions of one engine."""

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []

    @property
    def followed(self) -> bool:
        """Whether anybody listens: without, a step costs nothing."""
        return bool(self._subscribers)

    def subscribe(self, subscriber: Subscriber, names: Iterable[str]) -> None:
        """Tell the subscriber of these requests, whenever they begin."""
        for name in names:
            subscriber.told.setdefault(name, 0)
        if subscriber not in self._subscribers:
            self._subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Subscriber, names: Iterable[str] | None = None) -> None:
        """No more of these; None: of none at all."""
        for name in list(subscriber.told) if names is None else names:
            subscriber.told.pop(name, None)
            subscriber.pending.pop(name, None)
        if not subscriber.told and subscriber in self._subscribers:
            self._subscribers.remove(subscriber)

    def began(self, names: Iterable[str]) -> None:
        """A request begins. One of the same name before it is not meant any more: its tokens count from the first."""
        for subscriber in self._subscribers:
            for name in names:
                if name in subscriber.told:
                    subscriber.told[name] = 0
                    subscriber.pending.pop(name, None)

    def stepped(self, names: Iterable[str], tokens: Sequence[int]) -> None:
        """A request, by any of the names that its owner may know it by, has got new tokens. `tokens`: all of them."""
        for subscriber in self._subscribers:
            for name in names:
                told = subscriber.told.get(name)
                if told is None or len(tokens) <= told:
                    continue
                subscriber.pending.setdefault(name, (told, []))[1].extend(tokens[told:])
                subscriber.told[name] = len(tokens)
                subscriber.wake()


def batches(taken: dict[str, tuple[int, list[int]]]) -> Iterator[list[JournalEntry]]:
    """News, cut into events that no peer finds too large: the first tokens of all there is, then the next ones."""
    left = dict(taken)
    while left:
        entries: list[JournalEntry] = []
        room = MOST_TOLD_TOKENS
        for name, (index, ids) in list(left.items())[:MOST_REQUESTS]:
            told = ids[:room]
            entries.append(JournalEntry(request=name, index=index, ids=told))
            room -= len(told)
            del left[name]
            if len(told) < len(ids):
                left[name] = (index + len(told), ids[len(told) :])
            if not room:
                break
        yield entries
