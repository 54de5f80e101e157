"""References on KV blocks that belong to no request: those pinned at a source and those reserved at a destination.

vLLM's block pool counts references; a block returns to the free ones when the last is given back. A *pin* is one more
reference on a block that a request holds; it outlives the request, so a block that is being sent is never written to,
and what was cut stays until the hand-over is certain. A *reservation* is the only reference on blocks that nobody else
has; its request takes them over.

All of it is used under the monitor only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Pins:
    """Blocks of one request at its source, in order."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.blocks: list[Any] = []

    def extend_to(self, blocks: Sequence[Any]) -> None:
        """Pin those of the request's blocks that are not pinned yet."""
        new = list(blocks[len(self.blocks) :])
        self._pool.touch(new)
        self.blocks += new

    def release(self) -> None:
        """Give all of them back. A second call does nothing."""
        blocks, self.blocks = self.blocks, []
        self._pool.free_blocks(reversed(blocks))

    def ids(self, first: int, count: int) -> list[int]:
        """Ids of `count` of the blocks, from the `first`."""
        return [block.block_id for block in self.blocks[first : first + count]]


class Reservation:
    """Blocks for one request that is on its way here.

    While data is being written into them (`writers` > 0) they are not given back, whatever happens: somebody else's
    KV cache would be overwritten. The last writer to leave gives them back then.
    """

    def __init__(self, pool: Any, count: int) -> None:
        self._pool = pool
        self._blocks: list[Any] = pool.get_new_blocks(count)
        self._writers = 0
        self._over = False

    def __len__(self) -> int:
        return len(self._blocks)

    def grow(self, count: int) -> bool:
        """Make it at least `count` blocks. False where the pool has none left."""
        more = count - len(self._blocks)
        if self._over or more > self._pool.get_num_free_blocks():
            return False
        if more > 0:
            self._blocks += self._pool.get_new_blocks(more)
        return True

    @property
    def written_to(self) -> bool:
        """Whether data is being received into the blocks right now."""
        return self._writers > 0

    def begin_write(self, first: int, count: int) -> list[int] | None:
        """Ids of the blocks to write to, or None where they are not reserved any more. Ended by `end_write`."""
        if self._over or first + count > len(self._blocks):
            return None
        self._writers += 1
        return [block.block_id for block in self._blocks[first : first + count]]

    def end_write(self) -> None:
        self._writers -= 1
        if self._over and not self._writers:
            self._give_back()

    def take(self, count: int) -> list[Any]:
        """The first `count` blocks change hands: they are the request's now. The others return to the pool."""
        taken, self._blocks = self._blocks[:count], self._blocks[count:]
        self.release()
        return taken

    def release(self) -> None:
        """Give back what is left. A second call does nothing."""
        self._over = True
        if not self._writers:
            self._give_back()

    def _give_back(self) -> None:
        blocks, self._blocks = self._blocks, []
        self._pool.free_blocks(reversed(blocks))
