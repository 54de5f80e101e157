"""Buckets that are served in two stages: by one variant as a whole, or by one of the first stage and one of the second.

    stage[v]        WHOLE, FIRST or SECOND; None for a service all of whose variants serve requests as a whole
    x[b,v]          share of bucket b that passes v; every request passes a whole, or a first and a second

    sum over wholes and firsts  of x[b,v] + u[b] = 1
    sum over wholes and seconds of x[b,v] + u[b] = 1          so what firsts hand over is what seconds take

Any first may hand to any second, so pairs need no columns: a flow with these sums falls apart into pairs. With prices
a, c of the two rows the dual has a + c <= weight and a + c <= w load of a whole, a <= w load of a first, c <= w load of
a second. Its best value at given w >= 0 is in closed form, as with one stage:

    D(w) = sum_b min(weight[b], min_whole w load, min_first w load + min_second w load)

A sum of two minima stands where a minimum stood, and everything that only needs D(w) (cuts, bounds, the relaxation)
is as exact as before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WHOLE, FIRST, SECOND = 0, 1, 2

Stage = npt.NDArray[np.int_]
"""By variant, which stage it serves, shape (variants,)."""


def rows_of(stage: Stage | None, variants: int) -> npt.NDArray[np.bool_]:
    """Of every row that a bucket has, the variants in it, shape (rows, variants); one row where there are no stages."""
    if stage is None:
        return np.ones((1, variants), dtype=np.bool_)
    return np.stack([stage != SECOND, stage != FIRST])


def cheapest_way(each: npt.NDArray[np.float64], stage: Stage | None) -> npt.NDArray[np.float64]:
    """The least of a price over the ways to be served. `each`: shape (..., variants); infinite where it cannot be."""
    if stage is None:
        least: npt.NDArray[np.float64] = each.min(axis=-1)
        return least
    whole, first, second = (each[..., stage == one].min(axis=-1, initial=np.inf) for one in (WHOLE, FIRST, SECOND))
    cheapest: npt.NDArray[np.float64] = np.minimum(whole, first + second)
    return cheapest


def has_way(possible: npt.NDArray[np.bool_], stage: Stage | None) -> npt.NDArray[np.bool_]:
    """Whether there is a way at all. `possible`: whether a variant can serve its part, shape (..., variants)."""
    if stage is None:
        return np.asarray(possible.any(axis=-1))
    ways: npt.NDArray[np.bool_] = np.isfinite(cheapest_way(np.where(possible, 0.0, np.inf), stage))
    return ways


def cheapest_load(
    each: npt.NDArray[np.float64], load: npt.NDArray[np.float64], stage: Stage
) -> npt.NDArray[np.float64]:
    """What the cheapest way of every bucket loads its variants with, shape (buckets, variants), like its arguments."""
    part: npt.NDArray[np.float64] = np.zeros_like(load)
    buckets = np.arange(len(each))
    as_whole = each[:, stage == WHOLE].min(axis=1, initial=np.inf) <= cheapest_way(each, stage)
    for one in (WHOLE, FIRST, SECOND):
        mine = np.flatnonzero(stage == one)
        here = buckets[as_whole == (one == WHOLE)]
        if len(mine):
            best = mine[each[np.ix_(here, mine)].argmin(axis=1)]
            part[here, best] = load[here, best]
    return part


def served_share(x: npt.NDArray[np.float64], stage: Stage | None) -> npt.NDArray[np.float64]:
    """The share of every bucket that is served, shape (...,) for x of shape (..., variants)."""
    share: npt.NDArray[np.float64] = (x if stage is None else x[..., stage != SECOND]).sum(axis=-1)
    return share


def in_step(x: npt.NDArray[np.float64], stage: Stage | None) -> npt.NDArray[np.float64]:
    """x with no more handed over than is taken, nor taken than is handed over."""
    if stage is None:
        return x
    first, second = x[..., stage == FIRST].sum(axis=-1), x[..., stage == SECOND].sum(axis=-1)
    both = np.minimum(first, second)
    even = x.copy()
    for one, total in ((FIRST, first), (SECOND, second)):
        scale = np.divide(both, total, out=np.zeros_like(total), where=total > 0)
        even[..., stage == one] *= scale[..., None]
    return even
