"""The KV cache as bytes: which memory a block occupies, to be sent from there and received there.

A block is one page per layer. Pages go over the wire as they lie in memory, in the order of the layers: what an
element means is the attention backend's business (on CPUs it depends on the instruction set), so peers must agree in
the fingerprint and nothing is ever converted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """Where one layer's pages are: block `b` occupies `page_bytes` bytes from `address + b * stride_bytes`."""

    address: int
    stride_bytes: int
    page_bytes: int


class HostMemory:
    """KV cache in the memory of this process.

    Whoever made it keeps the memory alive and owns the blocks that are read or written: nothing is checked here.
    """

    def __init__(self, layers: Sequence[Layer], blocks: int) -> None:
        self.blocks = blocks
        self.block_bytes = sum(layer.page_bytes for layer in layers)
        self._layers = [
            (_view(layer.address, layer.stride_bytes * (blocks - 1) + layer.page_bytes), layer) for layer in layers
        ]

    def pages(self, block_ids: Iterable[int]) -> list[memoryview]:
        """The pages of these blocks, block by block and layer by layer: writable views, nothing copied."""
        return [
            view[block * layer.stride_bytes : block * layer.stride_bytes + layer.page_bytes]
            for block in block_ids
            for view, layer in self._layers
        ]


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
