"""What the planning loop is given, from the cache: inventory, demand, and the objects to plan.

Inventory is computed when something it depends on changed, and now and then because deadlines pass by themselves.
Its outcome goes three ways: to the plan, to the ledger of free devices, and into each GPUType's status, where people
see it and where it survives a restart (`unavailableUntil`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import httpx2

from llmfleet.api import (
    DemandReport,
    FleetPolicySpec,
    GPUType,
    GPUTypeStatus,
    LLMService,
    ModelProfile,
    PowerDomain,
)
from llmfleet.operator.apply import Applier, FencedError, RefusedError
from llmfleet.operator.cache import Cache
from llmfleet.operator.demand import DemandEstimator
from llmfleet.operator.invalid import bounds_of_unknown, claims_of_unknown
from llmfleet.operator.inventory import observe_inventory
from llmfleet.operator.ledger import DeviceLedger
from llmfleet.operator.plan_book import PlanBook
from llmfleet.operator.planner import Planned
from llmfleet.operator.planner_protocol import MeasuredDemand
from llmfleet.operator.request_sizes import RequestSizes

log = logging.getLogger(__name__)

INVENTORY_INTERVAL_S = 10.0
"""How often inventory is looked at although nothing changed: pending deadlines pass by themselves."""
FOLLOW_S = 1.0
"""How often inventory is followed while it changes."""
ROUNDS_PER_STATUS = 3
"""The GPUTypes' statuses are written every so many rounds: while a fleet grows, each of its pods changes them."""
_ESTIMATE_SLICE = 50


