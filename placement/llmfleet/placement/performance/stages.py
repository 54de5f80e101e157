"""Replicas that only prefill, or only decode: what either promises of the objective.

    steps of a variant --PrefillAlone--> TTFT of n prompts in one replica      --+
                       --DecodeAlone --> TPOT of n requests in one replica     --+--> VariantFigures, as of any variant

A prompt is computed by a replica of the one kind, its KV cache is copied to one of the other, which decodes the answer.
Neither waits for the other's work, which is what it is for (DistServe, arXiv 2401.09670): a prefill is not cut into
chunks between decodes, and no decode step has a prefill in it.

**Prefill.** A queue of prompts alone, first come first served: with n in the replica, the last has its first token when
all n are computed, in steps of no more than the budget of a step, each of which takes what a step takes beside the
arithmetic. The transfer follows, KV bytes of the whole prompt over the slowest link that the service's replicas have.

**Decode.** n requests in one batch, without prefills; those for which there is no memory wait for a place, and a place
is held from the start of the transfer on.

**The objective** of both together is kept where each keeps its part (`part_of`): what of the TTFT happens on the
decoding side is waiting for a place and the first step, for which twice the TPOT target is set aside; and each side may
miss for half of the requests that the percentile lets miss. What is left of the TTFT is the prefill's. By the union
bound no more requests miss than the objective lets, whatever the two have to do with each other.

**Sources.** Steps come from measured kernels or the roofline. Measured points are of engines that do both, so they
cannot say what either does alone; but nothing is promised to be faster than a request that was measured alone, nor than
what engines of the variant were seen to take longer than predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.placement.performance.closed_loop import TPOT_SPREAD, StepTimes, computed
from llmfleet.placement.performance.mixture import ReplicaCurves
from llmfleet.placement.performance.model import FloatArray, PerformanceModel, Prediction, Source, loads

Role = Literal["prefill", "decode"]
"""The stage that a replica serves; one that serves both has none."""

STEP_TOKENS = 2048
"""Prompt tokens of a step where the configuration does not say: vLLM's default on devices below 70 GiB."""
HANDED_OVER_STEPS = 2.0
"""Decode steps, at the TPOT target, that are set aside for taking a request over and its first token."""
_INSTANT_MS = 1e-3
"""TPOT of a replica that decodes nothing."""


@dataclass(frozen=True)
class Handover:
    """One stage, and how KV caches get from the first to the second."""

    role: Role
    gb_per_second: float
    """Between a replica that prefills and one that decodes, the slowest of the service's: 10^9 bytes."""
    kv_bytes_per_token: float

    def transfer_ms(self, prompt_tokens: FloatArray) -> FloatArray:
        """Of the KV cache of whole prompts."""
        return np.asarray(prompt_tokens * self.kv_bytes_per_token / (self.gb_per_second * 1e6))

    def part_of(self, objective: Objective) -> Objective:
        """What the stage has to keep, so that both together keep the objective."""
        ttft, tpot = objective.ttft, objective.tpot
        aside_ms = HANDED_OVER_STEPS * tpot.milliseconds
        left_ms = aside_ms if self.role == "decode" else max(ttft.milliseconds - aside_ms, _INSTANT_MS)
        part = LatencyTarget(percentile=(100 + ttft.percentile) / 2, milliseconds=left_ms)
        return Objective(ttft=part, tpot=tpot)


@dataclass(frozen=True)
class Steps:
    """What is known of a variant's steps."""

    times: StepTimes
    admission_ms: float
    """Tokenizing, admitting and answering one request."""
    step_tokens: int
    """Most prompt tokens of one step."""
    most_requests: int | None
    """Most requests in one step; None: as many as fit."""
    ttft_error: float
    tpot_error: float
    source: Source
    measured: PerformanceModel | None = None
    """What was measured of the variant where it serves both stages."""
    slower: tuple[float, float] = (1.0, 1.0)
    """Factors by which (TTFT, TPOT) of engines were seen to be above what is predicted, at least one."""


