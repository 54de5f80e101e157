"""One replica under a mix of sizes: what each request sees with n of them in flight.

A model of latency answers for loads of *one* size. In a mix all requests decode in one batch and queue for one
prefill, so that large requests slow down small ones. With n in flight, w_s the share of arrivals of size s:

    S_s = TTFT_s + (output_s - 1) TPOT           time in the replica
    p_s = w_s S_s / sum w S                      share of the requests in flight: long ones are there for longer
    TPOT = sum_s p_s TPOT_s(n)                   one batch, one step time for all
    TTFT_s = TTFT_s(1) + sum_s w_s (TTFT_s(n) - TTFT_s(1))      its own prefill, and the mean wait behind others

TPOT_s(n) and TTFT_s(n) are the model's answers for n requests of size s. The first three are a fixed point, which a
few rounds reach. The rate at which n in flight are completed follows from Little's law, n / sum_s w_s S_s.

**Places.** Where a model knows size s up to m_s in flight (a table up to where more brought no more throughput), a mix
of n takes the share p_s n / m_s of a replica with it; what these add up to is at most one. Beyond m_s, which only
requests of other sizes fill, latency goes on as it does when nothing more is completed: in proportion to n.

**Scatter of TPOT.** A decode of o tokens at time t each is interrupted by the prefills that arrive meanwhile: X o t of
them on average, each for f, the TTFT of its size alone. The variance of their sum is c X o t E[f^2] (compound Poisson
where the index of dispersion c of the arrivals is 1), so TPOT scatters by sqrt(c X E[f^2] / (o t)) of itself: much for
short answers among long prompts, which is why a mean says little there. The upper corner of a bucket is not on the safe
side here, so o is half of it where the mean is not known: the middle of a bucket that begins near zero. Prefills of
*other* sizes count; what a size does to itself is in the model's own scatter.

The model's uncertainty is a margin: every latency is taken some standard errors worse than predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmfleet.placement.performance.model import FloatArray, PerformanceModel, Prediction

MOST_CONCURRENCY = 256
"""Requests in flight per replica that are looked at: vLLM's default `--max-num-seqs`."""
_ROUNDS = 12
_MIDDLE = 0.5  # of a bucket, as a share of its upper edge


@dataclass(frozen=True)
class SizeMix:
    """Sizes of requests and how often they arrive. Raises ValueError for an empty mix or a weight below zero."""

    input_tokens: FloatArray
    """Prompt lengths, shape (sizes,)."""
    output_tokens: FloatArray
    """Answer lengths, shape (sizes,)."""
    weight: FloatArray
    """Share of the arrivals, shape (sizes,); scaled to sum to one."""
    longest_output_tokens: FloatArray | None = None
    """Where answer lengths are means of what is known to be no longer than this, shape (sizes,); None: they are the
    longest themselves."""

    def __post_init__(self) -> None:
        weight = np.asarray(self.weight, dtype=np.float64)
        if not weight.size or not np.isfinite(weight).all() or (weight < 0).any() or weight.sum() <= 0:
            raise ValueError(f"SizeMix.weight is {weight.tolist()}; accepted are numbers of at least 0, not all 0")
        used = weight > 0
        object.__setattr__(self, "input_tokens", np.asarray(self.input_tokens, dtype=np.float64)[used])
        object.__setattr__(self, "output_tokens", np.asarray(self.output_tokens, dtype=np.float64)[used])
        object.__setattr__(self, "weight", weight[used] / weight.sum())
        if self.longest_output_tokens is not None:
            longest = np.asarray(self.longest_output_tokens, dtype=np.float64)[used]
            object.__setattr__(self, "longest_output_tokens", longest)

    @property
    def scattering_output_tokens(self) -> FloatArray:
        """Answer lengths where the scatter of TPOT is concerned, shape (sizes,): the mean; half of the longest where
        only that is known; between the two where the mean is close to the longest, since then it is one of few."""
        longest = self.output_tokens if self.longest_output_tokens is None else self.longest_output_tokens
        return np.minimum(self.output_tokens, longest - _MIDDLE * self.output_tokens)


