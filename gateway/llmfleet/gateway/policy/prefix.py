"""Which engines have the beginning of a prompt in their prefix cache: a memory of what they were sent.

    text --chain_of--> chain: one number for each block of text, standing for everything up to there
    chain --hits--> blocks that each replica should have;  chain --sent--> remembered

Engines keep the KV of prompts they have seen (automatic prefix caching), so a conversation's next turn, or a prompt
with a known system text, is computed only from where it differs. What an engine keeps is not asked: it is what this
gateway sent there last, up to as much as the engine's cache holds. An engine that has forgotten sooner costs a wrong
guess, no wrong answer.

Blocks are `BLOCK_CHARS` characters of text, since nobody tokenizes here; the number of a block is Python's own hash of
the block (SipHash, 64 bits, with a key of this process) and of the number before it. So chains are equal exactly where
texts are equal from the beginning, but for about one chance in 2^61 per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

BLOCK_CHARS = 1024
"""About 256 tokens of English: what is shared is shared in whole blocks."""
MOST_BLOCKS = 128
"""Of one prompt: what comes after the first 128 KiB is not compared."""
MOST_REMEMBERED = 16_384
"""Blocks per replica where the size of its cache is unknown, and the most in any case: 16 MiB of text."""

Chain = tuple[int, ...]


def chain_of(parts: Sequence[str]) -> Chain:
    """The chain of a prompt that is these texts, one after another, in roles or messages of its own.

    Two prompts share as many numbers as they share whole blocks from the beginning. The end of a part ends a block only
    with the text: parts are joined.
    """
    text = "\0".join(parts) if len(parts) > 1 else parts[0] if parts else ""
    number = 0
    chain = []
    for begin in range(0, min(len(text) - BLOCK_CHARS + 1, MOST_BLOCKS * BLOCK_CHARS), BLOCK_CHARS):
        number = hash((number, text[begin : begin + BLOCK_CHARS]))
        chain.append(number)
    return tuple(chain)


class Hits(Generic[T]):
    """How much of one prompt the replicas should have."""

    __slots__ = ("_depths", "_memory")

    def __init__(self, memory: PrefixMemory[T], depths: list[tuple[int, int]]) -> None:
        self._memory = memory
        self._depths = depths  # (replicas as a set of bits, blocks that they have), fewer blocks first

    def __bool__(self) -> bool:
        return bool(self._depths)

    def blocks(self, replica: T) -> int:
        """Blocks from the beginning of the prompt."""
        bit = self._memory.bit(replica)
        for replicas, blocks in self._depths:
            if replicas & bit:
                return blocks
        return 0

    def deepest(self, most: int) -> list[T]:
        """Replicas, at most so many, that have more of it than all others."""
        return self._memory.named(self._depths[-1][0], most) if self._depths else []


class PrefixMemory(Generic[T]):
    """What the replicas of one service were sent, least recently used blocks forgotten first.

    Who holds a block is a set of bits, so that following a chain that all replicas hold costs no more than one that
    only one holds.
    """

    __slots__ = ("_bits", "_blocks", "_holders")

    def __init__(self) -> None:
        self._bits: dict[T, int] = {}
        self._blocks: dict[T, dict[int, None]] = {}  # by replica: least recently used first
        self._holders: dict[int, int] = {}  # by block

    def bit(self, replica: T) -> int:
        """The bit that stands for a replica; 0 for one that was sent nothing."""
        return self._bits.get(replica, 0)

    def named(self, replicas: int, most: int) -> list[T]:
        """At most so many of the replicas of a set of bits."""
        found = []
        for replica, bit in self._bits.items():
            if replicas & bit:
                found.append(replica)
                if len(found) == most:
                    break
        return found

    def hits(self, chain: Chain) -> Hits[T]:
        """How much of a prompt each replica should have."""
        depths: list[tuple[int, int]] = []
        holders = self._holders
        left = -1
        depth = 0
        for block in chain:
            here = holders.get(block, 0) & left
            if here != left and depth:
                depths.append((left & ~here, depth))
            left = here
            if not here:
                break
            depth += 1
        if depth and left:
            depths.append((left, depth))
        return Hits(self, depths)

    def sent(self, replica: T, chain: Chain, most_blocks: int = MOST_REMEMBERED) -> None:
        """A prompt goes to a replica, which keeps `most_blocks` blocks."""
        if not chain:
            return
        blocks = self._blocks.get(replica)
        if blocks is None:
            blocks = self._blocks[replica] = {}
            self._bits[replica] = self._free_bit()
        bit, holders = self._bits[replica], self._holders
        # The beginning is touched last, so that of a chain the end is forgotten first.
        for block in reversed(chain):
            if block in blocks:
                del blocks[block]
            else:
                holders[block] = holders.get(block, 0) | bit
            blocks[block] = None
        surplus = len(blocks) - max(1, min(most_blocks, MOST_REMEMBERED))
        for block in list(islice(blocks, max(0, surplus))):
            del blocks[block]
            self._drop(block, bit)

    def forget(self, replica: T) -> None:
        """A replica is gone, or has lost its cache."""
        bit = self._bits.pop(replica, 0)
        for block in self._blocks.pop(replica, {}):
            self._drop(block, bit)

    def __len__(self) -> int:
        """Blocks remembered, over all replicas."""
        return sum(len(blocks) for blocks in self._blocks.values())

    def _free_bit(self) -> int:
        taken = 0
        for bit in self._bits.values():
            taken |= bit
        return (taken + 1) & ~taken

    def _drop(self, block: int, bit: int) -> None:
        here = self._holders[block] & ~bit
        if here:
            self._holders[block] = here
        else:
            del self._holders[block]
