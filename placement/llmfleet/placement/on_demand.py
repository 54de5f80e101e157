"""A fleet as if no service allowed spot or stages apart, offered beside what was found with them.

    services --without_spot--> services of on-demand variants only --solved--> Routed --with_spot--> the same, as found
                                                                                              among all variants

A service that may use spot has to survive its loss, so its plan is sought among many small pools whose lines are hard
to guess, and the plan without any spot pool may be the cheaper one. It is always allowed: nothing of it can be lost.
So it is solved by itself and offered, and to allow spot costs a new service no more than not to. The same goes for
replicas that serve one stage of a request only (`staged.py`): the plan that is offered is without these as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from llmfleet.placement.checks import Prepared
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.margins import Margins, through
from llmfleet.placement.performance import FloatArray
from llmfleet.placement.rounds import Reduced, Routed, routed_by


def without_spot(prepared: Prepared) -> Prepared:
    """The service with its on-demand variants that serve whole requests; the same object where it has no others, or
    only others."""
    kept = _on_demand(prepared)
    if kept.all() or not kept.any():
        return prepared
    return replace(
        prepared,
        variants=[variant for variant, stays in zip(prepared.variants, kept, strict=True) if stays],
        throughput=prepared.throughput[:, kept],
        known=prepared.known[:, kept],
    )


def with_spot(
    found: Sequence[Routed],
    services: Sequence[Prepared],
    guessed: Callable[[Prepared], Margins],
    reduced: Callable[[Prepared, Margins], Reduced],
    solver: FleetSolver,
) -> list[Routed]:
    """What was found for services without spot, as plans of the services as they are, in the same order. `guessed`: the
    lines of pools that nobody has; `reduced`: a service with its lines."""
    return [
        one if one.item.prepared is prepared else _among_all(one, prepared, guessed(prepared), reduced, solver)
        for one, prepared in zip(found, services, strict=True)
    ]


def _among_all(
    found: Routed,
    prepared: Prepared,
    margins: Margins,
    reduced: Callable[[Prepared, Margins], Reduced],
    solver: FleetSolver,
) -> Routed:
    kept = _on_demand(prepared)
    x: FloatArray = np.where(prepared.demand.rps[:, None] > 0, np.zeros(prepared.throughput.shape), np.nan)
    x[:, kept] = found.x
    counts = np.zeros(len(prepared.variants), dtype=np.int_)
    counts[kept] = found.replicas
    replicas = tuple(counts.tolist())
    return routed_by(reduced(prepared, through(prepared, margins, x, replicas)), replicas, x, solver)


def _on_demand(prepared: Prepared) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    plain = [one.gpu_type.spec.capacity_class != "spot" and one.role is None for one in prepared.variants]
    return np.array(plain, dtype=np.bool_)