@dataclass(frozen=True)
class ReplicaCurves:
    """One replica at n = 1, 2, ... requests in flight, as far as there are places for the mix."""

    weight: FloatArray
    """Share of the arrivals, shape (sizes,)."""
    ttft_ms: FloatArray
    """Median TTFT, shape (sizes, n)."""
    ttft_spread: FloatArray
    """Scatter of TTFT (standard deviation of the logarithm), shape (sizes, n)."""
    tpot_ms: FloatArray
    """Median TPOT, shape (n,): one for all sizes."""
    tpot_spread: FloatArray
    """Scatter of TPOT, shape (sizes, n)."""
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
    return combined(found, mix, standard_errors=standard_errors, most_requests_per_second=most_requests_per_second)


def combined(
    found: Prediction,
    mix: SizeMix,
    *,
    standard_errors: float = 1.0,
    most_requests_per_second: float = np.inf,
    dispersion: float = 1.0,
) -> ReplicaCurves:
    """The same out of a model's answers for every size of the mix at 1, 2, ... requests, shape (sizes, n).

    `dispersion`: index of dispersion of what arrives at one replica; 1 for Poisson.
    """
    most_concurrency = found.ttft_ms.shape[1]
    concurrency = np.arange(1.0, most_concurrency + 1)
    known = found.known & np.isfinite(found.ttft_ms)
    alone = np.where(known.all(axis=1), most_concurrency, np.argmin(known, axis=1))
    if not alone.all():
        none = np.zeros((len(mix.weight), 0))
        return ReplicaCurves(mix.weight, none, none, none[0], none, none[0])
    last = np.minimum(concurrency, alone[:, None]).astype(int) - 1
    beyond = concurrency / (last + 1)
    ttft_s, tpot_s, ttft_spread, tpot_spread, ttft_error, tpot_error = (
        np.take_along_axis(np.broadcast_to(part, known.shape), last, axis=1)
        for part in (
            found.ttft_ms,
            found.tpot_ms,
            found.ttft_spread,
            found.tpot_spread,
            found.ttft_error,
            found.tpot_error,
        )
    )
    ttft_s = ttft_s * beyond * (1 + standard_errors * ttft_error)
    tpot_s = tpot_s * beyond * (1 + standard_errors * tpot_error)
    share = mix.weight[:, None]
    ttft = ttft_s[:, :1] + (share * (ttft_s - ttft_s[:, :1])).sum(axis=0)
    further = np.maximum(mix.output_tokens[:, None] - 1, 0)
    tpot = (share * tpot_s).sum(axis=0)
    for _ in range(_ROUNDS if len(mix.weight) > 1 else 0):
        staying = share * (ttft + further * tpot)
        tpot = (staying * tpot_s).sum(axis=0) / staying.sum(axis=0)
    staying = share * (ttft + further * tpot)
    mean_seconds = staying.sum(axis=0) / 1e3
    taken = (staying / staying.sum(axis=0) * concurrency / alone[:, None]).sum(axis=0)
    places = max(1, int((taken <= 1 + 1e-9).sum()))
    rate = np.minimum(concurrency / np.maximum(mean_seconds, 1e-9), most_requests_per_second)
    squares = share * ttft_s[:, :1] ** 2
    decoding_ms = mix.scattering_output_tokens[:, None] * tpot
    interrupted = dispersion * rate / 1e3 * (squares.sum(axis=0) - squares) / decoding_ms
    return ReplicaCurves(
        weight=mix.weight,
        ttft_ms=ttft[:, :places],
        ttft_spread=ttft_spread[:, :places],
        tpot_ms=tpot[:places],
        tpot_spread=np.sqrt(tpot_spread**2 + np.log1p(interrupted))[:, :places],
        requests_per_second=rate[:places],
    )
