"""The part of the independent check that asks the model: what routes promise, now and after a loss.

    LLMService, ServicePlan, figures of its variants --kept_by_routes--> shares, unserved demand, what requests will see
                                                    --kept_after_losses--> the same of every loss it has to survive

Every share, every figure of a variant's pool and what is left unserved are computed again from demand and routes. The
model's answer at the pool's own mix and number of replicas is what a promise is; headroom is not asked for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from llmfleet.api import LLMService, PlannedVariant, ServicePlan
from llmfleet.placement.performance.figures import VariantFigures
from llmfleet.placement.violation import (
    LEAST_SHARE,
    LOAD_TOLERANCE,
    PROMISE_TOLERANCE,
    RARE_SHARE,
    Constraint,
    Violation,
)

Rates = npt.NDArray[np.float64]
"""Requests per second by bucket."""


def kept_by_routes(
    service: LLMService, planned: ServicePlan, sound: Mapping[str, VariantFigures]
) -> Iterator[Violation]:
    """Shares of each bucket; what the requests of each variant see; what is left unserved. `sound`: figures of the
    variants that are as they should be, by name."""
    key, demand = planned.key, planned.demand
    shares = [0.0] * len(demand)
    stages = {role: np.zeros(len(demand)) for role in ("prefill", "decode")}
    roles = {variant.name: variant.role for variant in planned.variants}
    given = {name: np.zeros(len(demand)) for name in sound}
    replicas = planned.replicas
    for route in planned.routes:
        bucket, fraction = route.bucket, route.fraction
        if not 0 <= bucket < len(demand):
            yield Violation("route", f"{key} bucket {bucket}", bucket, f"0 to {len(demand) - 1}")
            continue
        if not 0 <= fraction <= 1 + LOAD_TOLERANCE:
            yield Violation("shares", f"{key} bucket {bucket}", fraction, "0 to 1")
            continue
        role = roles.get(route.variant)
        shares[bucket] += 0.0 if role == "decode" else fraction  # who decodes has been counted where it was prefilled
        if role is not None:
            stages[role][bucket] += fraction
        where = f"{key} bucket {bucket} to {route.variant}"
        if replicas.get(route.variant, 0) <= 0:
            yield Violation("route", where, fraction, "0: it has no replica")
        elif route.variant in sound:
            given[route.variant][bucket] += fraction * demand[bucket]
            if demand[bucket] <= 0 and not sound[route.variant].column(service.spec.objective)[bucket] > 0:
                yield Violation("route", where, fraction, "0: it never keeps the objective there")
    for bucket, share in enumerate(shares):
        if not share <= 1 + LOAD_TOLERANCE:
            yield Violation("shares", f"{key} bucket {bucket}", share, "at most 1")
    for bucket in np.flatnonzero(np.abs(stages["prefill"] - stages["decode"]) > LOAD_TOLERANCE).tolist():
        right = f"{stages['decode'][bucket]:g}, the share that is decoded"
        yield Violation("stage", f"{key} bucket {bucket}", float(stages["prefill"][bucket]), right)
    never = {name: figures.column(service.spec.objective) <= 0 for name, figures in sound.items()}
    yield from _answers_alike(service, planned, np.array(shares), given, never)
    for variant in planned.variants:
        if variant.name in sound and variant.replicas > 0:
            yield from _promise(service, variant, sound[variant.name], given[variant.name])
    left = math.fsum(rate * max(0.0, 1 - share) for rate, share in zip(demand, shares, strict=True))
    slack = LOAD_TOLERANCE * math.fsum(demand) + LEAST_SHARE
    if not abs(left - planned.unserved_rps) <= slack:
        yield Violation("unserved", key, planned.unserved_rps, f"{left:g} requests per second, as routed")
    if planned.unserved_rps > 0 and planned.shortfall is None:
        yield Violation("unserved", key, planned.unserved_rps, "0, or a shortfall that says so")


def kept_after_losses(
    service: LLMService, planned: ServicePlan, sound: Mapping[str, VariantFigures], spot_types: Collection[str]
) -> Iterator[Violation]:
    """Every loss of spot capacity in use that the service has to survive is told of, and what is said of the time
    after it is so: by the replicas that are left, within the objective."""
    key, spot = planned.key, service.spec.spot
    types = {variant.name: variant.gpu_type for variant in planned.variants}
    in_use = {one.gpu_type for one in planned.variants if one.replicas > 0 and one.gpu_type in spot_types}
    never = {name: figures.column(service.spec.objective) <= 0 for name, figures in sound.items()}
    told = {frozenset(loss.gpu_types): loss for loss in planned.losses}
    if spot is not None and spot.survive_loss_of == "anyPool":
        for name in sorted(in_use):
            if not any(name in gone and loss.share >= 1 - LOAD_TOLERANCE for gone, loss in told.items()):
                yield Violation("losses", f"{key} without {name}", "not planned for", "what would be served then")
    if spot is not None and spot.max_share < 1 and in_use:
        keep = 1 - spot.max_share - LOAD_TOLERANCE
        if not any(in_use <= gone and loss.share >= keep for gone, loss in told.items()):
            yield Violation("losses", f"{key} without spot", "not planned for", "what would be served then")
    for loss in planned.losses:
        where = f"{key} without {', '.join(loss.gpu_types)}"
        shares = [0.0] * len(planned.demand)
        given = {name: np.zeros(len(planned.demand)) for name in sound}
        for route in loss.routes:
            left = types.get(route.variant) not in loss.gpu_types and planned.replicas.get(route.variant, 0) > 0
            if not (0 <= route.bucket < len(shares) and 0 <= route.fraction <= 1 + LOAD_TOLERANCE and left):
                yield Violation("losses", where, route.fraction, f"no route of {route.variant}")
            elif route.variant in given:
                shares[route.bucket] += route.fraction
                given[route.variant][route.bucket] += route.fraction * loss.share * planned.demand[route.bucket]
        if not all(share <= 1 + LOAD_TOLERANCE for share in shares):
            yield Violation("losses", where, max(shares), "at most 1 of each size")
        yield from _answers_alike(service, planned, np.array(shares), given, never)
        for variant in planned.variants:
            if variant.name in given and given[variant.name].any():
                yield from _keeps(service, variant, sound[variant.name], given[variant.name], "losses", where)
        unserved = math.fsum(
            loss.share * rate * max(0.0, 1 - share) for rate, share in zip(planned.demand, shares, strict=True)
        )
        if not abs(unserved - loss.unserved_rps) <= LOAD_TOLERANCE * math.fsum(planned.demand) + LEAST_SHARE:
            yield Violation("losses", where, loss.unserved_rps, f"{unserved:g} requests per second, as routed")
        if loss.unserved_rps > 0 and planned.shortfall is None:
            yield Violation("losses", where, loss.unserved_rps, "0, or a shortfall that says so")


def _keeps(
    service: LLMService,
    variant: PlannedVariant,
    figures: VariantFigures,
    rps: Rates,
    constraint: Constraint,
    where: str,
) -> Iterator[Violation]:
    """The requests that a variant is given keep the objective."""
    objective = service.spec.objective
    seen = figures.outlook(objective, rps, replicas=variant.replicas, arrivals_cv2=service.spec.traffic.burstiness)
    part = figures.part_of(objective)
    for name, attained, target in (
        ("TTFT", seen.ttft_attainment, part.ttft),
        ("TPOT", seen.tpot_attainment, part.tpot),
    ):
        if not attained >= target.percentile / 100 - PROMISE_TOLERANCE:
            right = f"{target.percentile:g} % of the requests within {target.milliseconds:g} ms {name}"
            said = f"{100 * attained:.4g} % at {rps.sum():g} requests per second"
            yield Violation(constraint, where, said, right)


def _promise(service: LLMService, variant: PlannedVariant, figures: VariantFigures, rps: Rates) -> Iterator[Violation]:
    """The requests of a variant keep the objective, and the plan says what they will see."""
    where, said = f"{service.key} {variant.name}", variant.predicted
    objective = service.spec.objective
    if not rps.any():
        if said is not None:
            yield Violation("predicted", where, said.ttft_ms, "nothing: it gets no requests")
        return
    yield from _keeps(service, variant, figures, rps, "load", where)
    seen = figures.outlook(objective, rps, replicas=variant.replicas, arrivals_cv2=service.spec.traffic.burstiness)
    if said is None:
        yield Violation("predicted", where, "nothing", "what its requests will see")
        return
    for figure, right_figure in (
        (said.ttft_attainment, seen.ttft_attainment),
        (said.tpot_attainment, seen.tpot_attainment),
        (said.ttft_ms, seen.ttft_ms),
        (said.tpot_ms, seen.tpot_ms),
    ):
        if not abs(figure - right_figure) <= PROMISE_TOLERANCE * max(1.0, abs(right_figure)):
            yield Violation("predicted", where, figure, f"{right_figure:g}")
    source = figures.source(rps > 0)
    if said.source != source:
        yield Violation("predicted", where, said.source, source)


def _answers_alike(
    service: LLMService,
    planned: ServicePlan,
    shares: Rates,
    given: Mapping[str, Rates],
    never: Mapping[str, npt.NDArray[np.bool_]],
) -> Iterator[Violation]:
    """Requests of one input bucket cannot be told apart by their answers: a variant gets the same share of all that are
    served, and those for which it never keeps the objective are at most a rare few of them, or of all requests.

    `given` and `never` (whether it never keeps it): by variant and bucket.
    """
    demand, objective, names = np.array(planned.demand), service.spec.objective, list(given)
    if not names:
        return
    rare = (1 - max(objective.ttft.percentile, objective.tpot.percentile) / 100) * RARE_SHARE
    served = (demand > 0) & (shares > 0)
    rps = np.array(list(given.values()))
    parts = np.divide(rps, demand, out=np.zeros_like(rps), where=served)
    by_input = (len(names), -1, len(planned.buckets.output_tokens))
    most = np.where(served, parts, -np.inf).reshape(by_input).max(axis=2)
    least = np.where(served, parts, np.inf).reshape(by_input)
    uneven = most - least.min(axis=2) > LOAD_TOLERANCE
    for v, row in np.argwhere(uneven).tolist() if uneven.any() else ():
        bucket = row * by_input[2] + int(least[v, row].argmin())
        right = f"{most[v, row]:g} as of its other answers, since nobody knows their length before"
        yield Violation("shares", f"{service.key} bucket {bucket} to {names[v]}", float(parts[v, bucket]), right)
    missed = np.where(np.array(list(never.values())), rps, 0.0).reshape(by_input)
    if not missed.any():
        return
    total = rps.reshape(by_input).sum(axis=2)
    often = missed.sum(axis=2) > (rare + LOAD_TOLERANCE) * total
    few = float(missed.sum(axis=2)[often].sum()) <= (rare + LOAD_TOLERANCE) * demand.sum()
    for v, row in [] if few else np.argwhere(often).tolist():
        bucket = row * by_input[2] + int(missed[v, row].argmax())
        right = f"at most {rare:g} of its input bucket: it never keeps the objective there"
        share = float(missed[v, row].sum() / total[v, row])
        yield Violation("route", f"{service.key} bucket {bucket} to {names[v]}", share, right)
