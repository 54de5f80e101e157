"""Objects that do not parse: what is wrong with them, and what counts meanwhile.

    raw object that is refused --invalid_object--> InvalidObject, with its last version that parsed where one is known
    InvalidObject, what the cache held before --still_in_force--> the same, with the newer of two such versions

What the platform team writes (types, profiles, power domains, the policy) bounds what services may have, so a version
of it that does not parse opens nothing. The last one that did stays in force; this process has it in memory, or another
one has left it in the status (`last_good`). Where there is none, the object could forbid anything, and what it may
forbid is not begun: `bounds_of_unknown` and `policy_of` say what that is, each message says it to people.

    FleetPolicy    plans are shown and not applied
    PowerDomain    its types get no device more than the plans in force have of them
    GPUType        whatever needs it keeps its plan; its devices are counted for no other type
    ModelProfile   whatever needs it keeps its plan
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeAlias

from pydantic import ValidationError

from llmfleet.api import (
    CONDITION_PLANNED,
    FleetPolicy,
    FleetPolicySpec,
    GPUType,
    LLMService,
    ModelProfile,
    PowerDomain,
    ServicePlan,
)
from llmfleet.api.meta import CONDITION_ACCEPTED
from llmfleet.operator.inventory import DeviceClaim
from llmfleet.operator.last_good import recall
from llmfleet.operator.parse import timestamp

REASON_INVALID_SPEC = "InvalidSpec"
"""Reason of the Planned condition of a service whose spec does not parse."""

Bound: TypeAlias = FleetPolicy | GPUType | ModelProfile | PowerDomain
"""What the platform team writes."""


@dataclass(frozen=True, slots=True)
class InvalidObject:
    """A custom resource that does not parse. It is reported, and nothing else waits for it."""

    kind: str
    namespace: str | None
    name: str
    uid: str
    generation: int
    problem: str
    """Every wrong field with its value and what is accepted."""
    told: str = ""
    """What its status says of this generation already."""
    told_since: datetime | None = None
    """Since when its status says that it is not accepted."""
    deleting: bool = False
    """It has a deletion timestamp."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Its spec, as it is."""
    status: Mapping[str, Any] = field(default_factory=dict)
    """Its status, as it is."""
    in_force: Bound | None = None
    """Its last version that parsed, with this status. It goes on to count."""

    @property
    def message(self) -> str:
        """The problem, and what is in force until it is mended."""
        if self.kind == LLMService.KIND:
            return self.problem
        if self.in_force is None:
            return f"{self.problem}; until it parses {self._without_it()}"
        generation = self.in_force.metadata.generation
        shadow = " in mode shadow" if self.shadow else ""
        return f"{self.problem}; until it parses generation {generation}, the last that did, stays in force{shadow}"

    def _without_it(self) -> str:
        match self.kind:
            case FleetPolicy.KIND:
                return "plans are shown and not applied: no version that did is known"
            case PowerDomain.KIND:
                types = self.named_types
                which = "any GPU type" if types is None else ", ".join(sorted(types))
                return f"services get no more devices of {which} than they have: no version that did is known"
            case GPUType.KIND:
                return "it counts as absent: what needs it is refused, and keeps its plan; its devices are nobody's"
            case _:
                return "it counts as absent: what needs it is refused, and keeps its plan"

    @property
    def reported(self) -> bool:
        """Its status says so already."""
        return self.told == self.message

    @property
    def shadow(self) -> bool:
        """It is a FleetPolicy that asks for another mode than `apply`. What it means by it is not known, so nothing may
        be applied."""
        return self.kind == FleetPolicy.KIND and self.spec.get("mode") not in (None, "apply")

    @property
    def named_types(self) -> frozenset[str] | None:
        """GPU types that a PowerDomain names; None where that cannot be read either."""
        names = self.spec.get("gpuTypes")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            return None
        return frozenset(names)

    @property
    def unknown(self) -> bool:
        """It is there to stay, and nothing is known of what it forbids."""
        return self.in_force is None and not self.deleting


