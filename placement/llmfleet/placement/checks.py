"""From objects to something that can be planned, or to a refusal that says what to change.

In flow one service and everything it refers to; out flows `Prepared` (variants, throughput table, demand, warnings)
or a `Refusal`. Nothing here depends on other services, so a refused one cannot touch them.

The line between refusal and warning: a service is refused when *nothing is left* that could serve it, and warned
about when something it asked for is missing but the rest can serve. In order, so that the first thing that a user can
fix is named:

1. ProfileNotFound: `spec.profile` names no ModelProfile of the namespace;
2. NoConfiguration: none of `spec.configurations` is the profile's, or those that are cannot be used by this service;
3. UnknownGPUType: every allowed (or, without a list, every measured) type is no GPUType;
4. ProfileIncomplete: no allowed type is measured or can be predicted; SpotNotAllowed: only spot types are, and the
   service has no `spec.spot`;
5. ModelDoesNotFit: weights, one request of full context and overhead exceed a device of every such variant;
   ReplicaLargerThanNode: every such variant that would hold them takes more devices than a node has;
6. ProfileIncomplete: a bucket that requests can fall into is neither measured nor predicted on any of the remaining
   variants. Demand is not asked: a hole would blind the plan to the first request that falls into it. A hole on one of
   several variants only keeps that variant out of that bucket;
7. ObjectiveUnreachable: with demand that the user wrote down, any bucket of it that no variant serves within the
   objective. With observed demand, only if *no* demanded bucket is reachable: one stray long request must not take a
   running service out of the plan; it is unserved and reported instead. Without demand, if no bucket is reachable;
8. NoInventory: for none of the variants there are enough devices for one replica. Where there are and only a `limit`
   forbids them, the service is planned, with no replica and a shortfall that says so: a refusal would leave the plan in
   force, and with it the very engines that the limit is to take away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from llmfleet.api import Buckets, GPUType, LLMService, ModelProfile, Refusal
from llmfleet.api.llmservice import Objective
from llmfleet.placement.configurations import permitted
from llmfleet.placement.inputs import PlanInputs
from llmfleet.placement.performance import BoolArray, FloatArray, Miss, implausibilities, missed_by
from llmfleet.placement.performance.figures import MOST_ARRIVALS_CV2
from llmfleet.placement.rows import SharedRow, rows_of
from llmfleet.placement.solver.stages import Stage, has_way
from llmfleet.placement.staged import left_alone, stages_of, with_stages
from llmfleet.placement.variants import (
    Excluded,
    Variant,
    candidates,
    larger_than_node,
    memory_needed_gib,
    memory_usable_gib,
    offered,
)
from llmfleet.placement.workload import BucketDemand, bucket_demand, lower_edges, startup_seconds


@dataclass(frozen=True, eq=False)
class Prepared:
    """A service that can be planned. One that is the same object is the same in every respect."""

    service: LLMService
    """The object."""
    buckets: Buckets
    """Size buckets of its profile."""
    variants: list[Variant]
    """Variants that may serve it, by name; those of types without devices included."""
    excluded: list[Excluded]
    """Types and variants that may not, and why."""
    throughput: FloatArray
    """Requests per second of one replica of a large pool within the objective, each bucket alone, shape (buckets,
    variants); 0 where not met."""
    known: BoolArray
    """Whether it is measured or predicted, shape (buckets, variants)."""
    demand: BucketDemand
    """What has to be served."""
    warnings: list[str]
    """Facts that do not stop the plan but that the user should know."""
    forbidden: str | None = None
    """Set where limits leave no variant enough devices for a single replica: which limits, in words."""

    @property
    def key(self) -> str:
        """`namespace/name` of the service."""
        return self.service.key

    @property
    def objective(self) -> Objective:
        """Its latency objective."""
        return self.service.spec.objective

    @cached_property
    def stage(self) -> Stage | None:
        """What each variant serves of a request (`solver.stages`); None: all of it."""
        return stages_of(self.variants)

    @property
    def arrivals_cv2(self) -> float:
        """Squared coefficient of variation of the times between its arrivals."""
        return self.service.spec.traffic.burstiness


class Catalogue:
    """The inputs, indexed by name."""

    def __init__(self, inputs: PlanInputs) -> None:
        self.gpu_types: dict[str, GPUType] = {gpu_type.metadata.name: gpu_type for gpu_type in inputs.gpu_types}
        self.profiles: dict[str, ModelProfile] = {profile.key: profile for profile in inputs.profiles}
        self.devices: dict[str, int] = {
            name: available_devices(gpu_type, inputs.inventory.get(name, 0))
            for name, gpu_type in self.gpu_types.items()
        }
        self.rows: tuple[SharedRow, ...] = rows_of(inputs)


def available_devices(gpu_type: GPUType, inventory: int) -> int:
    """Devices that the fleet may use: what exists, no more than the type's limit."""
    limit = gpu_type.spec.limit
    return inventory if limit is None else min(inventory, limit)


