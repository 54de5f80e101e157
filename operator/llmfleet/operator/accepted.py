"""Whether what the platform team wrote was understood: `Accepted` of GPUTypes, ModelProfiles, PowerDomains, policies.

    cache --mark--> kind and key --verdict--> condition and last version that parsed,
                                              only where the status does not say so yet --> API server

Of an object that does not parse the condition says which version is in force instead, and its transition time since
when; that version stays in the status for whoever acts next. An LLMService says the same in its `Planned` condition.
Both are applied under a field manager of their own, so that nothing else in these statuses (inventory, corrections)
depends on who writes first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx2

from llmfleet.api import POLICY_NAME, Condition, FleetPolicy, GPUType, ModelProfile, PowerDomain
from llmfleet.api.gputype import objection
from llmfleet.api.meta import CONDITION_ACCEPTED
from llmfleet.operator.apply import Applier, FencedError, RefusedError
from llmfleet.operator.cache import Cache
from llmfleet.operator.invalid import REASON_INVALID_SPEC, Bound, InvalidObject
from llmfleet.operator.last_good import LARGEST_BYTES, remember

log = logging.getLogger(__name__)

REASON_ACCEPTED = "Accepted"
REASON_NAME_IGNORED = "NameIgnored"
"""Reason of a FleetPolicy that does not count for its name."""
REASON_WATTS_UNKNOWN = "WattsUnknown"
"""Reason of a PowerDomain with types that count as nothing."""
REASON_NAMES_UNKNOWN = "UnknownGPUType"
"""Reason of a FleetPolicy that limits devices of what is no GPUType."""
REASON_OTHER_HARDWARE = "OtherHardware"
"""Reason of a GPUType that cannot take over what another of the same hardware has."""
REASON_TOO_LARGE_TO_KEEP = "TooLargeToKeep"
"""Reason of an object that counts, and would be missing if a later version did not parse and the operator restarted."""
REPORT_INTERVAL_S = 1.0
RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the status of an object should say."""

    condition: Condition
    last_accepted: str | None
    """Its last version that parsed; None where none is known, or it is too large to be kept."""


def verdict(value: Bound | InvalidObject, gpu_types: Mapping[str, GPUType], now: datetime) -> Verdict | None:
    """What the status of an object should say; None where it says so already."""
    if isinstance(value, InvalidObject):
        stored = value.status.get("lastAccepted")
        kept = stored if value.in_force is None else remember(value.in_force, stored)
        if value.reported and kept == stored:
            return None
        since = value.told_since or now
        return Verdict(_condition("False", REASON_INVALID_SPEC, value.message, value.generation, since), kept)
    kept = remember(value, value.status.last_accepted)
    if isinstance(value, FleetPolicy) and value.metadata.name != POLICY_NAME:
        message = f"a FleetPolicy counts only if its name is {POLICY_NAME}; this one has no effect"
        wanted = _condition("False", REASON_NAME_IGNORED, message, value.metadata.generation, now)
    elif isinstance(value, FleetPolicy) and (unknown := _unknown(value, gpu_types)):
        wanted = _condition("True", REASON_NAMES_UNKNOWN, unknown, value.metadata.generation, now)
    elif isinstance(value, PowerDomain) and (uncounted := _uncounted(value, gpu_types)):
        wanted = _condition("True", REASON_WATTS_UNKNOWN, uncounted, value.metadata.generation, now)
    elif isinstance(value, GPUType) and (other := _other_hardware(value, gpu_types)):
        wanted = _condition("True", REASON_OTHER_HARDWARE, other, value.metadata.generation, now)
    elif kept is None:
        wanted = _condition("True", REASON_TOO_LARGE_TO_KEEP, _too_large(value), value.metadata.generation, now)
    else:
        wanted = _condition("True", REASON_ACCEPTED, "the spec parses and counts", value.metadata.generation, now)
    before = next((c for c in value.status.conditions if c.type == CONDITION_ACCEPTED), None)
    if before is not None and before.status == wanted.status:
        wanted = wanted.model_copy(update={"last_transition_time": before.last_transition_time})
    return None if (wanted, kept) == (before, value.status.last_accepted) else Verdict(wanted, kept)


