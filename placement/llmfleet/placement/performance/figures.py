"""What one variant of a profile is promised to do, and what its requests would then see: all that a plan reads off it.

    figures_of_variant(profile, gpu_type, tensor_parallel, ..., now, prefix_share) -> VariantFigures | None
        .column(objective)             T[bucket]: requests/s of one replica, each bucket alone
        .margin(objective, mix, ...)   share (m - reserve): what m replicas hold of a mix, in units of its linear share
        .outlook(objective, rps, ...)  TTFT, TPOT and attainment of a pool at a load
        .of_sizes(sizes)               the same where other sizes than the corners stand for the buckets

A bucket is represented by its upper corner, unless it is known how long its requests are (`workload/sizes.py`). Every
latency is taken one standard error worse than its
model says, and no rate is above the fastest that was measured at a corner, nor, in a mix, above the linear share of
these. The fleet program adds up shares, sum_b x_b / T_b <= 1, as if each bucket had a replica's time to itself; in
truth a mix decodes in one batch, and a small pool waits longer. `margin` has both in it, `outlook` judges the outcome.

Pure. Answers are remembered, as many as `_MOST_VARIANTS` and `_MOST_ANSWERS` say, by the content of what was asked and
not by name: a planner lives long, a thousand services share a few profiles, and most mixes come again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields
from functools import cached_property, partial
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

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
from llmfleet.placement.performance.mixture import MOST_CONCURRENCY, ReplicaCurves, SizeMix, combined
from llmfleet.placement.performance.model import BoolArray, FloatArray, PerformanceModel, Prediction, Source
from llmfleet.placement.performance.prefix import prefix_cached
from llmfleet.placement.performance.stages import Handover, of_stage
from llmfleet.placement.performance.throughput import straight_lines
from llmfleet.placement.performance.variant_model import stage_model_of, variant_model

T = TypeVar("T")
STANDARD_ERRORS = 1.0
"""How much worse than predicted every latency is taken."""
MOST_ARRIVALS_CV2 = 10.0
"""Burstier arrivals are planned as this: what comes in larger bursts waits, whatever the number of replicas."""

_MOST_VARIANTS = 512
_MOST_ANSWERS = 4096
_MOST_SIZES = 256
"""Of one variant; each takes twenty kilobytes."""
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


class _Known:
    """What is known of a variant at whatever sizes."""

    def __init__(self, model: PerformanceModel, buckets: Buckets, seen_rps: FloatArray) -> None:
        self.corners = np.array([buckets.edges(bucket) for bucket in range(buckets.count)], dtype=np.float64)
        self.answers = self._predicted(model, self.corners)
        self.known = np.asarray(self.answers.known[:, 0] & np.isfinite(self.answers.ttft_ms[:, 0]))
        self._model, self._seen_rps = model, seen_rps
        self.columns: Recent[FloatArray] = Recent(_MOST_ANSWERS)
        self.alone: Recent[float] = Recent(_MOST_ANSWERS)
        self.margins: Recent[Margin] = Recent(_MOST_ANSWERS)
        self.kept: Recent[bool] = Recent(_MOST_ANSWERS)
        self.outlooks: Recent[Outlook] = Recent(_MOST_ANSWERS)
        self._sizes: Recent[Prediction] = Recent(_MOST_SIZES)

    @staticmethod
    def _predicted(model: PerformanceModel, sizes: FloatArray) -> Prediction:
        return model.predict(sizes[:, :1], sizes[:, 1:], np.arange(1.0, MOST_CONCURRENCY + 1))

    def answers_at(self, buckets: NDArray[np.intp], sizes: FloatArray) -> Prediction:
        """The model's answers for sizes of these buckets, shape (buckets, n). Where it knows a corner but not a size
        below it, the corner stands for it."""
        corner = (sizes == self.corners[buckets]).all(axis=1)
        if corner.all():
            return self.answers.rows(buckets)
        rows = [
            self.answers.rows(np.array([bucket])) if at_corner else self._at(bucket, *size)
            for bucket, at_corner, size in zip(buckets.tolist(), corner.tolist(), sizes.tolist(), strict=True)
        ]
        return Prediction(*(np.concatenate([getattr(row, one.name) for row in rows]) for one in fields(Prediction)))

    def _at(self, bucket: int, input_tokens: float, output_tokens: float) -> Prediction:
        def ask() -> Prediction:
            found = self._predicted(self._model, np.array([[input_tokens, output_tokens]]))
            return found if found.known[0, 0] else self.answers.rows(np.array([bucket]))

        return self._sizes.get((bucket, input_tokens, output_tokens), ask)

    @cached_property
    def lines(self) -> LatencyCoefficients:
        """Straight lines through the medians at the corners."""
        points = []
        for bucket in np.flatnonzero(self.known).tolist():
            for n in (1, 4, 16, 64):
                ttft_ms, tpot_ms = self.answers.ttft_ms[bucket, n - 1], self.answers.tpot_ms[bucket, n - 1]
                if np.isfinite(ttft_ms) and np.isfinite(tpot_ms):
                    points.append((int(self.corners[bucket, 0]), n, float(ttft_ms), float(tpot_ms)))
        return straight_lines(points or [(1, 1, 0.0, 0.0)])

    def most_rps(self, bucket: int, input_tokens: float, output_tokens: float) -> float:
        """The most that a replica is believed to complete of one size: what was seen at its corner, more of shorter
        requests by as much as the model says."""
        seen = float(self._seen_rps[bucket])
        if not np.isfinite(seen):
            return seen
        at = np.array([bucket])
        corner, size = self.corners[at], np.array([[input_tokens, output_tokens]])
        if (corner == size).all():
            return seen
        here, there = (
            combined(self.answers_at(at, one), SizeMix(one[:, 0], one[:, 1], np.ones(1))).requests_per_second
            for one in (size, corner)
        )
        return seen * float(here.max(initial=0.0)) / float(there.max())


class VariantFigures:
    """One variant. Rates and shares by bucket have the shape (buckets,)."""

    def __init__(self, known: _Known, sizes: FloatArray, handover: Handover | None = None) -> None:
        """`sizes`: (input tokens, output tokens) that stand for each bucket, shape (buckets, 2). `handover`: of
        replicas that serve one stage only."""
        self._of, self._sizes, self.handover = known, sizes, handover

    @classmethod
    def of_model(
        cls, model: PerformanceModel, buckets: Buckets, seen_rps: FloatArray, handover: Handover | None = None
    ) -> VariantFigures:
        """At the corners. `seen_rps`: the most seen at each, infinite where nothing was (`most_measured_rps`)."""
        known = _Known(model, buckets, seen_rps)
        return cls(known, known.corners, handover)

    def of_sizes(self, sizes: FloatArray) -> VariantFigures:
        """The same variant where these sizes stand for the buckets, shape (buckets, 2); none above its corner."""
        return VariantFigures(self._of, sizes, self.handover)

    def part_of(self, objective: Objective) -> Objective:
        """What of a service's objective its replicas have to keep: all of it, or their stage's part."""
        return objective if self.handover is None else self.handover.part_of(objective)

    @property
    def known(self) -> BoolArray:
        """Buckets whose corner some model knows."""
        return self._of.known

    @property
    def prefill_ms(self) -> FloatArray:
        """Median TTFT of a request alone, by bucket, at its corner; NaN where unknown."""
        return np.asarray(self._of.answers.ttft_ms[:, 0])

    def source(self, buckets: BoolArray) -> Source:
        """Where the figures of these buckets come from, the least trusted of them; `none` where none is known."""
        present = set(self._of.answers.source[buckets & self.known, 0].tolist())
        return next((source for source in _LEAST_TRUSTED if source in present), "none")

    def column(self, objective: Objective) -> FloatArray:
        """Requests per second of one replica of a large pool, each bucket alone; 0 where it never keeps both."""
        return self._of.columns.get(
            (_asked(objective), self._sizes.tobytes()),
            lambda: self._each(lambda alone: large_pool_rps(alone, self.part_of(objective)), _asked(objective)),
        )

    def busiest(self) -> FloatArray:
        """Requests per second of one replica, each bucket alone, whatever becomes of latency; 0 where unknown."""
        return self._of.columns.get(
            ("busiest", self._sizes.tobytes()),
            lambda: self._each(lambda alone: float(alone.requests_per_second.max(initial=0.0)), "busiest"),
        )

    def _each(self, answer: Callable[[ReplicaCurves], float], asked: Hashable) -> FloatArray:
        """An answer about each bucket alone, 0 where it is unknown."""
        found = np.zeros(len(self._sizes))
        for bucket in np.flatnonzero(self.known).tolist():
            slot = (asked, bucket, *self._sizes[bucket].tolist())
            found[bucket] = self._of.alone.get(slot, partial(lambda b: answer(self._alone(b)), bucket))
        return found

    def _alone(self, bucket: int) -> ReplicaCurves:
        """A replica with requests of one bucket only."""
        only = np.zeros(len(self._sizes))
        only[bucket] = 1.0
        return self._curves(only, self._of.most_rps(bucket, *self._sizes[bucket].tolist()))

    def best(self, objective: Objective) -> tuple[FloatArray, FloatArray]:
        """(TTFT, TPOT) of a request alone at the objective's percentiles, in ms; infinite where unknown. Rounded up to
        four digits: an objective of so much is kept."""
        ttft_ms, tpot_ms = np.full(len(self._sizes), np.inf), np.full(len(self._sizes), np.inf)
        for bucket in np.flatnonzero(self.known).tolist():
            alone = outlook(self._alone(bucket), self.part_of(objective), 0.0, replicas=1, arrivals_cv2=0.0)
            ttft_ms[bucket], tpot_ms[bucket] = _rounded_up(alone.ttft_ms), _rounded_up(alone.tpot_ms)
        return ttft_ms, tpot_ms

    @property
    def lines(self) -> LatencyCoefficients:
        """Straight lines through the medians, as they are fitted to measured points."""
        return self._of.lines

    def loads(self, objective: Objective) -> FloatArray:
        """Replica-seconds that a request of each bucket takes as the fleet program adds them up; infinite where nothing
        is known. Where the objective is never kept, a replica at its fullest: such requests take their share too."""
        column = self.column(objective)
        rps = column if (column > 0).all() else np.where(column > 0, column, self.busiest())
        return np.asarray(np.divide(1.0, rps, out=np.full(len(rps), np.inf), where=rps > 0))

    def linear_rps(self, objective: Objective, mix: FloatArray) -> float:
        """What one replica does of a mix as the fleet program adds it up. `mix`: any scale, known buckets only."""
        used = mix > 0
        return float(mix.sum() / (mix[used] * self.loads(objective)[used]).sum())

    def margin(self, objective: Objective, mix: FloatArray, *, replicas: int, arrivals_cv2: float) -> Margin:
        """What replicas hold of a mix, in units of `linear_rps`; exact for one and for `replicas` of them."""
        arrivals_cv2 = min(arrivals_cv2, MOST_ARRIVALS_CV2)

        def ask() -> Margin:
            rps = self.linear_rps(objective, mix)
            expected = max(2, replicas)
            alone, together = (self._curves(mix, rps, dispersion_of(arrivals_cv2, n)) for n in (1, expected))
            part = self.part_of(objective)
            return pool_margin(alone, together, part, rps=rps, expected=expected, arrivals_cv2=arrivals_cv2)

        return self._of.margins.get((_asked(objective), *self._mixed(mix), replicas, arrivals_cv2), ask)

    def outlook(self, objective: Objective, rps: FloatArray, *, replicas: int, arrivals_cv2: float) -> Outlook:
        """What requests see where a pool is given these rates, by bucket; not all of them 0."""
        arrivals_cv2 = min(arrivals_cv2, MOST_ARRIVALS_CV2)

        def ask() -> Outlook:
            dispersion = dispersion_of(arrivals_cv2, replicas)
            curves = self._curves(rps, self.linear_rps(objective, rps), dispersion)
            part, given = self.part_of(objective), float(rps.sum())
            return outlook(curves, part, given, replicas=replicas, arrivals_cv2=arrivals_cv2)

        return self._of.outlooks.get((_asked(objective), *self._mixed(rps), replicas, arrivals_cv2), ask)

    def keeps(
        self, objective: Objective, rps: FloatArray, *, replicas: int, arrivals_cv2: float, slack: float = 0.0
    ) -> bool:
        """Whether what `outlook` answers keeps the objective, up to `slack` of the requests."""
        arrivals_cv2 = min(arrivals_cv2, MOST_ARRIVALS_CV2)

        def ask() -> bool:
            dispersion = dispersion_of(arrivals_cv2, replicas)
            curves = self._curves(rps, self.linear_rps(objective, rps), dispersion)
            part, given = self.part_of(objective), float(rps.sum())
            return keeps(curves, part, given, replicas=replicas, arrivals_cv2=arrivals_cv2, slack=slack)

        return self._of.kept.get((_asked(objective), *self._mixed(rps), replicas, arrivals_cv2, slack), ask)

    def _mixed(self, mix: FloatArray) -> tuple[bytes, bytes]:
        """What tells a mix of sizes from others."""
        return mix.tobytes(), self._sizes[mix > 0].tobytes()

    def _curves(self, mix: FloatArray, most_rps: float, dispersion: float = 1.0) -> ReplicaCurves:
        used = np.flatnonzero(mix > 0)
        sizes = self._sizes[used]
        answers = self._of.answers_at(used, sizes)
        curves = combined(
            answers,
            SizeMix(sizes[:, 0], sizes[:, 1], mix[used], self._of.corners[used, 1]),
            standard_errors=STANDARD_ERRORS,
            most_requests_per_second=most_rps,
            dispersion=dispersion,
        )
        if self.handover is None or not curves.places:
            return curves
        worse = 1 + STANDARD_ERRORS * answers.ttft_error[:, :1]
        return of_stage(curves, self.handover, worse * self.handover.transfer_ms(sizes[:, :1]))


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
    profile: ModelProfile,
    gpu_type: GPUType,
    tensor_parallel: int,
    pipeline_parallel: int = 1,
    *,
    now: float,
    prefix_share: float = 0.0,
    handover: Handover | None = None,
) -> VariantFigures | None:
    """The figures of one variant, None where no model knows anything of it. `profile`: as the variant's configuration
    runs it; `now`: seconds since 1970; `prefix_share`: of every prompt, what the prefix cache holds; `handover`: where
    its replicas serve one stage only."""
    spec = profile.spec
    layout = (gpu_type.metadata.name, tensor_parallel, pipeline_parallel)
    measurement = next(
        (one for one in spec.measurements if (one.gpu_type, one.tensor_parallel, one.pipeline_parallel) == layout),
        None,
    )
    corrections = [one for one in profile.status.corrections if one.gpu_type == gpu_type.metadata.name]
    present = now if corrections else 0.0
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
        tuple((one.max_num_seqs, one.max_num_batched_tokens, one.speculative_config) for one in spec.configurations),
        present,
        prefix_share,
        handover,
    )

    def one_stage(handover: Handover) -> VariantFigures | None:
        model = None
        if pipeline_parallel == 1:
            model = stage_model_of(profile, gpu_type, tensor_parallel, handover, now=present, prefix_share=prefix_share)
        free = np.full(spec.buckets.count, np.inf)
        return None if model is None else VariantFigures.of_model(model, spec.buckets, free, handover)

    def ask() -> VariantFigures | None:
        if handover is not None:
            return one_stage(handover)
        model = variant_model(profile, gpu_type, tensor_parallel, pipeline_parallel, now=present)
        if model is None:
            return None
        seen, cached = most_measured_rps(measurement, spec.buckets), prefix_cached(model, prefix_share)
        if cached is not model:
            # Seen was what whole prompts allow; of shorter ones there are more, by as much as the model says.
            free = np.full(spec.buckets.count, np.inf)
            more, as_seen = (VariantFigures.of_model(one, spec.buckets, free).busiest() for one in (cached, model))
            seen = seen * np.divide(more, as_seen, out=np.ones_like(more), where=as_seen > 0)
        return VariantFigures.of_model(cached, spec.buckets, seen)

    return _VARIANTS.get(slot, ask)


def _asked(objective: Objective) -> tuple[float, float, float, float]:
    ttft, tpot = objective.ttft, objective.tpot
    return ttft.percentile, ttft.milliseconds, tpot.percentile, tpot.milliseconds


def _rounded_up(milliseconds: float) -> float:
    if not np.isfinite(milliseconds) or milliseconds <= 0:
        return milliseconds
    unit = 10.0 ** (np.floor(np.log10(milliseconds)) - 3)
    return float(np.ceil(milliseconds / unit * (1 + 1e-6)) * unit)