class _RefusedError(Exception):
    """Ends the checks of one service with a refusal; never leaves this module."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def prepare(service: LLMService, inputs: PlanInputs, catalogue: Catalogue) -> Prepared | Refusal:
    """Checks one service and gathers what planning it needs."""
    try:
        return _prepare(service, inputs, catalogue)
    except _RefusedError as refused:
        return Refusal(
            namespace=service.metadata.namespace or "",
            service=service.metadata.name,
            reason=refused.reason,
            message=refused.message,
            generation=service.metadata.generation,
        )


def _prepare(service: LLMService, inputs: PlanInputs, catalogue: Catalogue) -> Prepared:
    profile = _profile(service, catalogue)
    buckets = profile.spec.buckets
    variants, excluded = candidates(service, profile, catalogue.gpu_types, now=inputs.at)
    if inputs.can_hand_over and service.spec.engine.disaggregated:
        variants, whole_only = with_stages(service, variants, now=inputs.at)
        excluded += whole_only
    if not variants:
        raise _no_candidate(service, profile, catalogue, excluded)

    within_s = startup_seconds(service, (variant.gpu_type for variant in variants))
    forecast = inputs.forecast.get(service.key)
    demand = bucket_demand(service, buckets, inputs.demand.get(service.key), forecast, within_s)
    variants = [replace(variant, figures=variant.figures.of_sizes(demand.sizes)) for variant in variants]
    throughput = np.stack([variant.figures.column(service.spec.objective) for variant in variants], axis=1)
    known = np.stack([variant.figures.known for variant in variants], axis=1)

    _require_complete(service, profile, variants, known)
    _require_reachable(service, profile, variants, throughput, demand)
    # One that is too slow everywhere is no candidate: as the cheapest it would be bought to fill up replicas.min.
    too_slow = np.flatnonzero(~(throughput > 0).any(axis=0)).tolist()
    names = [variants[column].name for column in too_slow]
    excluded += [Excluded(name, "objective", f"{name} meets the objective in no bucket") for name in names]
    alone = left_alone([variant for variant in variants if variant.name not in names])
    excluded += alone
    names += [one.name for one in alone]
    left = [column for column, variant in enumerate(variants) if variant.name not in names]
    variants = [variants[column] for column in left]
    throughput, known = throughput[:, left], known[:, left]
    forbidden = _require_inventory(service, variants, inputs, catalogue)
    warnings = _warnings(service, profile, variants, excluded, known, can_hand_over=inputs.can_hand_over)
    warnings += demand.warnings
    return Prepared(service, buckets, variants, excluded, throughput, known, demand, warnings, forbidden)


def _profile(service: LLMService, catalogue: Catalogue) -> ModelProfile:
    namespace, name = service.metadata.namespace, service.spec.profile
    profile = catalogue.profiles.get(f"{namespace}/{name}")
    if profile is None:
        here = sorted(p.metadata.name for p in catalogue.profiles.values() if p.metadata.namespace == namespace)
        raise _RefusedError(
            "ProfileNotFound",
            f"LLMService {service.key}: spec.profile is {name!r}, but namespace {namespace} has no such ModelProfile; "
            f"it has {_listed(here)}. Write one with `llmfleet profile` or name an existing one",
        )
    return profile


def _no_candidate(
    service: LLMService, profile: ModelProfile, catalogue: Catalogue, excluded: list[Excluded]
) -> _RefusedError:
    known = sorted(catalogue.gpu_types)
    views, refused = permitted(service, profile)
    if not views:
        return _RefusedError(
            "NoConfiguration",
            f"LLMService {service.key}: spec.configurations is {_listed(service.spec.configurations)}, none of which "
            f"can be used: {'; '.join(refused.values())}",
        )
    measured = sorted({one.gpu_type for view in views.values() for one in view.spec.measurements})
    spot = [exclusion.message for exclusion in excluded if exclusion.reason == "spot"]
    if spot and all(one.reason in ("spot", "not_allowed", "not_measured", "unknown") for one in excluded):
        return _RefusedError(
            "SpotNotAllowed",
            f"LLMService {service.key}: {'; '.join(spot)}, and no other type could serve it. Accepted: spec.spot, or "
            "GPU types on demand in spec.gpuTypes",
        )
    too_big = [exclusion for exclusion in excluded if exclusion.reason == "does_not_fit"]
    if too_big:
        return _RefusedError("ModelDoesNotFit", _does_not_fit(service, views, catalogue))
    too_wide = [exclusion.message for exclusion in excluded if exclusion.reason == "larger_than_node"]
    if too_wide:
        return _RefusedError(
            "ReplicaLargerThanNode",
            f"LLMService {service.key}, ModelProfile {profile.key}: {'; '.join(too_wide)}. Accepted: measurements "
            "whose tensorParallel times pipelineParallel is no more than that, or a type with larger nodes",
        )
    asked = sorted(service.spec.gpu_types)
    if asked and not set(asked) & set(known):
        return _RefusedError(
            "UnknownGPUType",
            f"LLMService {service.key}: spec.gpuTypes is {_listed(asked)}, none of which is a GPUType; "
            f"known are {_listed(known)}",
        )
    if measured and not asked and not set(measured) & set(known):
        return _RefusedError(
            "UnknownGPUType",
            f"ModelProfile {profile.key}: spec.measurements[*].gpuType is {_listed(measured)}, none of which is a "
            f"GPUType; known are {_listed(known)}",
        )
    allowed = asked or known
    return _RefusedError(
        "ProfileIncomplete",
        f"ModelProfile {profile.key}: spec.measurements covers {_listed(measured)}, but LLMService {service.key} may "
        f"only use {_listed(allowed)}; measure one of these with `llmfleet profile`",
    )


def _does_not_fit(service: LLMService, views: dict[str, ModelProfile], catalogue: Catalogue) -> str:
    context_length = service.spec.model.context_length
    needs, fitting_contexts = [], []
    for key in offered(service, views, catalogue.gpu_types):
        spec, devices = views[key.configuration].spec, key.devices
        if larger_than_node(catalogue.gpu_types[key.gpu_type], devices):
            continue
        usable = memory_usable_gib(catalogue.gpu_types[key.gpu_type])
        needed = memory_needed_gib(views[key.configuration], context_length, devices)
        needs.append(f"{needed:.1f} GiB on each of {devices} x {key.gpu_type}, which has {usable:.1f} GiB usable")
        room_gib = (usable - spec.overhead_gib) * devices - spec.weights_gib
        fitting_contexts.append(int(room_gib * 2**20 / spec.kv_kib_per_token))
    longest = max(fitting_contexts)
    weights = ", ".join(sorted({f"{view.spec.weights_gib:g} GiB" for view in views.values()}))
    accepted = "a type with more memory, a smaller configuration, or a profile with a higher tensorParallel"
    if longest >= 16:
        accepted = f"spec.model.contextLength of at most {longest}, {accepted}"
    return (
        f"LLMService {service.key}: with spec.model.contextLength {context_length} the weights "
        f"({weights}), one full context and overhead need {'; '.join(sorted(set(needs)))}. "
        f"Accepted: {accepted}"
    )


def occurs(service: LLMService, buckets: Buckets, bucket: int) -> bool:
    """Whether a request of this bucket fits into the service's context at all."""
    return sum(lower_edges(buckets, bucket)) <= service.spec.model.context_length


