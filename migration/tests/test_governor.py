"""Copying takes as much of a step as it may, whatever a block costs, and never stands still."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.migration.governor import (
    FIRST_BLOCKS,
    INCREASE_BLOCKS,
    MOST_BLOCKS,
    MOST_SLOWDOWN,
    ROUND_STEPS,
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


@settings(max_examples=30)
@given(bearable=st.floats(0.5, 500), base_s=st.floats(0.001, 1))
def test_it_settles_around_what_the_others_bear(bearable: float, base_s: float) -> None:
    _, copied = run(lambda _, blocks: base_s * (1 + MOST_SLOWDOWN * blocks / bearable), 1500)
    settled = [blocks for blocks in copied[1000:] if blocks]
    assert max(settled) <= max(1, bearable + INCREASE_BLOCKS)
    assert min(settled) >= max(1, int(bearable / 2))


@given(st.lists(st.floats(1e-6, 10), min_size=ROUND_STEPS + 1, max_size=200), st.lists(st.booleans(), min_size=1))
def test_whatever_steps_take_something_is_copied_in_all_but_one_of_a_round(
    durations: list[float], busy: list[bool]
) -> None:
    governor, allowed = Governor(), []
    for number, duration in enumerate(durations):
        allowed.append(governor.blocks)
        governor = governor_step(
            governor, duration, busy=busy[number % len(busy)], copied_blocks=governor.blocks
        )  # fmt: skip
    for first in range(len(allowed) - ROUND_STEPS):
        assert sum(1 for blocks in allowed[first : first + ROUND_STEPS + 1] if blocks >= 1) == ROUND_STEPS
    assert max(allowed) <= MOST_BLOCKS


def test_when_every_step_takes_longer_by_itself_it_slows_down_only_for_a_while() -> None:
    """A batch that grows looks like copying that disturbs, until steps without copying have been seen again."""

    def step_s(number: int, blocks: int) -> float:
        return (0.01 if number < 1000 else 0.02) * (1 + MOST_SLOWDOWN * blocks / 50)

    _, copied = run(step_s, 1500)
    before = sum(copied[900:1000])
    assert sum(copied[1000:1100]) < before
    assert sum(copied[1400:1500]) > 0.8 * before


def test_a_step_with_a_long_prompt_now_and_then_changes_nothing() -> None:
    def step_s(number: int, blocks: int) -> float:
        return 0.1 if number % 11 == 0 else 0.01

    _, copied = run(step_s, 200)
    assert max(copied) > FIRST_BLOCKS + 40


@pytest.mark.parametrize("seed", range(3))
def test_with_jitter_it_still_slows_the_others_little(seed: int) -> None:
    draw = random.Random(seed)
    slowdowns = []

    def step_s(_: int, blocks: int) -> float:
        slowdown = MOST_SLOWDOWN * blocks / 40
        slowdowns.append(slowdown)
        return 0.01 * (1 + slowdown) * (1 + abs(draw.gauss(0, 0.03)))

    _, copied = run(step_s, 1500)
    assert sum(slowdowns) / len(slowdowns) < 0.05
    assert sum(copied) / len(copied) > 10


def test_with_little_to_copy_it_learns_nothing_about_copying_more() -> None:
    governor, _ = run(lambda _, blocks: 0.01, 500, waiting=1)
    assert governor.allowed_blocks == FIRST_BLOCKS


def test_steps_that_compute_nothing_say_nothing() -> None:
    governor, _ = run(lambda _, blocks: 0.01, 100)
    allowed = governor.allowed_blocks
    for _ in range(50):
        governor = governor_step(governor, 5.0, busy=False, copied_blocks=governor.blocks)
    assert governor.allowed_blocks == allowed
