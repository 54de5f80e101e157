"""Free and wanted devices of the whole fleet, kept service by service.

`inventory.free_devices` and `inventory.wanted_devices` look at every engine of the fleet. Asked for by each of a
thousand reconciles they would cost a million visits, so their sums are kept here: each service's share is computed
by those very functions when its own objects change, and added up.

A reconcile that has decided to grow holds its room (`hold`) from that moment until its writes are in the cache: the
reconcile of another service, which may run while the first waits for the API server, is not promised the same room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmfleet.api import GPUTypeStatus, ServicePlan
from llmfleet.operator.cache import Cache
from llmfleet.operator.inventory import free_devices, wanted_devices
from llmfleet.operator.model import ObservedDeployment


class DeviceLedger:
    """Sums over services, by GPUType name."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._plans: Mapping[str, ServicePlan] = {}
        self._available: dict[str, int] = {}
        self._shares: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
        self._held: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._pending: dict[str, dict[str, ObservedDeployment]] = {}

    def mark(self, key: str) -> None:
        """A Deployment or pod of this service, or its plan, changed."""
        self._dirty.add(key)

    def set_statuses(self, statuses: Mapping[str, GPUTypeStatus]) -> None:
        """Takes what there is of each type."""
        available = {name: status.available_devices for name, status in statuses.items()}
        if available.keys() != self._available.keys():
            self._dirty |= self._cache.deployments.keys() | self._cache.pods.keys() | self._plans.keys()
        self._available = available

    def set_plans(self, plans: Mapping[str, ServicePlan], changed: Iterable[str]) -> None:
        """Takes the plans in force."""
        self._plans = plans
        self._dirty |= set(changed)

    def hold(self, key: str, deployments: Iterable[ObservedDeployment]) -> None:
        """Counts these Deployments as there, until `release`."""
        self._pending[key] = {deployment.name: deployment for deployment in deployments}
        self._dirty.add(key)

    def release(self, key: str) -> None:
        """The writes of this service are done or failed: the cache says what is so."""
        if self._pending.pop(key, None):
            self._dirty.add(key)

    def free(self) -> dict[str, int]:
        """Devices that no engine holds or is promised; negative where the fleet holds more than there is."""
        self._refresh()
        return {name: amount - self._held.get(name, 0) for name, amount in self._available.items()}

    def wanted(self) -> dict[str, int]:
        """Devices that plans ask for and that are not free."""
        free = self.free()
        short = {name: amount - max(0, free.get(name, 0)) for name, amount in self._asked.items()}
        return {name: amount for name, amount in short.items() if amount > 0}

    def waiting(self) -> list[str]:
        """Services whose plan asks for more than their Deployments do: they wait for room."""
        self._refresh()
        return [key for key, (_, asked) in self._shares.items() if asked]

    def _refresh(self) -> None:
        nothing_there = {name: GPUTypeStatus() for name in self._available} if self._dirty else {}
        for key in self._dirty:
            deployments = list((self._cache.deployments.get(key, {}) | self._pending.get(key, {})).values())
            pods = self._cache.pods.get(key, {}).values()
            held = {name: -free for name, free in free_devices(nothing_there, deployments, pods).items() if free}
            plan = self._plans.get(key)
            asked = wanted_devices([plan], deployments, {}) if plan is not None else {}
            old_held, old_asked = self._shares.pop(key, ({}, {}))
            if held or asked:
                self._shares[key] = (held, asked)
            _add(self._held, old_held, -1)
            _add(self._held, held, 1)
            _add(self._asked, old_asked, -1)
            _add(self._asked, asked, 1)
        self._dirty.clear()


def _add(total: dict[str, int], share: Mapping[str, int], sign: int) -> None:
    for name, amount in share.items():
        total[name] = total.get(name, 0) + sign * amount