def _require_complete(service: LLMService, profile: ModelProfile, variants: list[Variant], known: BoolArray) -> None:
    holes = [
        profile.spec.buckets.edges(bucket)
        for bucket in np.flatnonzero(~known.any(axis=1)).tolist()
        if occurs(service, profile.spec.buckets, bucket)
    ]
    if holes:
        raise _RefusedError(
            "ProfileIncomplete",
            f"ModelProfile {profile.key}: spec.measurements of {_listed([v.name for v in variants])} have no point at "
            f"{_corners(holes)}; every bucket needs one at its upper corner, or spec.architecture to predict it from. "
            "Run `llmfleet profile` again for these",
        )


def _require_reachable(
    service: LLMService, profile: ModelProfile, variants: list[Variant], throughput: FloatArray, demand: BucketDemand
) -> None:
    reachable = has_way(throughput > 0, stages_of(variants))
    asked = demand.rps > 0
    if not asked.any():
        missed = [] if reachable.any() else list(range(profile.spec.buckets.count))
    elif demand.observed:
        missed = [] if (asked & reachable).any() else np.flatnonzero(asked).tolist()
    else:
        # What is only forecast may be wrong, and is unserved then: what users wrote down is not.
        missed = np.flatnonzero((demand.said > 0) & ~reachable).tolist()
        missed = missed or ([] if (asked & reachable).any() else np.flatnonzero(asked).tolist())
    if missed:
        raise _RefusedError("ObjectiveUnreachable", unreachable_message(service, profile, variants, missed))


