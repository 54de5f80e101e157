"""What replicas may be given, round by round: from what one could do alone to what the plan's pools will hold.

    guessed(prepared)                        before anything is planned
    around(prepared, margins, planned)       what a plan that is in force has shown
    judged(prepared, margins, x, replicas)   after a solve: the pools that are short, and those with one too many

The fleet program is linear: a pool of m replicas of a variant holds share (m - reserve) replicas' worth of the
throughput table. The truth (`performance/capacity.py`) is curved, and depends on the mix that the plan routes to the
variant, which is not known before there is a plan. So the program is given a line, solved, and each pool of the outcome
is judged by the model itself, at the mix and the number of replicas that it got. A pool that would miss the objective
gets the line through its true capacity there, and the fleet is solved again; so does, in the first rounds, one that
would keep it with a replica less. Later lines only fall, so that it ends. What is short even then is routed no more
than it holds, and the rest is unserved and said so: no plan promises what its model denies.

A pool may be too small for any load (bursts drown a replica or two); then it is asked for again as large as its load
takes. A mix that no number of replicas keeps (long prompts interrupt short answers for too long) is parted: the variant
no longer gets the prompts with the longest prefills, as many of them as it takes.

**Prompts are routed, not sizes.** How long an answer will be, nobody knows when its request comes. So requests of one
input bucket cannot be told apart: wherever some of them go, all their answers go alike. What a replica does of an
input bucket i is the harmonic mean over its answers, weighted by how often they are asked for,

    1 / T[i, v] = sum_o P(o | i) / T[(i, o), v]

and the program knows nothing finer: what it routes and what arrives is the same mix. A variant that misses the
objective for answers that are more than a rare few (`_RARE` of what the percentile allows) gets none of that input
bucket; the rare few go along, also those that nobody keeps it for, and count as missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llmfleet.api import Buckets, ServicePlan
from llmfleet.placement.checks import Prepared
from llmfleet.placement.performance import BoolArray, FloatArray
from llmfleet.placement.performance.capacity import Margin
from llmfleet.placement.service_program import Replicas
from llmfleet.placement.solver.stages import has_way

SLACK = 1e-6
"""Share of the requests by which a promise may be missed: rounding."""
_MIX_PARTS = 16
_MOST_EXPECTED = 4096
_LEAST_SHARE = 0.05
_PROGRESS = 0.97
FIRST_SOLVES = 4
"""Solves in which a service's lines may rise, while nothing else is asked of it."""
_NEARLY = 0.1
"""Requests that may differ, as a share of the demand, for what was learnt at one to be worth trying at the other."""
_DOUBLINGS = 5
_RARE = 0.5


@dataclass(frozen=True)
class Margins:
    """Of one service. A variant's arrays have the shape (variants,)."""

    share: FloatArray
    """Capacity, in replicas' worth of the throughput table, that a further replica brings."""
    reserve: FloatArray
    """Replicas' worth that a variant in use loses once, 0 to 1."""
    closed: BoolArray
    """Sizes that a variant is kept out of, shape (buckets, variants): all those of an input bucket, or those that no
    variant gets."""
    table: FloatArray
    """The throughput of what is not closed, shape (buckets, variants): where there is demand, that of all of its input
    bucket together. Not to be written into."""
    utilization: float
    """Share of all this that is planned for."""

    def at(self, prepared: Prepared) -> Margins:
        """The same for a service whose demand is another."""
        return replace(self, table=table_of(prepared, self.closed))

    def without(self, prepared: Prepared, buckets: slice, v: int) -> Margins:
        """With a variant kept out of these buckets of the profile as well."""
        closed = self.closed.copy()
        closed[buckets, v] = True
        return replace(self, closed=closed, table=table_of(prepared, closed))

    def with_line(self, v: int, line: Margin) -> Margins:
        """With another line for one variant."""
        share, reserve = self.share.copy(), self.reserve.copy()
        share[v], reserve[v] = line.share, line.reserve
        return replace(self, share=share, reserve=reserve)

    def holds(self, v: int, replicas: int) -> float:
        """What so many replicas of a variant hold, in replicas' worth of the throughput table."""
        return Margin(float(self.share[v]), float(self.reserve[v])).holds(replicas)


