"""How many blocks a source copies per scheduler step, so that those who stay notice little of it.

In flow how long each step took, whether it computed anything and how many blocks were copied in it; out flows the
number for the next one. Steps with copying are compared with steps without: while they take more than a few percent
longer the number is halved, else it grows by a little, as TCP does with its window. Every few steps one copies nothing,
because what a step takes by itself changes with the batch. Medians, because a step with somebody's long prompt takes
ten times as long as the others and says nothing about copying.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

MOST_SLOWDOWN = 0.03
"""Share by which steps with copying may take longer."""
FIRST_BLOCKS = 4
MOST_BLOCKS = 4096
INCREASE_BLOCKS = 2
ROUND_STEPS = 4
"""Steps with copying between two decisions; one without follows them."""
QUIET_STEPS = 7
"""Steps without copying that are remembered."""


@dataclass(frozen=True)
class Governor:
    """What has been seen of an engine's steps."""

    allowed_blocks: int = FIRST_BLOCKS
    """Per step of a round."""
    turn: int = 0
    """Steps of the present round, those that computed nothing included."""
    quiet_s: tuple[float, ...] = ()
    """Durations of the last steps without copying."""
    copying_s: tuple[float, ...] = ()
    """Durations of this round's steps with copying."""
    copied_blocks: int = 0
    """In this round's steps with copying."""

    @property
    def blocks(self) -> int:
        """That the next step may copy. 0 once in a round, else at least 1: a copy never stands still."""
        return 0 if self.turn == ROUND_STEPS else self.allowed_blocks


def governor_step(governor: Governor, step_s: float, *, busy: bool, copied_blocks: int) -> Governor:
    """After a step that took `step_s`. `busy`: it computed tokens; if not, its duration says nothing."""
    governor = replace(governor, turn=(governor.turn + 1) % (ROUND_STEPS + 1))
    if not busy:
        return governor
    if copied_blocks == 0:
        return replace(governor, quiet_s=(*governor.quiet_s, step_s)[-QUIET_STEPS:])
    governor = replace(
        governor,
        copying_s=(*governor.copying_s, step_s),
        copied_blocks=governor.copied_blocks + copied_blocks,
    )
    if len(governor.copying_s) < ROUND_STEPS or not governor.quiet_s:
        return governor
    return replace(governor, allowed_blocks=_decided(governor), copying_s=(), copied_blocks=0)


def _decided(governor: Governor) -> int:
    allowed = governor.allowed_blocks
    if median(governor.copying_s) > median(governor.quiet_s) * (1 + MOST_SLOWDOWN):
        return max(1, allowed // 2)
    if 2 * governor.copied_blocks < allowed * len(governor.copying_s):
        return allowed  # there was less to copy: nothing is known of copying more
    return min(allowed + INCREASE_BLOCKS, MOST_BLOCKS)