def _uncounted(domain: PowerDomain, gpu_types: Mapping[str, GPUType]) -> str:
    """Types that count as nothing in a domain, in words; empty where there are none."""
    found = []
    for name in domain.spec.gpu_types:
        gpu_type = gpu_types.get(name)
        if gpu_type is None:
            found.append(f"{name} is no GPUType")
        elif gpu_type.spec.watts is None:
            found.append(f"GPUType {name} has no spec.watts")
    return f"spec.gpuTypes: {', '.join(found)}: counted as nothing; the budget holds for the others" if found else ""


def _unknown(policy: FleetPolicy, gpu_types: Mapping[str, GPUType]) -> str:
    """Names in a policy's limits that limit nothing, in words; empty where there are none."""
    found = [
        f"spec.namespaceLimits[{limit.namespace}].devices: {name} is no GPUType"
        for limit in policy.spec.namespace_limits
        for name in sorted((limit.devices or {}).keys() - gpu_types.keys())
    ]
    return f"{', '.join(found)}: this limits nothing; all else is in force" if found else ""


def _too_large(value: Bound) -> str:
    """What it means that a version in force is not in the status, in words."""
    remedy = ": fewer points of spec.measurements, or several profiles" if isinstance(value, ModelProfile) else ""
    return (
        f"the spec parses and counts, but as JSON it has more than {LARGEST_BYTES:,} bytes and is not kept in "
        "status.lastAccepted: if a later version does not parse, none is in force once the operator restarts"
        f"{remedy}"
    )


def _other_hardware(gpu_type: GPUType, gpu_types: Mapping[str, GPUType]) -> str:
    """Why a type takes nothing, or only measurements, over from another, in words; empty where it does as it says."""
    objected, same = objection(gpu_type, gpu_types), gpu_type.spec.same_hardware_as
    if objected is not None:
        return f"{objected}; nothing is taken over from it, all else is in force"
    if same is not None and same not in gpu_types:
        return f"spec.sameHardwareAs: {same} is no GPUType; what profiles measured under this name counts nevertheless"
    return ""


def _condition(status: str, reason: str, message: str, generation: int, now: datetime) -> Condition:
    return Condition.model_validate(
        {
            "type": CONDITION_ACCEPTED,
            "status": status,
            "reason": reason,
            "message": message,
            "observed_generation": generation,
            "last_transition_time": now.replace(microsecond=0),
        }
    )


class AcceptedReporter:
    """Writes verdicts of what changed."""

    def __init__(self, cache: Cache, applier: Applier, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._cache = cache
        self._applier = applier
        self._now = now
        self._changed: set[tuple[str, str]] = set()

    def mark(self, kind: str, key: str) -> None:
        """An object changed, its status included."""
        if kind in (FleetPolicy.KIND, GPUType.KIND, ModelProfile.KIND, PowerDomain.KIND):
            self._changed.add((kind, key))
        if kind == GPUType.KIND:
            self._changed |= {(PowerDomain.KIND, domain) for domain in self._cache.power_domains}
            self._changed.add((FleetPolicy.KIND, POLICY_NAME))
            pools = (name for name, one in self._cache.gpu_types.items() if one.spec.same_hardware_as is not None)
            self._changed |= {(GPUType.KIND, name) for name in pools}

    async def run(self) -> None:
        """Reports for ever."""
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            try:
                await self.report()
            except (FencedError, RefusedError, httpx2.HTTPError) as error:
                log.warning("cannot write whether an object is accepted", extra={"cause": str(error)})
                await asyncio.sleep(RETRY_S)

    async def report(self) -> None:
        """Writes the verdicts that are news; what could not be written stays marked. One that is refused keeps no other
        waiting: the last refusal is raised at the end."""
        refused: RefusedError | None = None
        for kind, key in sorted(self._changed):
            # Before the look: a change while it is written is another one.
            self._changed.discard((kind, key))
            value = self._cache.find(kind, key)
            if not isinstance(value, Bound | InvalidObject):
                continue
            found = verdict(value, self._cache.gpu_types, self._now())
            if found is None:
                continue
            namespace, _, name = key.rpartition("/")
            try:
                await self._applier.write_accepted(kind, namespace or None, name, found.condition, found.last_accepted)
            except RefusedError as error:
                self._changed.add((kind, key))
                refused = error
            except BaseException:
                self._changed.add((kind, key))
                raise
        if refused is not None:
            raise refused
