"""No block is given back twice, too early or not at all, in whatever order things happen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmfleet.engine.blocks import Pins, Reservation


@dataclass(eq=False)
class Block:
    block_id: int
    ref_cnt: int = 0


class Pool:
    """Counts references as vLLM's block pool does, and is as strict where vLLM asserts."""

    def __init__(self, count: int) -> None:
        self.blocks = [Block(number) for number in range(count)]

    def get_num_free_blocks(self) -> int:
        return sum(block.ref_cnt == 0 for block in self.blocks)

    def get_new_blocks(self, count: int) -> list[Block]:
        if count > self.get_num_free_blocks():
            raise ValueError(f"Cannot get {count} free blocks from the pool")
        chosen = [block for block in self.blocks if block.ref_cnt == 0][:count]
        for block in chosen:
            block.ref_cnt += 1
        return chosen

    def touch(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0, f"block {block.block_id} is given back twice"


def test_pinned_blocks_outlive_their_request_and_return_once() -> None:
    pool = Pool(8)
    request = pool.get_new_blocks(3)
    pins = Pins(pool)
    pins.extend_to(request[:2])
    pins.extend_to(request)
    pool.free_blocks(request)
    assert pool.get_num_free_blocks() == 5
    assert pins.ids(1, 2) == [1, 2]
    pins.release()
    pins.release()
    assert pool.get_num_free_blocks() == 8


def test_a_request_takes_its_blocks_and_the_rest_of_the_reservation_is_free() -> None:
    pool = Pool(8)
    reservation = Reservation(pool, 5)
    taken = reservation.take(2)
    assert [block.ref_cnt for block in taken] == [1, 1]
    assert pool.get_num_free_blocks() == 6
    reservation.release()
    assert pool.get_num_free_blocks() == 6


def test_a_block_that_is_being_written_is_not_given_to_anybody_else() -> None:
    pool = Pool(4)
    reservation = Reservation(pool, 3)
    assert reservation.begin_write(1, 2) == [1, 2]
    reservation.release()
    assert pool.get_num_free_blocks() == 1
    assert reservation.begin_write(0, 1) is None
    reservation.end_write()
    assert pool.get_num_free_blocks() == 4


def test_a_reservation_grows_only_by_what_is_free() -> None:
    reservation = Reservation(Pool(4), 1)
    assert reservation.grow(4)
    assert not reservation.grow(5)
    assert len(reservation) == 4
    with pytest.raises(ValueError, match="free blocks"):
        Reservation(Pool(1), 2)


class AnyOrder(RuleBasedStateMachine):
    """One reservation under writers, growth, hand-over and release in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(12)
        self.reservation = Reservation(self.pool, 4)
        self.writers = 0
        self.taken: list[Block] = []
        self.over = False

    @rule(first=st.integers(0, 8), count=st.integers(1, 4))
    def begin(self, first: int, count: int) -> None:
        ids = self.reservation.begin_write(first, count)
        if ids is not None:
            assert not self.over
            self.writers += 1

    @precondition(lambda self: self.writers)
    @rule()
    def end(self) -> None:
        self.reservation.end_write()
        self.writers -= 1

    @rule(count=st.integers(1, 12))
    def grow(self, count: int) -> None:
        self.reservation.grow(count)

    @precondition(lambda self: not self.over and not self.writers)
    @rule(count=st.integers(0, 4))
    def take(self, count: int) -> None:
        self.taken = self.reservation.take(count)
        self.over = True

    @rule()
    def release(self) -> None:
        self.reservation.release()
        self.over = True

    @invariant()
    def every_block_is_somewhere(self) -> None:
        held = 12 - self.pool.get_num_free_blocks()
        if self.over and not self.writers:
            assert held == len(self.taken)
        else:
            assert held == len(self.reservation) + len(self.taken)
        assert all(block.ref_cnt <= 1 for block in self.pool.blocks)


TestAnyOrder = AnyOrder.TestCase