@dataclass(frozen=True)
class Learnt:
    """The margins with which a solve of a service ended: where the next one begins, if it is asked nearly the same.

    A solve that began from guesses again would try what has been found too good already, round after round.
    """

    begun: Prepared
    """The service as it was when its margins were guessed."""
    ended: Prepared
    """As it was when the solve ended."""
    margins: Margins
    """What the solve ended with."""
    replicas: dict[str, int]
    """By variant, what the solve ended with."""
    solves: int
    """In a row that were asked for this very demand."""
    target: float
    """Share of what replicas hold that new plans were to use."""

    def repeats(self, prepared: Prepared, planned: ServicePlan, target: float) -> bool:
        """Whether a solve goes on where the last one ended: nothing is asked of the service that was not asked then,
        and what was decided is in force. The first solves still find cheaper mixes: their lines may rise again."""
        return (
            self.solves >= FIRST_SOLVES
            and self.target == target
            and self.is_for(prepared)
            and planned.replicas == self.replicas
            and planned.buckets == prepared.buckets
        )

    def margins_for(self, prepared: Prepared) -> Margins:
        """The margins at what is asked now."""
        return self.margins if prepared is self.ended else self.margins.at(prepared)

    def is_for(self, prepared: Prepared) -> bool:
        """Whether it was learnt at this very demand."""
        return np.array_equal(prepared.demand.rps, self.ended.demand.rps)

    def holds_for(self, prepared: Prepared) -> bool:
        """Whether the service is still promised the same by the same variants, at nearly the same demand."""
        begun = self.begun
        return (
            begun.service.spec == prepared.service.spec
            and [variant.name for variant in begun.variants] == [variant.name for variant in prepared.variants]
            and np.array_equal(begun.throughput, prepared.throughput)
            and float(np.abs(prepared.demand.rps - begun.demand.rps).sum()) <= _NEARLY * float(begun.demand.rps.sum())
        )


@dataclass(frozen=True)
class Judged:
    """One variant's pool of a plan."""

    variant: int
    """Index of the variant."""
    rps: FloatArray
    """What it is given, by bucket of the profile."""
    replicas: int
    """How many it has."""
    short: bool
    """Whether they miss the objective."""
    tight: bool
    """Whether they would miss it with the planned headroom used up."""
    lavish: bool
    """Whether they would keep it, with the planned headroom, on a replica less, though the program says otherwise."""


def table_of(prepared: Prepared, closed: BoolArray) -> FloatArray:
    """What `Margins.table` is where these sizes are closed, shape (buckets, variants)."""
    alone = np.where(closed, 0.0, prepared.throughput)
    rps = np.where(closed.all(axis=1), 0.0, prepared.demand.rps)[:, None]
    load = np.zeros_like(alone)
    for v, variant in enumerate(prepared.variants):
        used = rps[:, 0] > 0
        load[used, v] = rps[used, 0] * variant.figures.loads(prepared.objective)[used]
    load = by_input(prepared.buckets, np.where(closed & (rps > 0), np.inf, load))
    possible = np.isfinite(load) & (load > 0)
    together = np.divide(by_input(prepared.buckets, rps), load, out=np.zeros_like(load), where=possible)
    return np.where(prepared.demand.rps[:, None] > 0, np.where(closed, 0.0, together), alone)


def by_input(buckets: Buckets, values: FloatArray) -> FloatArray:
    """The sum over each input bucket's answers, at every one of them. `values`: shape (buckets, columns)."""
    answers = len(buckets.output_tokens)
    sums = values.reshape(-1, answers, values.shape[1]).sum(axis=1)
    return np.repeat(sums, answers, axis=0)


def never_kept(prepared: Prepared) -> BoolArray:
    """Sizes that variants are kept out of before anything is planned, shape (buckets, variants).

    A variant that misses the objective for more than a rare few requests of an input bucket is kept out of all of it.
    Where that would leave an input bucket to nobody, it is opened to those who serve the most of it, and the sizes that
    they miss are closed to all, unless these are a rare few of all the service's requests: then they go along.
    """
    objective = prepared.objective
    strictest = max(objective.ttft.percentile, objective.tpot.percentile)
    most = _RARE * (1 - strictest / 100)
    kept = prepared.throughput > 0
    rps = prepared.demand.rps[:, None]
    total = by_input(prepared.buckets, rps)
    missed = by_input(prepared.buckets, np.where(kept, 0.0, rps))
    unknown = by_input(prepared.buckets, np.where(prepared.known, 0.0, rps)) > 0
    closed = (total > 0) & ((missed > most * total) | unknown)
    answers = len(prepared.buckets.output_tokens)
    whole = [variant.role is None for variant in prepared.variants]
    for first in range(0, len(closed), answers) if any(whole) else ():
        asked = first + np.flatnonzero(rps[first : first + answers, 0] > 0)
        if asked.size and not has_way(~closed[asked], prepared.stage).any():
            best = int(np.where(whole, missed[first], np.inf).argmin())
            served = asked[kept[asked, best]]
            closed[asked] = True
            closed[served] = ~kept[served].all(axis=0)
    if any(whole):
        _open_rare_few(prepared, closed, most * float(rps.sum()))
    return np.asarray(closed)