class Fleet:
    """Inputs of the plan (`planner.Inputs`), and what follows from inventory."""

    def __init__(
        self,
        cache: Cache,
        book: PlanBook,
        ledger: DeviceLedger,
        measures_demand: bool,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._book = book
        self._ledger = ledger
        self._measures_demand = measures_demand
        self._now = now
        self._clock = clock
        self._estimator = DemandEstimator(cache.policy.demand_window_seconds)
        self._sizes = RequestSizes()
        self._devices: dict[str, int] = {}
        self._statuses: dict[str, GPUTypeStatus] = {}
        self._waiting: set[str] = set()
        self._shared: frozenset[str] = frozenset()
        self._dirty = True
        self._computed_at = clock()

    def mark_inventory(self) -> None:
        """A node, a pod, a GPUType or the policy changed."""
        self._dirty = True

    def policy(self) -> FleetPolicySpec:
        """The FleetPolicy's spec, or all defaults."""
        return self._cache.policy

    def keys(self, kind: str) -> list[str]:
        """Keys of the objects of one kind."""
        return list(self._store(kind))

    def find(self, kind: str, key: str) -> Planned | None:
        """The object to plan with; None when there is none or it is being deleted."""
        found = self._store(kind).get(key)
        return found if found is not None and found.metadata.deletion_timestamp is None else None

    def unreadable(self) -> list[str]:
        """Keys of services that do not parse and are not being deleted, in order."""
        return sorted(
            key
            for (kind, key), invalid in self._cache.invalid.items()
            if kind == LLMService.KIND and not invalid.deleting
        )

    def _store(self, kind: str) -> Mapping[str, Planned]:
        stores: dict[str, Mapping[str, Planned]] = {
            GPUType.KIND: self._cache.gpu_types,
            LLMService.KIND: self._cache.services,
            ModelProfile.KIND: self._cache.profiles,
            PowerDomain.KIND: self._cache.power_domains,
        }
        return stores[kind]

    def inventory(self) -> Mapping[str, int]:
        """Devices that the fleet may use, by GPUType name."""
        if self._bounds():
            # What the plans in force have may have changed since.
            self._dirty = True
        self.refresh()
        return self._devices

    def refresh(self) -> bool:
        """Computes inventory anew if it may have changed. Returns whether the number of devices did."""
        if not self._dirty and self._clock() - self._computed_at < INVENTORY_INTERVAL_S:
            return False
        self._dirty = False
        self._computed_at = self._clock()
        inventory = observe_inventory(
            self._cache.gpu_types,
            self._cache.nodes.values(),
            self._cache.foreign.values(),
            [pod for pods in self._cache.pods.values() for pod in pods.values()],
            self._cache.policy,
            self._now(),
            claims=claims_of_unknown(self._cache.invalid.values()),
            bounds=self._bounds(),
        )
        self._statuses = dict(inventory.statuses)
        self._ledger.set_statuses(inventory.statuses)
        before, self._devices = self._devices, dict(inventory.devices)
        return before != self._devices

    def _bounds(self) -> dict[str, tuple[int, str]]:
        return bounds_of_unknown(self._cache.invalid.values(), self._cache.gpu_types, self._book.plans().values())

    def stale_statuses(self) -> dict[str, GPUTypeStatus]:
        """Statuses that differ from what the API server has."""
        return {
            name: status
            for name, status in self._statuses.items()
            if name in self._cache.gpu_types and self._cache.gpu_types[name].status != status
        }

    def record_demand(self, reports: Mapping[str, DemandReport | None], now_s: float) -> bool:
        """Takes in one round of reports. Returns whether a request has begun to wait for a service that
        has no replicas: such a service is planned at once and not at the next interval."""
        self._estimator.window_s = self._cache.policy.demand_window_seconds
        self._estimator.record(reports, now_s)
        self._sizes.record(report for report in reports.values() if report is not None)
        for address in sorted(self._estimator.shared - self._shared):
            log.warning(
                "several gateways answer in turns at one address, so their demand is seen late and in part: give "
                "--gateway-url a name that resolves to each of them, such as a headless Service",
                extra={"gateway": address},
            )
        self._shared = self._estimator.shared
        waiting = {
            f"{demand.namespace}/{demand.service}"
            for report in reports.values()
            if report is not None
            for demand in report.services
            if demand.waiting > 0
        }
        plans = self._book.plans()
        new, self._waiting = waiting - self._waiting, waiting
        return any(not (plan := plans.get(key)) or not any(plan.replicas.values()) for key in new)

    @property
    def gateways_take_turns(self) -> bool:
        """Whether more gateways than addresses were heard."""
        return bool(self._shared)

    async def demand(self) -> dict[str, MeasuredDemand]:
        """Measured demand by service key; empty where no gateways are asked."""
        if not self._measures_demand:
            return {}
        plans = self._book.plans()
        observing = [service for service in self._cache.services.values() if service.spec.traffic.mode == "observe"]
        demand: dict[str, MeasuredDemand] = {}
        for start in range(0, len(observing), _ESTIMATE_SLICE):
            services = observing[start : start + _ESTIMATE_SLICE]
            buckets = {
                service.key: profile.spec.buckets
                for service in services
                if (profile := self._cache.profiles.get(f"{service.metadata.namespace}/{service.spec.profile}"))
            }
            starting = {service.key for service in services if self._starting(service)}
            for key, rates in self._estimator.estimate(services, buckets, plans, starting).items():
                sizes = self._sizes.of(key, buckets[key], plans.get(key))
                demand[key] = MeasuredDemand(rps=rates, sizes=sizes)
            await asyncio.sleep(0)
        return demand

    def _starting(self, service: LLMService) -> bool:
        """Whether none of its engines is Ready and one still has time to become so."""
        pods = [pod for pod in self._cache.pods.get(service.key, {}).values() if not (pod.finished or pod.terminating)]
        youngest = max((pod.created_at for pod in pods), default=None)
        if youngest is None or any(pod.ready for pod in pods):
            return False
        return (self._now() - youngest).total_seconds() < service.spec.engine.startup_deadline_seconds


async def keep_inventory(
    fleet: Fleet, applier: Applier, ledger: DeviceLedger, replan: Callable[[], None], enqueue: Callable[[str], None]
) -> None:
    """Follows inventory for ever: wakes the planner when there is more or less of something, has services that wait
    for room look again when some was freed, and writes the GPUTypes' statuses."""
    free: dict[str, int] = {}
    for number in itertools.count():
        if fleet.refresh():
            replan()
        freed, free = free, ledger.free()
        if any(amount > freed.get(name, 0) for name, amount in free.items()):
            for key in ledger.waiting():
                enqueue(key)
        stale = fleet.stale_statuses() if number % ROUNDS_PER_STATUS == 0 else {}
        for name, status in stale.items():
            try:
                await applier.write_gpu_type_status(name, status)
            except FencedError:
                break
            except (RefusedError, httpx2.HTTPError) as error:
                log.warning("cannot write a GPUType's status", extra={"gpu_type": name, "cause": str(error)})
        await asyncio.sleep(FOLLOW_S)
