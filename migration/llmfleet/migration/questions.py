"""Asks an engine until it answers, or until it has been silent for too long.

In flow a question; out flows an answer or None. Every question of the protocol may be said twice, so that a lost
answer, a broken connection and an engine that is busy for a moment are all met by asking again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from llmfleet.api import Reason
from llmfleet.api.migration_messages import AnyAnswer, AnyAsk, Refused
from llmfleet.migration.ports import Engine, NoAnswerError

FIRST_PAUSE_S, MOST_PAUSE_S = 0.02, 0.5
"""Between a question that was not answered and its repetition."""
PASSING = frozenset({Reason.BUSY, Reason.FAILED})
"""Refusals that asking again may change."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds by the event loop's clock."""

    ask_s: float = 1.0
    """For one answer, before the question is repeated."""
    poll_s: float = 2.0
    """That an engine may keep a question until something has changed."""
    silence_s: float = 3.0
    """An engine that has answered nothing for so long is lost."""
    prepare_s: float = 5.0
    copy_s: float = 300.0
    park_s: float = 30.0
    """A destination that is busy takes long to parse and tokenize a long request."""
    freeze_s: float = 3.0
    """The client waits from here on."""
    hand_over_s: float = 5.0
    recover_s: float = 5.0
    release_s: float = 3.0


async def persistently(
    engine: Engine,
    question: Callable[[], AnyAsk],
    patience: Patience,
    *,
    poll: bool = False,
    final_if_busy: bool = False,
) -> AnyAnswer | None:
    """An answer to the question, made anew for each repetition; None after `silence_s` without one.

    `poll`: the engine keeps the question for up to `poll_s`. `final_if_busy`: that it is busy is an answer.
    """
    now_s = asyncio.get_running_loop().time
    one_s = patience.ask_s + (patience.poll_s if poll else 0.0)
    silent_since_s, pause_s = now_s(), FIRST_PAUSE_S
    last: AnyAnswer | None = None
    while True:
        try:
            answer = await engine.ask(question(), one_s)
        except NoAnswerError:
            last = None
        else:
            if final_if_busy or not isinstance(answer, Refused) or answer.reason not in PASSING:
                return answer
            last = answer
        if now_s() + pause_s >= silent_since_s + patience.silence_s:
            return last
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, MOST_PAUSE_S)