def _open_rare_few(prepared: Prepared, closed: BoolArray, most_rps: float) -> None:
    """Opens sizes that are closed to all, those of the rarest input buckets first and `most_rps` requests per second of
    them at most, to the variants that get the other sizes of their input bucket, or to all that know them."""
    rps, answers = prepared.demand.rps, len(prepared.buckets.output_tokens)
    to_nobody = closed.all(axis=1) & (rps > 0)
    left = [first + np.flatnonzero(to_nobody[first : first + answers]) for first in range(0, len(closed), answers)]
    for sizes in sorted((some for some in left if some.size), key=lambda some: (float(rps[some].sum()), int(some[0]))):
        most_rps -= float(rps[sizes].sum())
        if most_rps < 0:
            return
        first = int(sizes[0]) // answers * answers
        others = first + np.flatnonzero((rps[first : first + answers] > 0) & ~to_nobody[first : first + answers])
        opened = prepared.known[sizes].all(axis=0) & ~closed[others].any(axis=0)
        closed[sizes] = ~opened


def guessed(prepared: Prepared, utilization: float, *, of_all: bool = True) -> Margins:
    """For each variant alone: as many replicas as it would take, of all requests that it serves, or all of them of the
    size that loads it most."""
    buckets, variants = prepared.throughput.shape
    share, reserve = np.ones(variants), np.zeros(variants)
    for v, variant in enumerate(prepared.variants):
        column = prepared.throughput[:, v]
        load = np.divide(prepared.demand.rps, column, out=np.zeros(buckets), where=column > 0)
        total = float(load.sum())
        if total <= 0:
            continue
        mix = np.where(load > 0 if of_all else np.arange(buckets) == load.argmax(), prepared.demand.rps, 0.0)
        expected = min(_MOST_EXPECTED, 1 << max(0, int(np.ceil(np.log2(max(total, 1.0))))))
        line = variant.figures.margin(prepared.objective, mix, replicas=expected, arrivals_cv2=prepared.arrivals_cv2)
        if line.share >= _LEAST_SHARE:  # else all of that, in such bursts, says nothing about what it will get
            share[v], reserve[v] = line.share, line.reserve
    closed = never_kept(prepared)
    return Margins(share, reserve, closed, table_of(prepared, closed), utilization)


def around(prepared: Prepared, margins: Margins, planned: ServicePlan) -> Margins:
    """With the lines of the pools of a plan, at the mix that its routes make of the present demand."""
    if planned.buckets != prepared.buckets:
        return margins
    return through(prepared, margins, shares_of(prepared, planned), replicas_of(prepared, planned))


def shares_of(prepared: Prepared, planned: ServicePlan) -> FloatArray:
    """The routes of a plan with the service's own buckets, shape (buckets, variants)."""
    names = [variant.name for variant in prepared.variants]
    x = np.zeros(prepared.throughput.shape)
    for route in planned.routes:
        if route.variant in names:
            x[route.bucket, names.index(route.variant)] = route.fraction
    return x


def replicas_of(prepared: Prepared, planned: ServicePlan) -> Replicas:
    """A plan's replicas of the variants that there are."""
    return tuple(planned.replicas.get(variant.name, 0) for variant in prepared.variants)


def through(prepared: Prepared, margins: Margins, x: FloatArray, replicas: Replicas) -> Margins:
    """With the lines through the pools of these replicas. `x`: shares by (bucket of the profile, variant), NaN without
    demand."""
    table = margins.table
    for v, (variant, count) in enumerate(zip(prepared.variants, replicas, strict=True)):
        rps = np.where(table[:, v] > 0, prepared.demand.rps * np.nan_to_num(x[:, v]), 0.0)
        if not count or not rps.any():
            continue
        mix, cv2 = _coarse(rps), prepared.arrivals_cv2
        line = variant.figures.margin(prepared.objective, mix, replicas=count, arrivals_cv2=cv2)
        if line.share >= _LEAST_SHARE:
            margins = margins.with_line(v, line)
    return margins


