"""Copying takes as much of the others' time as it may, whatever a block costs, and never stands still."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.migration.governor import (
    FIRST_BLOCKS,
    MOST_BLOCKS,
    MOST_HICCUP,
    MOST_OWED_STEPS,
    MOST_PAUSE_STEPS,
    MOST_SLOWDOWN,
    Governor,
    governor_step,
)


def run(
    step_s: Callable[[int, int], float], steps: int, governor: Governor | None = None, waiting: int = 10**9
) -> tuple[Governor, list[int]]:
    """Lets so many steps pass. `step_s` of the step's number and the blocks copied in it; what each step copied."""
    governor = governor or Governor()
    copied = []
    for number in range(steps):
        blocks = min(governor.blocks, waiting)
        copied.append(blocks)
        governor = governor_step(governor, step_s(number, blocks), busy=True, copied_blocks=blocks)
    return governor, copied


def slowdown(copied: list[int], fixed: float, per_block: float) -> float:
    """On average, where a copy costs such shares of a step."""
    return sum(fixed * (blocks > 0) + per_block * blocks for blocks in copied) / len(copied)


@settings(max_examples=50)
@given(
    fixed=st.floats(0, MOST_HICCUP / 2),
    per_block=st.floats(MOST_HICCUP / 500, MOST_HICCUP / 4),
    base_s=st.floats(0.001, 1),
)
def test_it_takes_what_the_others_bear_and_no_more(fixed: float, per_block: float, base_s: float) -> None:
    def step_s(_: int, blocks: int) -> float:
        return base_s * (1 + fixed * (blocks > 0) + per_block * blocks)

    _, copied = run(step_s, 1500)
    settled = copied[500:]
    # A hiccup that was too large is paused after as well; it is up to half as large again as one that was not.
    assert max(settled) * per_block + fixed <= 1.5 * MOST_HICCUP + 2 * per_block
    assert slowdown(settled, fixed, per_block) <= 1.6 * MOST_SLOWDOWN
    # At least a third of what the best constant size would copy at the allowed slowdown.
    best = int((MOST_HICCUP - fixed) / per_block)
    best_rate = best * min(1 / 2, MOST_SLOWDOWN / (fixed + per_block * best))
    assert sum(settled) / len(settled) >= best_rate / 3


def test_what_a_copy_costs_whatever_its_size_makes_copies_rarer_and_larger() -> None:
    _, dear = run(lambda _, blocks: 0.01 * (1 + 0.1 * (blocks > 0) + 0.002 * blocks), 1000)
    _, cheap = run(lambda _, blocks: 0.01 * (1 + 0.002 * blocks), 1000)
    assert dear[500:].count(0) > 600 * 0.6
    assert slowdown(dear[500:], 0.1, 0.002) <= 1.6 * MOST_SLOWDOWN
    assert sum(dear[500:]) > 0.4 * sum(cheap[500:])


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=200), st.lists(st.booleans(), min_size=1))
def test_whatever_steps_take_something_is_copied_after_every_pause(durations: list[float], busy: list[bool]) -> None:
    governor, allowed = Governor(), []
    for number, duration in enumerate(durations):
        allowed.append(governor.blocks)
        governor = governor_step(governor, duration, busy=busy[number % len(busy)], copied_blocks=governor.blocks)
    for first in range(len(allowed) - MOST_PAUSE_STEPS):
        assert any(allowed[first : first + MOST_PAUSE_STEPS + 1])
    assert all(not (one and other) for one, other in itertools.pairwise(allowed)), "no step to compare with"
    assert max(allowed) <= MOST_BLOCKS


def test_when_every_step_takes_longer_by_itself_it_slows_down_only_for_a_while() -> None:
    """A batch that grows looks like copying that disturbs, until steps without copying have been seen again."""

    def step_s(number: int, blocks: int) -> float:
        return (0.01 if number < 1000 else 0.02) * (1 + MOST_SLOWDOWN * blocks / 50)

    _, copied = run(step_s, 1500)
    before = sum(copied[800:1000])
    assert sum(copied[1300:1500]) > 0.6 * before


def test_a_step_with_a_long_prompt_now_and_then_changes_nothing() -> None:
    def step_s(number: int, blocks: int) -> float:
        return 0.1 if number % 11 == 0 else 0.01

    governor, _ = run(step_s, 200)
    assert governor.allowed_blocks == MOST_BLOCKS


@pytest.mark.parametrize("seed", range(3))
def test_with_jitter_it_still_slows_the_others_little(seed: int) -> None:
    draw = random.Random(seed)

    def step_s(_: int, blocks: int) -> float:
        return 0.01 * (1 + 0.02 * (blocks > 0) + MOST_SLOWDOWN * blocks / 40) * (1 + abs(draw.gauss(0, 0.1)))

    _, copied = run(step_s, 1500)
    assert slowdown(copied, 0.02, MOST_SLOWDOWN / 40) < 0.05
    assert sum(copied) / len(copied) > 10


def test_with_little_to_copy_it_learns_nothing_about_copying_more() -> None:
    governor, _ = run(lambda _, blocks: 0.01, 500, waiting=1)
    assert governor.allowed_blocks == FIRST_BLOCKS


def test_steps_that_compute_nothing_say_nothing() -> None:
    governor, _ = run(lambda _, blocks: 0.01, 30)
    allowed = governor.allowed_blocks
    for _ in range(50):
        governor = governor_step(governor, 5.0, busy=False, copied_blocks=governor.blocks)
    assert governor.allowed_blocks == allowed


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=100), st.integers(1, 2 * FIRST_BLOCKS))
def test_a_short_copy_is_over_in_a_few_steps_however_steps_scattered_in_the_last(
    durations: list[float], waiting: int
) -> None:
    governor, _ = run(lambda number, _: durations[number % len(durations)], 500)
    governor, _ = run(
        lambda number, _: durations[number % len(durations)], MOST_OWED_STEPS + MOST_PAUSE_STEPS, governor, 0
    )
    copied: list[int] = []
    while sum(copied) < waiting:
        governor, now = run(lambda *_: durations[-1], 1, governor, waiting - sum(copied))
        copied += now
    assert len(copied) <= 3
