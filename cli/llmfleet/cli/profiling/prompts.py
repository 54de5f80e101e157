"""Random prompts of an exact number of tokens.

Random, because engines keep the KV cache of prompts that they have seen: measured with one prompt over and over, the
prefill would cost nothing. The ids are drawn from those that the model's own tokenizer makes of ordinary text, so
that no special token is among them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from llmfleet.cli.refused import RefusedError

SAMPLE_TEXT = " ".join(vowel + letter for letter in "abcdefghijklmnopqrstuvwxyz" for vowel in "aeiou")
"""Enough different tokens for any tokenizer, few enough for any context."""

_FEWEST_TOKENS = 16
"""With a 16th of the prompts' first tokens in common, blocks of the KV cache still never are."""


class Prompts:
    """An endless source of prompts that share no prefix worth caching."""

    def __init__(self, sample_tokens: Sequence[int], seed: int) -> None:
        """`sample_tokens`: what the tokenizer makes of SAMPLE_TEXT. Raises RefusedError if it is too uniform."""
        self._vocabulary = sorted(set(sample_tokens))
        if len(self._vocabulary) < _FEWEST_TOKENS:
            raise RefusedError(
                f"the model's tokenizer makes only {len(self._vocabulary)} different tokens of {len(SAMPLE_TEXT)} "
                f"characters of text; random prompts need {_FEWEST_TOKENS}"
            )
        self._random = random.Random(seed)

    def draw(self, tokens: int) -> list[int]:
        """A prompt of so many tokens."""
        return self._random.choices(self._vocabulary, k=tokens)