def judged(prepared: Prepared, margins: Margins, x: FloatArray, replicas: Replicas) -> Iterator[Judged]:
    """The pools that get requests. `x`: shares by (bucket of the profile, variant), NaN without demand."""
    table = margins.table
    for v, count in enumerate(replicas):
        rps = prepared.demand.rps * np.nan_to_num(x[:, v])
        if count == 0 or not rps.any():
            continue
        figures, objective = prepared.variants[v].figures, prepared.objective
        cv2 = prepared.arrivals_cv2
        load = float((rps[rps > 0] / table[rps > 0, v]).sum())
        at_most = rps / margins.utilization
        tight = not figures.keeps(objective, at_most, replicas=count, arrivals_cv2=cv2, slack=SLACK)
        short = tight and not figures.keeps(objective, rps, replicas=count, arrivals_cv2=cv2, slack=SLACK)
        lavish = count > 1 and load > margins.utilization * margins.holds(v, count - 1) * (1 + 1e-6)
        lavish = lavish and figures.keeps(objective, at_most, replicas=count - 1, arrivals_cv2=cv2)
        yield Judged(v, rps, count, short, tight, lavish)


def corrected(prepared: Prepared, margins: Margins, pool: Judged, *, only_down: bool) -> Margins:
    """The margins after a pool was found short, tight or lavish. `only_down`: no line rises any more."""
    v, figures = pool.variant, prepared.variants[pool.variant].figures
    mix = pool.rps.copy()
    line = _line(prepared, pool, mix)
    if line.share < _LEAST_SHARE and (larger := _larger(prepared, margins, pool)) is not None:
        return margins.with_line(v, larger)
    while line.share < _LEAST_SHARE and mix.any():
        longest = int(np.where(mix > 0, figures.prefill_ms, -1.0).argmax())
        answers = len(prepared.buckets.output_tokens)
        alike = slice(longest // answers * answers, (longest // answers + 1) * answers)
        mix[alike] = 0.0
        margins = margins.without(prepared, alike, v)
        line = _line(prepared, pool, mix) if mix.any() else line
    if (mix != pool.rps).any():
        return margins.with_line(v, line) if mix.any() else margins
    before = margins.holds(v, pool.replicas)
    if not pool.lavish and line.holds(pool.replicas) > _PROGRESS * before:
        line = Margin(line.share * min(1.0, _PROGRESS * before / line.holds(pool.replicas)), line.reserve)
    if only_down:
        line = Margin(min(line.share, float(margins.share[v])), max(line.reserve, float(margins.reserve[v])))
    return margins.with_line(v, line)


def _line(prepared: Prepared, pool: Judged, mix: FloatArray) -> Margin:
    """The line of a pool at some mix."""
    figures = prepared.variants[pool.variant].figures
    return figures.margin(prepared.objective, mix, replicas=pool.replicas, arrivals_cv2=prepared.arrivals_cv2)


def _larger(prepared: Prepared, margins: Margins, pool: Judged) -> Margin | None:
    """The line by which a pool that holds next to nothing becomes one that holds its load, if any number of replicas
    does: the larger a pool, the less a burst is to each of them."""
    at_most = pool.rps / margins.utilization
    count = fewest(prepared, pool, at_most, pool.replicas << _DOUBLINGS)
    if count is None:
        return None
    load = float(at_most.sum()) / prepared.variants[pool.variant].figures.linear_rps(prepared.objective, pool.rps)
    return Margin(load / (count - 1), 1.0)


def fewest(prepared: Prepared, pool: Judged, rps: FloatArray, most: int) -> int | None:
    """The fewest replicas, more than a short pool has, with which it keeps the objective at these rates by bucket; None
    where `most` do not."""
    figures = prepared.variants[pool.variant].figures

    def keeps(count: int) -> bool:
        return figures.keeps(prepared.objective, rps, replicas=count, arrivals_cv2=prepared.arrivals_cv2)

    low, step = pool.replicas, 1
    while low < most and not keeps(min(low + step, most)):
        low, step = min(low + step, most), 2 * step
    if low >= most:
        return None
    high = min(low + step, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def held_share(prepared: Prepared, pool: Judged) -> float:
    """The share of what a short pool is given that it can be given."""
    figures = prepared.variants[pool.variant].figures
    line = _line(prepared, pool, pool.rps)
    held = line.holds(pool.replicas) * figures.linear_rps(prepared.objective, pool.rps)
    return max(0.0, min(1.0, held / float(pool.rps.sum()) * (1 - 1e-9)))


def _coarse(rps: FloatArray) -> FloatArray:
    """The mix in whole parts, so that much the same mixes are asked about once."""
    parts = np.round(rps / rps.sum() * _MIX_PARTS)
    return np.asarray(parts if parts.any() else rps == rps.max(), dtype=np.float64)
