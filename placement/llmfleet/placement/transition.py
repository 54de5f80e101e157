"""Whether the way from the plan in force to the next one leads through less capacity than either has.

New engines serve before old ones leave, where there is room for both (make before break). In flow the plans of all
services before and after and the devices that the fleet may use; out flows, for each service whose change has not the
room, one sentence that says how many replicas must leave first. The operator then replaces them one at a time
(`operator/rollout.py`), and the service's condition `NoSurgeCapacity` says so while it lasts.

A service that only shrinks hands its devices over at once: what it gives up is not needed. One that grows anywhere
keeps all it has until the new replicas serve, so for a time it takes the larger of the two counts of each variant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from llmfleet.api import PlannedVariant, ServicePlan


def without_room(
    before: Mapping[str, ServicePlan], after: Iterable[ServicePlan], devices: Mapping[str, float]
) -> dict[str, str]:
    """What to say of each service that cannot be changed without a gap, by service key.

    `before`: plans in force by key; `devices`: by GPU type, what the services in `after` may use together, for every
    type that they use. A type on which nobody grows blocks nobody, even where there are fewer devices than are used.
    """
    changes = [_Change(before.get(service.key), service) for service in after]
    at_most: Counter[str] = Counter()
    for change in changes:
        at_most.update(change.devices_meanwhile())
    wanted = {name for change in changes for name in change.grows_on}
    lacking = {name: used - int(devices[name]) for name, used in at_most.items() if name in wanted}
    said = {}
    for change in changes:
        leaving = change.leaves_early(lacking)
        if leaving:
            short = ", ".join(f"{lacking[name]} more of GPUType {name}" for name in sorted(set(leaving.values())))
            replicas = " and ".join(leaving)
            said[change.key] = (
                f"new replicas cannot all start beside the old ones, which would take {short}: {replicas} of the plan "
                "in force will leave, one at a time, before what replaces it serves"
            )
    return said


class _Change:
    """One service from one plan to the next."""

    def __init__(self, before: ServicePlan | None, after: ServicePlan) -> None:
        self.key = after.key
        self._old = {} if before is None else {variant.name: variant for variant in before.variants}
        self._new = {variant.name: variant for variant in after.variants}
        self.grows_on = {
            variant.gpu_type for name, variant in self._new.items() if variant.replicas > _replicas(self._old, name)
        }
        """GPU types on which there are to be more replicas of some variant."""

    def devices_meanwhile(self) -> Counter[str]:
        """The most devices in use at once where nothing old leaves before all that is new serves, by GPU type."""
        used: Counter[str] = Counter()
        for name, variant in (self._old | self._new).items():
            count = _replicas(self._new, name)
            if self.grows_on:
                count = max(count, _replicas(self._old, name))
            used[variant.gpu_type] += count * variant.devices
        return used

    def leaves_early(self, lacking: Mapping[str, int]) -> dict[str, str]:
        """`n x variant` of the old replicas that make room before their successors serve, and their GPU type."""
        if not self.grows_on:
            return {}
        found = {}
        for name, variant in sorted(self._old.items()):
            surplus = variant.replicas - _replicas(self._new, name)
            short = lacking.get(variant.gpu_type, 0)
            if surplus > 0 and short > 0:
                count = min(surplus, math.ceil(short / variant.devices))
                found[f"{count} x {name}"] = variant.gpu_type
        return found


def _replicas(variants: Mapping[str, PlannedVariant], name: str) -> int:
    return variants[name].replicas if name in variants else 0