def unreachable_message(service: LLMService, profile: ModelProfile, variants: list[Variant], buckets: list[int]) -> str:
    """Which buckets no variant serves within the objective, the closest measured run, and what it would meet."""
    objective = service.spec.objective
    corners = [profile.spec.buckets.edges(bucket) for bucket in buckets]
    asked = (
        f"LLMService {service.key}: spec.objective asks for TTFT p{objective.ttft.percentile:g} <= "
        f"{objective.ttft.milliseconds:g} ms and TPOT p{objective.tpot.percentile:g} <= "
        f"{objective.tpot.milliseconds:g} ms, which no allowed variant meets at {_corners(corners)}"
    )
    worst_ttft_ms, worst_tpot_ms, nearest = 0.0, 0.0, []
    best = {variant.name: variant.figures.best(objective) for variant in variants if variant.role is None}
    for bucket, corner in zip(buckets, corners, strict=True):
        misses = [
            (name, Miss(ttft_ms=float(ttft_ms[bucket]), tpot_ms=float(tpot_ms[bucket]), concurrency=1))
            for name, (ttft_ms, tpot_ms) in best.items()
            if np.isfinite(ttft_ms[bucket]) and np.isfinite(tpot_ms[bucket])
        ]
        if not misses:
            return f"{asked}; nothing is known of it there"
        name, miss = min(misses, key=lambda named: (missed_by(named[1], objective), named[0]))
        worst_ttft_ms, worst_tpot_ms = max(worst_ttft_ms, miss.ttft_ms), max(worst_tpot_ms, miss.tpot_ms)
        nearest.append(f"{name} with TTFT {miss.ttft_ms:g} ms and TPOT {miss.tpot_ms:g} ms at {_corners([corner])}")
    reachable_ttft_ms = max(worst_ttft_ms, objective.ttft.milliseconds)
    reachable_tpot_ms = max(worst_tpot_ms, objective.tpot.milliseconds)
    return (
        f"{asked}. Closest, for a request alone and one standard error above what is known: {'; '.join(nearest[:3])}. "
        f"Reachable at these percentiles: ttft.milliseconds >= {reachable_ttft_ms:g} with tpot.milliseconds >= "
        f"{reachable_tpot_ms:g}"
    )