@dataclass(frozen=True)
class PrefillAlone:
    """A PerformanceModel of a replica that only prefills. TPOT says nothing: it is next to none."""

    steps: Steps
    handover: Handover
    prefix_share: float = 0.0
    """Of every prompt, what need not be computed."""

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """See `PerformanceModel.predict`; TTFT ends when the KV cache has arrived."""
        inputs, outputs, prompts = loads(input_tokens, output_tokens, concurrency)
        steps, times = self.steps, self.steps.times
        computed_tokens = np.maximum(1.0, inputs * (1.0 - self.prefix_share))
        ttft_ms = self._first_token_ms(prompts, computed_tokens) * steps.slower[0]
        if steps.measured is not None:
            seen = steps.measured.predict(inputs, outputs, 1.0)
            ttft_ms = ttft_ms * np.fmax(1.0, seen.ttft_ms / self._first_token_ms(np.ones_like(inputs), inputs))
        ttft_ms = np.where(times.places(inputs) < 1, np.inf, ttft_ms + self.handover.transfer_ms(inputs))
        return computed(
            ttft_ms,
            np.full_like(ttft_ms, _INSTANT_MS),
            ttft_error=steps.ttft_error,
            tpot_error=steps.tpot_error,
            source=steps.source,
        )

    def _first_token_ms(self, prompts: FloatArray, tokens: FloatArray) -> FloatArray:
        """Of the last of so many prompts, each of so many tokens that are computed."""
        times, count = self.steps.times, np.ceil(prompts * tokens / self.steps.step_tokens)
        busy_ms = prompts * times.prefill_ms(tokens) + count * times.step_ms(np.ones_like(tokens), tokens)
        return np.asarray(self.steps.admission_ms + busy_ms)


@dataclass(frozen=True)
class DecodeAlone:
    """A PerformanceModel of a replica that only decodes. TTFT is the transfer, during which a request has its place
    already, and the first step."""

    steps: Steps
    handover: Handover

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """See `PerformanceModel.predict`; NaN beyond the places that memory and configuration give."""
        inputs, outputs, running = loads(input_tokens, output_tokens, concurrency)
        steps, times = self.steps, self.steps.times
        context = inputs + outputs / 2
        places = times.places(context)
        most = places if steps.most_requests is None else np.minimum(places, steps.most_requests)
        tpot_ms = times.step_ms(running, context)
        tpot_ms = tpot_ms * steps.slower[1]
        if steps.measured is not None:
            seen = steps.measured.predict(inputs, outputs, 1.0)
            tpot_ms = tpot_ms * np.fmax(1.0, seen.tpot_ms / times.step_ms(np.ones_like(running), context))
        ttft_ms = tpot_ms + self.handover.transfer_ms(inputs)
        ttft_ms = np.where(places < 1, np.inf, ttft_ms)
        ttft_ms = np.where((running > most) & (running > 1), np.nan, ttft_ms)
        return computed(
            ttft_ms,
            tpot_ms,
            ttft_error=steps.tpot_error,
            tpot_error=steps.tpot_error,
            source=steps.source,
            ttft_spread=TPOT_SPREAD,
        )


def stage_model(steps: Steps, handover: Handover, prefix_share: float) -> PerformanceModel:
    """What predicts a replica of one stage."""
    if handover.role == "prefill":
        return PrefillAlone(steps, handover, prefix_share)
    return DecodeAlone(steps, handover)


def of_stage(curves: ReplicaCurves, handover: Handover, transfer_ms: FloatArray) -> ReplicaCurves:
    """What requests see of one stage: nothing of TPOT where only prompts are computed, and where only answers are, no
    wait for the transfer, which the other side counts. `transfer_ms`: as the curves have it, shape (sizes, 1)."""
    if handover.role == "prefill":
        return replace(curves, tpot_spread=np.zeros_like(curves.tpot_spread))
    return replace(curves, ttft_ms=np.maximum(curves.ttft_ms - transfer_ms, _INSTANT_MS))
