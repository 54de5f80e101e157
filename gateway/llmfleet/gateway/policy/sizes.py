"""How large a request is, before anyone has tokenized it.

Prompt: the gateway holds no tokenizer. It counts the bytes of the prompt's text and divides by the service's bytes
per token, learnt from the `usage` of finished requests as a ratio of decaying sums (so that long prompts, where the
error matters, weigh most). A prompt given as token ids needs no estimate.

Answer: its length is unknown until it ends. `max_tokens` bounds it, and the answers that requests of the same input
bucket got say how it is distributed. Predicting the mean would send every request of an input bucket to one bucket
of the plan, while the plan has split them over several; so the prediction *follows the distribution*, again by the
low-variance `Split`: over a run of requests the predicted buckets occur as often as the observed ones, and the load
that each variant gets is the load it was planned for.
"""

from __future__ import annotations

from typing import NamedTuple

from llmfleet.api import Buckets
from llmfleet.gateway.policy.prefix import Chain
from llmfleet.gateway.policy.split import Split

INITIAL_BYTES_PER_TOKEN = 4.0
"""English text under a byte-pair tokenizer, until the service has shown its own."""
_MEMORY_REQUESTS = 256
"""Requests after which what was learnt has faded to 1/e."""
_DECAY = 1.0 - 1.0 / _MEMORY_REQUESTS


class RequestShape(NamedTuple):
    """What the body of a request says about its size."""

    prompt_bytes: int
    """UTF-8 bytes of the prompt's text, over all messages or prompts."""
    prompt_tokens: int | None = None
    """Exact length, where the prompt is given as token ids."""
    max_output_tokens: int | None = None
    """Bound that the client set."""
    chain: Chain = ()
    """The beginning of its text, to be found again (`prefix.chain_of`); empty where it is short, or token ids."""
    sequences: int = 1
    """Answers asked for (`n`)."""
    counted: bool = True
    """False: it needs no GPU, like a tokenization, so that it is neither demand nor anything to learn from."""


class Usage(NamedTuple):
    """What the engine says a request has used, in tokens."""

    prompt_tokens: int
    completion_tokens: int


class Prediction(NamedTuple):
    """Expected size of a request."""

    prompt_tokens: float
    output_tokens: float
    """Upper edge of the expected output bucket, or the client's bound where that is less."""


class SizeModel:
    """What one service's requests have shown so far."""

    __slots__ = (
        "_answers",
        "_buckets",
        "_bytes",
        "_predicted",
        "_splits",
        "_tokens",
        "mean_output_tokens",
        "mean_prompt_tokens",
    )

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._bytes = INITIAL_BYTES_PER_TOKEN
        self._tokens = 1.0
        self._predicted = 0
        self.mean_prompt_tokens = 0.0
        """Of recent requests, as they were estimated; 0 before the first."""
        self.mean_output_tokens = 0.0
        """Of recent answers, as they were expected; 0 before the first."""
        self._answers: list[list[float]] = [[0.0] * len(buckets.output_tokens) for _ in buckets.input_tokens]
        self._splits: list[Split[int]] = [Split() for _ in buckets.input_tokens]

    @property
    def bytes_per_token(self) -> float:
        """Learnt ratio of prompt bytes to prompt tokens."""
        return self._bytes / self._tokens

    def prompt_tokens(self, shape: RequestShape) -> float:
        """Estimated length of the prompt."""
        if shape.prompt_tokens is not None:
            return float(shape.prompt_tokens)
        return max(1.0, shape.prompt_bytes / self.bytes_per_token)

    def predict(self, shape: RequestShape) -> Prediction:
        """Expected size of a request that arrives now."""
        prompt = self.prompt_tokens(shape)
        self._predicted = min(_MEMORY_REQUESTS, self._predicted + 1)
        self.mean_prompt_tokens += (prompt - self.mean_prompt_tokens) / self._predicted
        bound = shape.max_output_tokens
        column = self._output_bucket(self._buckets.input_index(prompt), bound)
        output = float(self._buckets.output_tokens[column])
        if bound is not None and bound < output:
            output = float(bound)
        self.mean_output_tokens += (output - self.mean_output_tokens) / self._predicted
        return Prediction(prompt, output)

    def _output_bucket(self, row: int, bound: int | None) -> int:
        edges = self._buckets.output_tokens
        highest = len(edges) - 1 if bound is None else self._buckets.output_index(bound)
        seen = self._answers[row]
        weights = {column: weight for column, weight in enumerate(seen[:highest]) if weight > 0.0}
        if (longest := sum(seen[highest:])) > 0.0:
            weights[highest] = longest
        if not weights:
            return highest if bound is not None else len(edges) // 2
        return self._splits[row].pick(weights)

    def learn(self, shape: RequestShape, usage: Usage) -> int:
        """Takes in a finished request, and gives its bucket."""
        if shape.prompt_tokens is None and shape.prompt_bytes > 0 and usage.prompt_tokens > 0:
            self._bytes = self._bytes * _DECAY + shape.prompt_bytes
            self._tokens = self._tokens * _DECAY + usage.prompt_tokens
        buckets = self._buckets
        bucket = buckets.index(usage.prompt_tokens, usage.completion_tokens / max(1, shape.sequences))
        row, column = divmod(bucket, len(buckets.output_tokens))
        seen = self._answers[row] = [weight * _DECAY for weight in self._answers[row]]
        seen[column] += 1.0
        return bucket
