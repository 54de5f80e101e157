"""The word to begin: what a source tells the destination once its request is cut, besides the KV cache.

    tokens       all output token ids, those included that the client has
    kv_tokens    for so many tokens of prompt and output the KV cache is computed: one less than there are
    generator    state of the sampler's random generator, where the model runner keeps one
    logprobs     what the engine told of the tokens so far, for answers that are not streamed

Numbers are packed little-endian behind a JSON head that gives their counts; whatever does not add up is a ValueError,
so that a damaged or foreign message never becomes a request's state.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_LENGTH = struct.Struct("<I")
_MOST_HEAD_BYTES = 4096


@dataclass(frozen=True)
class Logprobs:
    """Of `n` tokens: ids and log probabilities, shape [n, k + 1] with the token itself first, and its rank, [n]."""

    token_ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]


@dataclass(frozen=True)
class HandOver:
    """What the destination needs besides the blocks."""

    tokens: list[int]
    kv_tokens: int
    generator: bytes | None = None
    logprobs: Logprobs | None = None


def encode(hand_over: HandOver) -> bytes:
    """The message's bytes."""
    parts = [np.asarray(hand_over.tokens, dtype="<i4").tobytes(), hand_over.generator or b""]
    width = 0
    if hand_over.logprobs is not None:
        width = hand_over.logprobs.token_ids.shape[1]
        parts += [
            hand_over.logprobs.token_ids.astype("<i4").tobytes(),
            hand_over.logprobs.values.astype("<f4").tobytes(),
            hand_over.logprobs.ranks.astype("<i4").tobytes(),
        ]
    head = json.dumps(
        {
            "tokens": len(hand_over.tokens),
            "kv_tokens": hand_over.kv_tokens,
            "generator_bytes": None if hand_over.generator is None else len(hand_over.generator),
            "logprobs_width": width,
        }
    ).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *parts])


def decode(message: bytes | memoryview) -> HandOver:
    """The inverse of `encode`. Raises ValueError for anything else."""
    view = memoryview(message)
    if len(view) < _LENGTH.size:
        raise ValueError(f"a hand-over of {len(view)} bytes has no head")
    (head_bytes,) = _LENGTH.unpack(view[: _LENGTH.size])
    if head_bytes > min(_MOST_HEAD_BYTES, len(view) - _LENGTH.size):
        raise ValueError(f"a head of {head_bytes} bytes in a hand-over of {len(view)}")
    reader = _Reader(view[_LENGTH.size + head_bytes :])
    head = _head(bytes(view[_LENGTH.size : _LENGTH.size + head_bytes]))
    count, width = head["tokens"], head["logprobs_width"]
    tokens = np.frombuffer(reader.take(4 * count), dtype="<i4")
    generator = None if head["generator_bytes"] is None else bytes(reader.take(head["generator_bytes"]))
    logprobs = None
    if width:
        shape = (count, width)
        logprobs = Logprobs(
            np.frombuffer(reader.take(4 * count * width), dtype="<i4").reshape(shape),
            np.frombuffer(reader.take(4 * count * width), dtype="<f4").reshape(shape),
            np.frombuffer(reader.take(4 * count), dtype="<i4"),
        )
    reader.end()
    return HandOver(tokens.tolist(), head["kv_tokens"], generator, logprobs)


def _head(text: bytes) -> dict[str, Any]:
    try:
        head = json.loads(text)
    except ValueError as error:
        raise ValueError("the head of a hand-over is not JSON") from error
    names = {"tokens", "kv_tokens", "generator_bytes", "logprobs_width"}
    if not isinstance(head, dict) or set(head) != names:
        raise ValueError(f"the head of a hand-over must have {sorted(names)}")
    for name, value in head.items():
        if name == "generator_bytes" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} of a hand-over is {value!r}, not a count")
    return head


class _Reader:
    def __init__(self, view: memoryview) -> None:
        self._view = view

    def take(self, size: int) -> memoryview:
        if size > len(self._view):
            raise ValueError(f"a hand-over ends {size - len(self._view)} bytes too early")
        taken, self._view = self._view[:size], self._view[size:]
        return taken

    def end(self) -> None:
        if self._view:
            raise ValueError(f"{len(self._view)} bytes too many in a hand-over")
