"""The word to begin comes out as it went in, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.engine.hand_over import HandOver, Logprobs, decode, encode

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=50)


@st.composite
def hand_overs(draw: Any) -> HandOver:
    tokens = draw(TOKENS)
    logprobs = None
    if tokens and draw(st.booleans()):
        shape = (len(tokens), draw(st.integers(1, 5)))
        values = np.linspace(-9, 0, shape[0] * shape[1], dtype=np.float32).reshape(shape)
        ids = np.arange(values.size, dtype=np.int32).reshape(shape)
        logprobs = Logprobs(ids, values, np.arange(len(tokens), dtype=np.int32))
    generator = draw(st.none() | st.binary(max_size=30))
    return HandOver(tokens, draw(st.integers(0, 10**6)), generator, logprobs)


@given(hand_overs())
def test_what_was_encoded_is_decoded(word: HandOver) -> None:
    read = decode(encode(word))
    assert (read.tokens, read.kv_tokens, read.generator) == (word.tokens, word.kv_tokens, word.generator)
    assert (read.logprobs is None) == (word.logprobs is None)
    if read.logprobs is not None and word.logprobs is not None:
        assert np.array_equal(read.logprobs.token_ids, word.logprobs.token_ids)
        assert np.array_equal(read.logprobs.values, word.logprobs.values)
        assert np.array_equal(read.logprobs.ranks, word.logprobs.ranks)


@given(hand_overs(), st.data())
def test_a_word_that_is_cut_off_or_too_long_is_no_word(word: HandOver, data: st.DataObject) -> None:
    message = encode(word)
    with pytest.raises(ValueError, match="hand-over"):
        decode(message[: data.draw(st.integers(0, len(message) - 1))])
    with pytest.raises(ValueError, match="too many"):
        decode(message + b"x")


@given(st.binary(max_size=200))
def test_noise_is_no_word(noise: bytes) -> None:
    with pytest.raises(ValueError, match="hand-over"):
        decode(noise)
