"""How many blocks a source copies in which scheduler steps, so that those who stay notice little of it.

In flow how long each step took, whether it computed anything and how many blocks were copied in it; out flows the
number for the next one. A step with copying is followed by steps without, a *pause*, and both kinds are compared:

    blocks    grow while a step with copying takes only so much longer than one without, and are halved beyond
    pause     as long as it takes for the average to be a few percent

One step of a pause is taken at once, the rest may be owed, up to `MOST_OWED_STEPS`: a short copy is over within a few
steps and its pauses come after it, or the answer would end before its copy; a long one owes what it may and then keeps
every pause.

Few larger copies instead of many small ones, because a copy costs something whatever its size: threads wake up on both
sides, a frame is sent and acknowledged. Medians, because a step with somebody's long prompt takes ten times as long as
the others and says nothing about copying; compared anew in every round, because what a step takes by itself changes
with the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median

MOST_SLOWDOWN = 0.03
"""Share by which steps may take longer on average."""
MOST_HICCUP = 0.25
"""Share by which one step with copying may."""
FIRST_BLOCKS = 4
MOST_BLOCKS = 4096
MOST_PAUSE_STEPS = 7
MOST_OWED_STEPS = 2 * MOST_PAUSE_STEPS
ROUND_COPIES = 4
"""Steps with copying between two decisions."""
QUIET_STEPS = 7
"""Steps without copying that are remembered."""


@dataclass(frozen=True)
class Governor:
    """What has been seen of an engine's steps."""

    allowed_blocks: int = FIRST_BLOCKS
    """Per step with copying."""
    pause_steps: int = 1
    """Steps without copying that each one with is worth."""
    owed_steps: int = 0
    """Of such pauses, what has not been taken yet; steps that compute nothing count."""
    paused: bool = True
    """Whether the last step copied nothing."""
    quiet_s: tuple[float, ...] = ()
    """Durations of the last steps without copying."""
    copying_s: tuple[float, ...] = ()
    """Durations of this round's steps with copying."""
    copied_blocks: int = 0
    """In this round's steps with copying."""

    @property
    def blocks(self) -> int:
        """That the next step may copy: 0 in a pause, else at least 1, so that a copy never stands still."""
        return self.allowed_blocks if self.paused and self.owed_steps <= MOST_OWED_STEPS else 0


def governor_step(governor: Governor, step_s: float, *, busy: bool, copied_blocks: int) -> Governor:
    """After a step that took `step_s`. `busy`: it computed tokens; if not, its duration says nothing."""
    governor = _owing(governor, copied=copied_blocks > 0)
    if not busy:
        return governor
    if copied_blocks == 0:
        return replace(governor, quiet_s=(*governor.quiet_s, step_s)[-QUIET_STEPS:])
    governor = replace(
        governor,
        copying_s=(*governor.copying_s, step_s),
        copied_blocks=governor.copied_blocks + copied_blocks,
    )
    if len(governor.copying_s) < ROUND_COPIES or not governor.quiet_s:
        return governor
    slower = max(0.0, median(governor.copying_s) / median(governor.quiet_s) - 1)
    pause_steps = min(max(1, math.ceil(slower / MOST_SLOWDOWN) - 1), MOST_PAUSE_STEPS)
    blocks = _blocks(governor, slower)
    return replace(governor, allowed_blocks=blocks, pause_steps=pause_steps, copying_s=(), copied_blocks=0)


def _owing(governor: Governor, *, copied: bool) -> Governor:
    if copied:
        return replace(governor, owed_steps=governor.owed_steps + governor.pause_steps, paused=False)
    owed = max(0, governor.owed_steps - 1)
    # With nothing owed the next copy begins anew: what the last one found too much says little about another batch.
    allowed = governor.allowed_blocks if owed else max(governor.allowed_blocks, FIRST_BLOCKS)
    return replace(governor, owed_steps=owed, paused=True, allowed_blocks=allowed)


def _blocks(governor: Governor, slower: float) -> int:
    allowed = governor.allowed_blocks
    if slower > MOST_HICCUP:
        return max(1, allowed // 2)
    if 2 * governor.copied_blocks < allowed * len(governor.copying_s):
        return allowed  # there was less to copy: nothing is known of copying more
    return min(allowed + (allowed + 1) // 2, MOST_BLOCKS)
