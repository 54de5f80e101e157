"""What one variant of a profile is promised to do, and what its requests would then see: all that a plan reads off it.

    figures_of_variant(profile, gpu_type, tensor_parallel, pipeline_parallel, now) -> VariantFigures | None
        .column(objective)             T[bucket]: requests/s of one replica, each bucket alone
        .margin(objective, mix, ...)   share (m - reserve): what m replicas hold of a mix, in units of its linear share
        .outlook(objective, rps, ...)  TTFT, TPOT and attainment of a pool at a load

A bucket is represented by its upper corner, as everywhere. Every latency is taken one standard error worse than its
model says, and no rate is above the fastest that was measured at a corner, nor, in a mix, above the linear share of
these. The fleet program adds up shares, sum_b x_b / T_b <= 1, as if each bucket had a replica's time to itself; in
truth a mix decodes in one batch, and a small pool waits longer. `margin` has both in it, `outlook` judges the outcome.

Pure. Answers are remembered, as many as `_MOST_VARIANTS` and `_MOST_ANSWERS` say, by the content of what was asked and
not by name: a planner lives long, a thousand services share a few profiles, and most mixes come again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import numpy as np

from llmfleet.api import Buckets, GPUType, LatencyCoefficients, Measurement, ModelProfile
from llmfleet.api.llmservice import Objective
from llmfleet.placement.performance.capacity import (
    Margin,
    Outlook,
    dispersion_of,
    keeps,
    large_pool_rps,
    outlook,
    pool_margin,
)
from llmfleet.placement.performance.correction import AGED_EVERY_SECONDS
from llmfleet.placement.performance.mixture import MOST_CONCURRENCY, ReplicaCurves, SizeMix, combined
from llmfleet.placement.performance.model import BoolArray, FloatArray, PerformanceModel, Source
from llmfleet.placement.performance.throughput import straight_lines
from llmfleet.placement.performance.variant_model import variant_model

T = TypeVar("T")
STANDARD_ERRORS = 1.0
"""How much worse than predicted every latency is taken."""
MOST_ARRIVALS_CV2 = 10.0
"""Burstier arrivals are planned as this: what comes in larger bursts waits, whatever the number of replicas."""

_MOST_VARIANTS = 512
_MOST_ANSWERS = 4096
_LEAST_TRUSTED: tuple[Source, ...] = ("roofline", "prior", "measured")


class Recent(Generic[T]):
    """The answers asked for last, no more than `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, slot: Hashable, answer: Callable[[], T]) -> T:
        """The answer in this slot, asked for where it is not known."""
        if slot in self._known:
            self._known.move_to_end(slot)
            return self._known[slot]
        found = self._known[slot] = answer()
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        return found


class VariantFigures:
    """One variant. Rates and shares by bucket have the shape (buckets,)."""

    def __init__(self, model: PerformanceModel, buckets: Buckets, seen_rps: FloatArray) -> None:
        """`seen_rps`: the most seen at each corner, infinite where nothing was (`most_measured_rps`)."""
        corners = np.array([buckets.edges(bucket) for bucket in range(buckets.count)], dtype=np.float64)
        self._inputs, self._outputs = corners[:, 0], corners[:, 1]
        self._answers = model.predict(
            self._inputs[:, None], self._outputs[:, None], np.arange(1.0, MOST_CONCURRENCY + 1)
        )
        self._seen_rps = seen_rps
        self._columns: Recent[FloatArray] = Recent(_MOST_ANSWERS)
        self._margins: Recent[Margin] = Recent(_MOST_ANSWERS)
        self._kept: Recent[bool] = Recent(_MOST_ANSWERS)
        self._outlooks: Recent[Outlook] = Recent(_MOST_ANSWERS)

    @property
    def known(self) -> BoolArray:
        """Buckets whose corner some model knows."""
        return np.asarray(self._answers.known[:, 0] & np.isfinite(self._answers.ttft_ms[:, 0]))

    @property
    def prefill_ms(self) -> FloatArray:
        """Median TTFT of a request alone, by bucket; NaN where unknown."""
        return np.asarray(self._answers.ttft_ms[:, 0])

    def source(self, buckets: BoolArray) -> Source:
        """Where the figures of these buckets come from, the least trusted of them; `none` where none is known."""
        present = set(self._answers.source[buckets & self.known, 0].tolist())
        return next((source for source in _LEAST_TRUSTED if source in present), "none")

    def column(self, objective: Objective) -> FloatArray:
        """Requests per second of one replica of a large pool, each bucket alone; 0 where it never keeps both."""

        def ask() -> FloatArray:
            found = np.zeros(len(self._inputs))
            for bucket in np.flatnonzero(self.known).tolist():
                only = np.zeros(len(found))
                only[bucket] = 1.0
                found[bucket] = large_pool_rps(self._curves(only, float(self._seen_rps[bucket])), objective)
            return found

        return self._columns.get(_asked(objective), ask)

    def best(self, objective: Objective) -> tuple[FloatArray, FloatArray]:
        """(TTFT, TPOT) of a request alone at the objective's percentiles, in ms; infinite where unknown. Rounded up to
        four digits: an objective of so much is kept."""
        ttft_ms, tpot_ms = np.full(len(self._inputs), np.inf), np.full(len(self._inputs), np.inf)
        for bucket in np.flatnonzero(self.known).tolist():
            only = np.zeros(len(ttft_ms))
            only[bucket] = 1.0
            curves = self._curves(only, float(self._seen_rps[bucket]))
            alone = outlook(curves, objective, 0.0, replicas=1, arrivals_cv2=0.0)
            ttft_ms[bucket], tpot_ms[bucket] = _rounded_up(alone.ttft_ms), _rounded_up(alone.tpot_ms)
        return ttft_ms, tpot_ms

    def lines(self) -> LatencyCoefficients:
        """Straight lines through the medians, as they are fitted to measured points."""
        points = []
        for bucket in np.flatnonzero(self.known).tolist():
            for n in (1, 4, 16, 64):
                ttft_ms, tpot_ms = self._answers.ttft_ms[bucket, n - 1], self._answers.tpot_ms[bucket, n - 1]
                if np.isfinite(ttft_ms) and np.isfinite(tpot_ms):
                    points.append((int(self._inputs[bucket]), n, float(ttft_ms), float(tpot_ms)))
        return straight_lines(points or [(1, 1, 0.0, 0.0)])

    def linear_rps(self, objective: Objective, mix: FloatArray) -> float:
        """What one replica does of a mix as the fleet program adds it up. `mix`: any scale, 0 where the column is."""
        used = mix > 0
        return float(mix.sum() / (mix[used] / self.column(objective)[used]).sum())

    def margin(self, objective: Objective, mix: FloatArray, *, replicas: int, arrivals_cv2: float) -> Margin:
        """What replicas hold of a mix, in units of `linear_rps`; exact for one and for `replicas` of them."""
        arrivals_cv2 = min(arrivals_cv2, MOST_ARRIVALS_CV2)

        def ask() -> Margin:
            rps = self.linear_rps(objective, mix)
            expected = max(2, replicas)
            alone, together = (self._curves(mix, rps, dispersion_of(arrivals_cv2, n)) for n in (1, expected))
            return pool_margin(alone, together, objective, rps=rps, expected=expected, arrivals_cv2=arrivals_cv2)

        return self._margins.get((_asked(objective), mix.tobytes(), replicas, arrivals_cv2), ask)

    def outlook(self, objective: Objective, rps: FloatArray, *, replicas: int, arrivals_cv2: float) -> Outlook:
        """What requests see where a pool is given these rates, by bucket; not all of them 0."""
        arrivals_cv2 = min(arrivals_cv2, MOST_ARRIVALS_CV2)

        def ask() -> Outlook:
            dispersion = dispersion_of(arrivals_cv2, replicas)
            curves = self._curves(rps, self.linear_rps(objective, rps), dispersion)
            return outlook(curves, objective, float(rps.sum()), replicas=replicas, arrivals_cv2=arrivals_cv2)

        return self._outlooks.get((_asked(objective), rps.tobytes(), replicas, arrivals_cv2), ask)

    def keeps(
        self, objective: Objective, rps: FloatArray, *, replicas: int, arrivals_cv2: float, slack: float = 0.0
    ) -> bool:
        """Whether what `outlook` answers keeps the objective, up to `slack` of the requests."""
        arrivals_cv2 = min(arrivals_cv2, MOST_ARRIVALS_CV2)

        def ask() -> bool:
            dispersion = dispersion_of(arrivals_cv2, replicas)
            curves = self._curves(rps, self.linear_rps(objective, rps), dispersion)
            given = float(rps.sum())
            return keeps(curves, objective, given, replicas=replicas, arrivals_cv2=arrivals_cv2, slack=slack)

        return self._kept.get((_asked(objective), rps.tobytes(), replicas, arrivals_cv2, slack), ask)

    def _curves(self, mix: FloatArray, most_rps: float, dispersion: float = 1.0) -> ReplicaCurves:
        used = np.flatnonzero(mix > 0)
        return combined(
            self._answers.rows(used),
            SizeMix(self._inputs[used], self._outputs[used], mix[used]),
            standard_errors=STANDARD_ERRORS,
            most_requests_per_second=most_rps,
            dispersion=dispersion,
        )


def most_measured_rps(measurement: Measurement | None, buckets: Buckets) -> FloatArray:
    """The most requests per second seen at each bucket's corner, shape (buckets,); infinite where nothing was."""
    most = np.zeros(buckets.count)
    bucket_of = {buckets.edges(bucket): bucket for bucket in range(buckets.count)}
    for point in [] if measurement is None else measurement.points:
        bucket = bucket_of.get((point.input_tokens, point.output_tokens))
        if bucket is not None:
            most[bucket] = max(most[bucket], point.requests_per_second)
    return np.where(most > 0, most, np.inf)


_VARIANTS: Recent[VariantFigures | None] = Recent(_MOST_VARIANTS)


def figures_of_variant(
    profile: ModelProfile, gpu_type: GPUType, tensor_parallel: int, pipeline_parallel: int = 1, *, now: float
) -> VariantFigures | None:
    """The figures of one variant, None where no model knows anything of it. `profile`: as the variant's configuration
    runs it; `now`: seconds since 1970."""
    spec = profile.spec
    layout = (gpu_type.metadata.name, tensor_parallel, pipeline_parallel)
    measurement = next(
        (one for one in spec.measurements if (one.gpu_type, one.tensor_parallel, one.pipeline_parallel) == layout),
        None,
    )
    corrections = [one for one in profile.status.corrections if one.gpu_type == gpu_type.metadata.name]
    present = now // AGED_EVERY_SECONDS * AGED_EVERY_SECONDS if corrections else 0.0
    slot = (
        "" if measurement is None else measurement.model_dump_json(),
        "" if spec.architecture is None else spec.architecture.model_dump_json(),
        tuple(sorted({one.engine for one in spec.measurements if one.gpu_type == gpu_type.metadata.name})),
        tuple(correction.model_dump_json() for correction in corrections),
        spec.model,
        tuple(spec.buckets.input_tokens),
        tuple(spec.buckets.output_tokens),
        gpu_type.metadata.name,
        gpu_type.spec.same_hardware_as,
        gpu_type.spec.memory_gib,
        "" if gpu_type.spec.hardware is None else gpu_type.spec.hardware.model_dump_json(),
        tensor_parallel,
        pipeline_parallel,
        tuple((one.max_num_seqs, one.speculative_config) for one in spec.configurations),
        present,
    )

    def ask() -> VariantFigures | None:
        model = variant_model(profile, gpu_type, tensor_parallel, pipeline_parallel, now=present)
        if model is None:
            return None
        return VariantFigures(model, spec.buckets, most_measured_rps(measurement, spec.buckets))

    return _VARIANTS.get(slot, ask)


def _asked(objective: Objective) -> tuple[float, float, float, float]:
    ttft, tpot = objective.ttft, objective.tpot
    return ttft.percentile, ttft.milliseconds, tpot.percentile, tpot.milliseconds


def _rounded_up(milliseconds: float) -> float:
    if not np.isfinite(milliseconds) or milliseconds <= 0:
        return milliseconds
    unit = 10.0 ** (np.floor(np.log10(milliseconds)) - 3)
    return float(np.ceil(milliseconds / unit * (1 + 1e-6)) * unit)
