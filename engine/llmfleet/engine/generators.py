"""Random generators of requests with a seed, brought to where another engine's were.

In flow a seed and either the state that the other engine's generator had or how many tokens it had drawn for; out flows
a generator that draws for the next token what the other one would have drawn.

vLLM takes a draw back where it throws the drawn token away, which it does for every portion of a prompt but the last
one: `set_offset(get_offset() - 4)`. Generators on CPUs have no offsets, and vLLM's engine ends there with an error. A
request that is computed again has far more tokens in its "prompt" than a new one, and after a crash many come at
once, so that portions are the rule: the generators made here know how to take a draw back.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("vllm.llmfleet")

_ONE_DRAW = 4
"""What vLLM takes off the offset for one token."""
_MOST_DRAWS = 1_000_000


def generator_at(
    device: torch.device, vocabulary: int, seed: int, draws: int, state: bytes | None, request: str
) -> torch.Generator:
    """After so many tokens; `state` says the same where it is known."""
    on_cpu = device.type == "cpu"
    generator = RewindableGenerator() if on_cpu else torch.Generator(device=device)
    if state:
        try:
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
            return generator
        except (RuntimeError, TypeError) as error:
            logger.warning("the generator of %s is drawn anew: %s", request, error)
    generator.manual_seed(seed)
    for _ in range(draws):
        if on_cpu:
            _draw(generator)
        else:
            # The sampler draws a row as wide as the vocabulary.
            torch.empty(vocabulary, device=device).exponential_(generator=generator)
    return generator


def _draw(generator: torch.Generator) -> None:
    """What the sampler draws for one token on CPUs: the seed of a stream."""
    torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)


class RewindableGenerator(torch.Generator):
    """On the CPU, with so much of offsets as vLLM needs: one draw can be taken back.

    A Mersenne twister does not run backwards. Draws are made again from a state that lies before, until the next one
    would lead to the present state.
    """

    _before: torch.Tensor | None = None
    """A state that this generator had before it drew."""

    def manual_seed(self, seed: int) -> torch.Generator:
        super().manual_seed(seed)
        self._before = self.get_state()
        return self

    def set_state(self, new_state: torch.Tensor) -> None:
        super().set_state(new_state)
        self._before = self.get_state()

    def get_offset(self) -> int:
        """Only differences mean anything."""
        return 0

    def set_offset(self, offset: int) -> None:
        """Raises ValueError for anything but one draw back, RuntimeError where the draw to take back is not found."""
        if offset != -_ONE_DRAW:
            raise ValueError(f"offset: {offset}; {-_ONE_DRAW}, one draw back, is all that there is")
        present = self.get_state()
        again = torch.Generator()
        again.set_state(self._before if self._before is not None else present)
        for _ in range(_MOST_DRAWS):
            before = again.get_state()
            _draw(again)
            if torch.equal(again.get_state(), present):
                self.set_state(before)
                return
        raise RuntimeError("this generator has drawn something else than tokens")
