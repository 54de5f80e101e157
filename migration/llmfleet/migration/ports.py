"""What the coordinator's course needs of engines and of the stream's owner, and the names by which they meet.

`control.connect` makes an `Engine` of an address; whoever holds the client's stream implements `Owner`, by carrying out
the effects of `stream.py`. Beside them how addresses are written, and the request id under which an owner submits the
original request to the destination: there the plug-in knows by it which reservation the request is for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from llmfleet.api.migration_messages import AnyAnswer, AnyAsk

_REQUEST_ID = re.compile(r"(?:^|[-_])llmfleet-([0-9a-f]{32})(?=$|[-_])")


def request_id(migration: str) -> str:
    """The `X-Request-Id` (for responses: the body's `request_id`) of the original request at the destination."""
    return f"llmfleet-{migration}"


def migration_of(request: str) -> str | None:
    """The migration that a request is parked for, by its id as the engine has it; None: it is an ordinary one.

    vLLM puts a word in front of the id it was given and may add a number and random letters.
    """
    found = _REQUEST_ID.search(request)
    return found[1] if found else None


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of `host:port`, an IPv6 address in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"address {address!r}; accepted is host:port, an IPv6 address in brackets")
    return host.removeprefix("[").removesuffix("]"), int(port)


class NoAnswerError(Exception):
    """An engine said nothing in time, or cannot be reached."""


class Engine(Protocol):
    """An engine as the coordinator sees it."""

    @property
    def name(self) -> str:
        """For people and for `Owner.park`."""
        ...

    async def ask(self, message: AnyAsk, deadline_s: float) -> AnyAnswer:
        """One question, said once. Raises NoAnswerError when no answer came within `deadline_s` from now."""
        ...


@dataclass(frozen=True)
class Delivered:
    """The answer so far, as the stream's owner knows it."""

    tokens: list[int]
    """From the first token on."""
    lagged: bool
    """The journal was behind what the client had seen: these tokens are fewer."""


class Owner(Protocol):
    """Whoever holds the client's stream. Each call is an event of `stream.py`; what it does there is its own business.

    None of them may take long but `park`, and none raises: an owner that cannot go on says so where it can refuse, and
    otherwise ends its client's stream.
    """

    async def begin(self) -> int | None:
        """Grants the next epoch; None: it refuses, since another migration runs or the stream has ended."""
        ...

    async def park(self, destination: str, migration: str) -> None:
        """Submits the original request to the engine of this name, under `request_id(migration)`.

        Returns when it is sent, without waiting for an answer: none comes before the engine begins.
        """
        ...

    async def freeze(self) -> bool:
        """The cut is about to be asked. False: this migration was given up meanwhile."""
        ...

    async def finished(self) -> None:
        """The request ended by itself at the source: the end of its stream is the answer's end."""
        ...

    async def stays(self) -> None:
        """The migration is over before the cut was asked."""
        ...

    async def source_lost(self) -> Delivered:
        """The source answers no more. The tokens to resume from."""
        ...

    async def resume(self) -> None:
        """Neither engine will go on by itself: open a leg anywhere, from the tokens delivered."""
        ...
