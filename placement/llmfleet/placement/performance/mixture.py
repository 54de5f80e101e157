"""One replica under a mix of sizes: what each request sees with n of them in flight.

A model of latency answers for loads of *one* size. In a mix all requests decode in one batch and queue for one
prefill, so that large requests slow down small ones. With n in flight, w_s the share of arrivals of size s:

    S_s = TTFT_s + (output_s - 1) TPOT           time in the replica
    p_s = w_s S_s / sum w S                      share of the requests in flight: long ones are there for longer
    TPOT = sum_s p_s TPOT_s(n)                   one batch, one step time for all
    TTFT_s = TTFT_s(1) + sum_s w_s (TTFT_s(n) - TTFT_s(1))      its own prefill, and the mean wait behind others

TPOT_s(n) and TTFT_s(n) are the model's answers for n requests of size s. The first three are a fixed point, which a few
rounds reach. The rate at which n in flight are completed follows from Little's law, n / sum_s w_s S_s.

The model's uncertainty is a margin: every latency is taken some standard errors worse than predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmfleet.placement.performance.model import FloatArray, PerformanceModel

MOST_CONCURRENCY = 256
"""Requests in flight per replica that are looked at: vLLM's default `--max-num-seqs`."""
_ROUNDS = 12


@dataclass(frozen=True)
class SizeMix:
    """Sizes of requests and how often they arrive. Raises ValueError for an empty mix or a weight below zero."""

    input_tokens: FloatArray
    """Prompt lengths, shape (sizes,)."""
    output_tokens: FloatArray
    """Answer lengths, shape (sizes,)."""
    weight: FloatArray
    """Share of the arrivals, shape (sizes,); scaled to sum to one."""

    def __post_init__(self) -> None:
        weight = np.asarray(self.weight, dtype=np.float64)
        if not weight.size or not np.isfinite(weight).all() or (weight < 0).any() or weight.sum() <= 0:
            raise ValueError(f"SizeMix.weight is {weight.tolist()}; accepted are numbers of at least 0, not all 0")
        used = weight > 0
        object.__setattr__(self, "input_tokens", np.asarray(self.input_tokens, dtype=np.float64)[used])
        object.__setattr__(self, "output_tokens", np.asarray(self.output_tokens, dtype=np.float64)[used])
        object.__setattr__(self, "weight", weight[used] / weight.sum())


@dataclass(frozen=True)
class ReplicaCurves:
    """One replica at n = 1, 2, ... requests in flight, as far as the model knows every size of the mix."""

    weight: FloatArray
    """Share of the arrivals, shape (sizes,)."""
    ttft_ms: FloatArray
    """Median TTFT, shape (sizes, n)."""
    ttft_spread: FloatArray
    """Scatter of TTFT (standard deviation of the logarithm), shape (sizes, n)."""
    tpot_ms: FloatArray
    """Median TPOT, shape (n,)."""
    tpot_spread: FloatArray
    """Scatter of TPOT, shape (n,)."""
    requests_per_second: FloatArray
    """Completed by one replica, shape (n,)."""

    @property
    def places(self) -> int:
        """Most requests in flight that are known; more wait outside."""
        return len(self.tpot_ms)


def replica_curves(
    model: PerformanceModel,
    mix: SizeMix,
    *,
    most_concurrency: int = MOST_CONCURRENCY,
    standard_errors: float = 1.0,
    most_requests_per_second: float = np.inf,
) -> ReplicaCurves:
    """What a replica does under a mix.

    `standard_errors`: how much worse than predicted latency is taken. `most_requests_per_second`: what the replica was
    seen to complete of this mix; no rate is above it. Where the model does not know some size at all, there is no
    place: shape (n,) is (0,).
    """
    concurrency = np.arange(1.0, most_concurrency + 1)
    found = model.predict(mix.input_tokens[:, None], mix.output_tokens[:, None], concurrency)
    known = (found.known & np.isfinite(found.ttft_ms)).all(axis=0)
    places = int(np.argmin(known)) if not known.all() else most_concurrency
    alone_ttft = (found.ttft_ms * (1 + standard_errors * found.ttft_error))[:, :places]
    alone_tpot = (found.tpot_ms * (1 + standard_errors * found.tpot_error))[:, :places]
    if not places:
        none = np.zeros(0)
        return ReplicaCurves(mix.weight, alone_ttft, alone_ttft, none, none, none)
    share = mix.weight[:, None]
    ttft = alone_ttft[:, :1] + (share * (alone_ttft - alone_ttft[:, :1])).sum(axis=0)
    further = np.maximum(mix.output_tokens[:, None] - 1, 0)
    tpot = (share * alone_tpot).sum(axis=0)
    for _ in range(_ROUNDS):
        staying = share * (ttft + further * tpot)
        tpot = (staying * alone_tpot).sum(axis=0) / staying.sum(axis=0)
    mean_seconds = (share * (ttft + further * tpot)).sum(axis=0) / 1e3
    rate = np.minimum(concurrency[:places] / np.maximum(mean_seconds, 1e-9), most_requests_per_second)
    return ReplicaCurves(
        weight=mix.weight,
        ttft_ms=ttft,
        ttft_spread=found.ttft_spread[:, :places],
        tpot_ms=tpot,
        tpot_spread=(share * found.tpot_spread[:, :places]).sum(axis=0),
        requests_per_second=rate,
    )
