"""What a service has to survive, and what its replicas would do after it.

    LLMService.spec.spot, its variants --losses_of--> losses of GPU types, and the share of the demand to keep
    replicas, a loss --fallback--> where the requests would go that have to be kept, judged by the model

A spot pool is a GPUType of capacity class spot, and goes as a whole. `surviveLossOf: anyPool` asks that the demand is
served without any one of them, `maxShare` that no more than this share of it rests on all of them together, which is
the loss of all with the rest of the demand to keep. After a loss the headroom of the plan may be used up: replicas are
then given all that they hold within the objective, until the next plan.

The program knows such a loss by the same lines as the plan itself (`margins`). Here it is what the plan promises of it:
routes for the time after, each pool of which keeps the objective by the model, and what they leave unserved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from llmfleet.api import LLMService
from llmfleet.placement.checks import Prepared
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.margins import Judged, Margins, corrected, held_share, judged
from llmfleet.placement.performance import FloatArray
from llmfleet.placement.service_program import PoolLoss, Replicas, ServiceProgram
from llmfleet.placement.variants import Variant

FIELD_ANY_POOL = "spec.spot.surviveLossOf"
FIELD_SHARE = "spec.spot.maxShare"


def losses_of(service: LLMService, variants: Iterable[Variant], utilization: float) -> tuple[PoolLoss, ...]:
    """The losses that a service has to survive, in order of the types' names; the loss of all spot types last.

    `utilization`: share of what replicas hold that the program plans for.
    """
    pools = sorted({v.type_name for v in variants if v.gpu_type.spec.capacity_class == "spot"})
    spot = service.spec.spot
    if spot is None or not pools:
        return ()
    found = []
    if spot.survive_loss_of == "anyPool":
        found = [PoolLoss(frozenset({name}), 1.0, utilization, FIELD_ANY_POOL) for name in pools]
    if spot.max_share < 1:
        found.append(PoolLoss(frozenset(pools), 1 - spot.max_share, utilization, FIELD_SHARE))
    return tuple(found)


@dataclass(frozen=True)
class Fallback:
    """One service after a loss."""

    loss: PoolLoss
    x: FloatArray
    """Shares of the requests to keep, shape (buckets of the profile, variants)."""
    pools: tuple[Judged, ...]
    """The pools that get some of them."""

    def unserved(self, prepared: Prepared) -> FloatArray:
        """Requests per second to be kept that are not served, by bucket of the profile; zero where only rounding."""
        shares = 1.0 - self.x.sum(axis=1)
        return np.where(shares > 1e-6, self.loss.keep * prepared.demand.rps * shares, 0.0)


def fallback(prepared: Prepared, margins: Margins, replicas: Replicas, loss: PoolLoss, x: FloatArray) -> Fallback:
    """What replicas do after a loss, the requests to keep routed by `x`, shape (buckets of the profile, variants)."""
    left = tuple(
        0 if variant.type_name in loss.types else count
        for variant, count in zip(prepared.variants, replicas, strict=True)
    )
    # All that they hold may be used: judged without headroom.
    full = replace(margins, utilization=1.0)
    return Fallback(loss, x, tuple(judged(prepared, full, loss.keep * x, left)))


def protected_by(program: ServiceProgram, solver: FleetSolver) -> list[str]:
    """Fields that keep the service from what it would get if it had nothing to survive and devices were no object."""
    if not program.losses:
        return []
    wish = solver.relaxed(replace(program, losses=()))
    fields = {loss.field for loss in program.losses if solver.at_risk(replace(program, losses=(loss,)), wish) > 0}
    return sorted(fields)


def raised(prepared: Prepared, margins: Margins, found: Iterable[Fallback]) -> Margins:
    """The margins after pools were found that would take over with a replica less, though the program says otherwise;
    the same object where none was. The plan itself does not show it: its load is spread over what is lost as well."""
    for after in found:
        for pool in after.pools:
            if pool.lavish:
                margins = corrected(prepared, margins, pool, only_down=False)
    return margins


def lowered(prepared: Prepared, margins: Margins, found: Iterable[Fallback]) -> Margins:
    """The margins after pools were found short that would have to take over; the same object where none was."""
    for after in found:
        for pool in after.pools:
            if pool.short:
                margins = corrected(prepared, margins, pool, only_down=True)
    return margins


def held(prepared: Prepared, margins: Margins, replicas: Replicas, after: Fallback) -> Fallback:
    """With no pool given more than it holds."""
    short = [pool for pool in after.pools if pool.short]
    if not short:
        return after
    x = after.x.copy()
    for pool in short:
        x[:, pool.variant] *= held_share(prepared, pool)
    return fallback(prepared, margins, replicas, after.loss, x)