def invalid_object(model: type[Bound | LLMService], raw: Mapping[str, Any], problem: str) -> InvalidObject:
    """A raw object of which `problem` is wrong."""
    kind, meta, status = model.KIND, raw["metadata"], raw.get("status") or {}
    generation = meta.get("generation", 0)
    deleting = bool(meta.get("deletionTimestamp"))
    conditions: Iterable[Mapping[str, Any]] = status.get("conditions") or ()
    type_ = CONDITION_PLANNED if kind == LLMService.KIND else CONDITION_ACCEPTED
    reported = next((c for c in conditions if c.get("type") == type_), dict[str, Any]())
    speaks_of_it = (reported.get("observedGeneration"), reported.get("reason")) == (generation, REASON_INVALID_SPEC)
    spec = raw.get("spec")
    last = None if deleting else recall(model, raw)
    return InvalidObject(
        kind=kind,
        namespace=meta.get("namespace"),
        name=meta["name"],
        uid=meta.get("uid", ""),
        generation=generation,
        problem=problem,
        told=str(reported.get("message")) if speaks_of_it else "",
        told_since=timestamp(reported.get("lastTransitionTime")) if reported.get("status") == "False" else None,
        deleting=deleting,
        spec=dict(spec) if isinstance(spec, Mapping) else {},
        status=dict(status),
        in_force=last if isinstance(last, Bound) else None,
    )


def still_in_force(invalid: InvalidObject, before: object) -> InvalidObject:
    """The invalid object with the last version of the same object that parsed, if there is one: the newer of what its
    status says and what was known before."""
    last = before.in_force if isinstance(before, InvalidObject) else before
    if not isinstance(last, Bound) or last.metadata.uid != invalid.uid or invalid.deleting:
        return invalid
    if invalid.in_force is not None and invalid.in_force.metadata.generation >= last.metadata.generation:
        return invalid
    try:
        # Its status is that of the object, where we go on to write what is so of the type, and read it again.
        status = type(last.status).model_validate(invalid.status)
    except ValidationError:
        status = last.status
    return replace(invalid, in_force=last.model_copy(update={"status": status}))


def policy_of(invalid: InvalidObject) -> FleetPolicySpec:
    """The policy that counts while the FleetPolicy does not parse."""
    in_force = invalid.in_force.spec if isinstance(invalid.in_force, FleetPolicy) else FleetPolicySpec()
    return in_force.model_copy(update={"mode": "shadow"}) if invalid.shadow or invalid.unknown else in_force


def bounds_of_unknown(
    invalid: Iterable[InvalidObject], gpu_types: Iterable[str], plans: Iterable[ServicePlan]
) -> dict[str, tuple[int, str]]:
    """By GPUType name the most devices that the fleet may use and why, for the types of power domains of which nothing
    is known. `plans` are those in force: what they have was allowed by a budget that is not known any more, so the
    fleet may keep it, and no device more."""
    closed: dict[str, str] = {}
    names = set(gpu_types)
    for domain in sorted(invalid, key=lambda one: one.name):
        if domain.kind == PowerDomain.KIND and domain.unknown:
            types = names if domain.named_types is None else names & domain.named_types
            closed = dict.fromkeys(types, domain.name) | closed
    held = dict.fromkeys(closed, 0)
    for plan in plans if closed else ():
        for variant in plan.variants:
            if variant.gpu_type in held:
                held[variant.gpu_type] += variant.replicas * variant.devices
    return {
        name: (held[name], f"PowerDomain {domain} does not parse, and no version of it that did is known")
        for name, domain in sorted(closed.items())
    }


def claims_of_unknown(invalid: Iterable[InvalidObject]) -> tuple[DeviceClaim, ...]:
    """Which nodes' devices belong to GPU types of which nothing is known, as far as that can be read.

    Whether such a type tolerates a node's taints is not known either, so it counts as if it did.
    """
    found = []
    for one in invalid:
        resource, selector = one.spec.get("resourceName"), one.spec.get("nodeSelector") or {}
        if one.kind == GPUType.KIND and one.unknown and isinstance(resource, str) and isinstance(selector, Mapping):
            found.append(DeviceClaim(one.name, resource, dict(selector), tolerations=None))
    return tuple(sorted(found, key=lambda claim: claim.gpu_type))


def explain(kind: str, error: ValidationError) -> str:
    """One line that names each wrong field, its value and what is accepted."""
    return "; ".join(
        f"{kind}.{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}, got {problem['input']!r}"[:500]
        for problem in error.errors(include_url=False)[:5]
    )