def _require_inventory(
    service: LLMService, variants: list[Variant], inputs: PlanInputs, catalogue: Catalogue
) -> str | None:
    """None where a replica fits; the limits in words where only they forbid one. Raises where there is no device."""
    if any(catalogue.devices[variant.type_name] >= variant.devices for variant in variants):
        return None
    found = []
    for variant in variants:
        limit = variant.gpu_type.spec.limit
        found.append(
            f"{variant.name} takes {variant.devices} of GPUType {variant.type_name}, of which the cluster has "
            f"{inputs.inventory.get(variant.type_name, 0)}" + ("" if limit is None else f" and the limit is {limit}")
        )
    if any(inputs.inventory.get(variant.type_name, 0) >= variant.devices for variant in variants):
        return f"no device may be used for a single replica: {'; '.join(found)}"
    raise _RefusedError(
        "NoInventory",
        f"LLMService {service.key}: no device for a single replica: {'; '.join(found)}. Accepted: nodes with these "
        "devices (Ready, schedulable, matched by the GPUType's nodeSelector, with no taint that its tolerations leave "
        "out), spec.provisionable of one of these types, or another type in spec.gpuTypes",
    )


def _warnings(
    service: LLMService,
    profile: ModelProfile,
    variants: list[Variant],
    excluded: list[Excluded],
    known: BoolArray,
    *,
    can_hand_over: bool,
) -> list[str]:
    asked = set(service.spec.gpu_types)
    found = [
        exclusion.message
        for exclusion in excluded
        if exclusion.reason in ("ambiguous", "does_not_fit", "larger_than_node", "unknown", "unusable")
        or (exclusion.reason in ("not_measured", "spot") and exclusion.name in asked)
    ]
    bursts = service.spec.traffic.burstiness
    if bursts > MOST_ARRIVALS_CV2:
        found.append(
            f"spec.traffic.burstiness {bursts:g} is planned as {MOST_ARRIVALS_CV2:g}: what comes in larger bursts may "
            "miss the objective"
        )
    if service.spec.model.source == "hf" and profile.spec.model != service.spec.model.name:
        found.append(
            f"ModelProfile {profile.key} measured {profile.spec.model}, but spec.model.name is "
            f"{service.spec.model.name}"
        )
    if service.spec.engine.disaggregated:
        whole_only = [exclusion.message for exclusion in excluded if exclusion.reason == "stages"]
        if not can_hand_over:
            found.append("spec.engine.disaggregated: engines hand no KV cache over yet, so all serve whole requests")
        elif all(variant.role is None for variant in variants) and whole_only:
            found.append(f"spec.engine.disaggregated: all serve whole requests: {'; '.join(whole_only)}")
    for column, variant in enumerate(variants):
        if variant.role is not None:
            continue
        unknown = [
            profile.spec.buckets.edges(bucket)
            for bucket in np.flatnonzero(~known[:, column]).tolist()
            if occurs(service, profile.spec.buckets, bucket)
        ]
        if unknown:
            found.append(
                f"ModelProfile {profile.key} has no point of {variant.name} at {_corners(unknown)}; "
                "it gets no such requests"
            )
        hardware = variant.gpu_type.spec.hardware
        if hardware is not None and variant.measurement is not None:
            found += [
                f"ModelProfile {profile.key} claims for {variant.name} what GPUType {variant.type_name} cannot do: "
                + claim
                for claim in implausibilities(variant.profile.spec, variant.measurement, hardware)
            ]
    return found


def _corners(corners: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"input {i} output {o}" for i, o in corners[:4])
    return shown if len(corners) <= 4 else f"{shown} and {len(corners) - 4} more"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
