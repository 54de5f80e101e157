"""The table of contents: everything that runs on the replica that acts, and what wakes what.

list, watch (kopf) --> Cache --on_change--> queue of services --> workers --> API server
                                   |                                ^
                                   +--> planner (own process) ------+  keys whose plan changed
gateways (admin ports) ----------> demand ----^
inventory --> GPUType status, planner, services that wait for room
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import httpx2
from lightkube import AsyncClient

from llmfleet.api import (
    CONDITION_READY,
    DemandReport,
    FleetPolicy,
    GPUType,
    LLMService,
    ModelProfile,
    Part,
    Plan,
    PowerDomain,
)
from llmfleet.operator.accepted import AcceptedReporter
from llmfleet.operator.apply import Applier, ObjectRef
from llmfleet.operator.cache import Cache, Observation, Value
from llmfleet.operator.corrections import CorrectionKeeper
from llmfleet.operator.fleet import Fleet, keep_inventory
from llmfleet.operator.gateways import GatewayPoller
from llmfleet.operator.invalid import REASON_INVALID_SPEC, InvalidObject
from llmfleet.operator.kinds import WATCHED, WatchedKind
from llmfleet.operator.leader import LeaderElector
from llmfleet.operator.ledger import DeviceLedger
from llmfleet.operator.metrics import Metrics
from llmfleet.operator.model import ObservedConfigMap, ObservedDeployment, ObservedPod
from llmfleet.operator.observations import EngineObserver
from llmfleet.operator.plan_book import PlanBook
from llmfleet.operator.planner import PLANNED_KINDS, FleetPlanner, PlanningState
from llmfleet.operator.plugin_package import build_package
from llmfleet.operator.routing import restore_plan
from llmfleet.operator.services import ServiceReconciler
from llmfleet.operator.settings import OperatorSettings
from llmfleet.operator.watch import Inbox, Lister, Watches, resync
from llmfleet.operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

WORKERS = 12
"""Services that are reconciled at once; each waits for the API server most of the time. Their answers come in bunches,
and a bunch of this many takes the event loop some 20 ms."""
RECHECK_S = 15.0
"""How often a service that is not Ready is looked at although nothing changed: deadlines pass by themselves."""
RECHECK_READY_S = 600.0
"""The same for a service that is Ready, for which there are no deadlines."""
SETTLE_S = 0.1
"""How long changes of a service's engines are collected: Kubernetes reports one step of a rollout in many."""
LIST_RETRY_S = 1.0
WATCHES_SILENT_S = 60.0
"""kopf's event loop counts as dead when it took no turn for this long."""


@dataclass(slots=True)
class OperatorState:
    """What health and metrics are read from; it exists on every replica, leading or not."""

    elector: LeaderElector
    cache: Cache = field(default_factory=Cache)
    book: PlanBook = field(default_factory=PlanBook)
    queue: WorkQueue = field(default_factory=WorkQueue)
    planner: FleetPlanner | None = None
    watches: Watches | None = None
    elected: bool = False
    synced: bool = False

    @property
    def leading(self) -> bool:
        """Whether this replica may write."""
        return self.elector.holds

    @property
    def queue_depth(self) -> int:
        """Services that wait for a worker."""
        return len(self.queue)

    @property
    def planning(self) -> PlanningState | None:
        """Figures of the planning loop."""
        return self.planner.state if self.planner is not None else None

    @property
    def newest_plan(self) -> Plan | None:
        """Head of the newest plan."""
        return self.book.newest

    def services(self) -> Iterator[LLMService]:
        """Every service."""
        return iter(list(self.cache.services.values()))

    def profiles(self) -> Iterator[ModelProfile]:
        """Every ModelProfile."""
        return iter(list(self.cache.profiles.values()))

    def not_alive(self) -> str | None:
        """Why this process should be started again."""
        silent_s = self.watches.silent_s() if self.watches is not None else 0.0
        return f"no turn of the watch loop for {silent_s:.0f} s" if silent_s > WATCHES_SILENT_S else None

    def not_ready(self) -> str | None:
        """Why this replica is not where it should be. A standby that waits for the Lease is."""
        return "the caches are not complete" if self.elected and not self.synced else None


async def run_controllers(
    client: AsyncClient, settings: OperatorSettings, state: OperatorState, metrics: Metrics
) -> None:
    """Fills the caches, then runs everything until cancelled or until one part crashes (ExceptionGroup)."""
    cache, book, queue = state.cache, state.book, state.queue
    ledger = DeviceLedger(cache)
    applier = Applier(client, cache, may_write=lambda: state.elector.holds)
    fleet = Fleet(cache, book, ledger, measures_demand=bool(settings.gateway_urls))

    def on_planned(changed: set[str]) -> None:
        if state.planner is not None:
            metrics.plan_seconds.observe(state.planner.state.last_duration_s)
        ledger.set_plans(book.plans(), changed)
        for key in changed:
            queue.add(key)

    planner = FleetPlanner(fleet, book, on_planned)
    state.planner = planner
    lister = Lister(client, cache)
    accepted = AcceptedReporter(cache, applier)
    wiring = _Wiring(cache, queue, ledger, fleet, planner, applier, accepted)
    cache.on_change = wiring.on_change

    await asyncio.gather(planner.prepare(), *[_fill(lister, watched) for watched in WATCHED])
    # In a thread: read in one piece, the tables of a large fleet would stall the event loop.
    book.restored = await asyncio.to_thread(restore_plan, list(cache.routing.values()))
    ledger.set_plans(book.plans(), cache.services)
    fleet.refresh()
    state.synced = True
    log.info(
        "caches are complete",
        extra={"services": len(cache.services), "nodes": len(cache.nodes), "restored": book.restored is not None},
    )

    watches = Watches(Inbox(cache, asyncio.get_running_loop()), cache)
    state.watches = watches
    # In a thread: it reads a hundred files.
    plugin = await asyncio.to_thread(build_package)
    reconciler = ServiceReconciler(cache, book, ledger, applier, queue, metrics, plugin)

    observer = EngineObserver()
    keeper = CorrectionKeeper(cache, observer, planner, applier)

    def on_demand(reports: Mapping[str, DemandReport | None], detail: Part, now_s: float) -> None:
        metrics.observe_gateways(reports)
        if fleet.record_demand(reports, now_s):
            planner.wake()
        observer.record(reports, detail, now_s, take_turns=fleet.gateways_take_turns)

    gateways = GatewayPoller(settings.gateway_urls, settings.gateway_token_file, on_demand)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watches.run(), name="watches")
        tasks.create_task(resync(lister, watches), name="resync")
        tasks.create_task(planner.run(), name="planner")
        tasks.create_task(keep_inventory(fleet, applier, ledger, planner.wake, queue.add), name="inventory")
        tasks.create_task(_recheck(cache, queue), name="recheck")
        tasks.create_task(applier.post_events(), name="events")
        tasks.create_task(accepted.run(), name="accepted")
        if settings.gateway_urls:
            tasks.create_task(gateways.run(), name="gateways")
            tasks.create_task(keeper.run(), name="corrections")
        for number in range(WORKERS):
            tasks.create_task(reconciler.work(), name=f"worker-{number}")


class _Wiring:
    """Which change concerns whom."""

    def __init__(
        self,
        cache: Cache,
        queue: WorkQueue,
        ledger: DeviceLedger,
        fleet: Fleet,
        planner: FleetPlanner,
        applier: Applier,
        accepted: AcceptedReporter,
    ) -> None:
        self._cache = cache
        self._queue = queue
        self._ledger = ledger
        self._fleet = fleet
        self._planner = planner
        self._applier = applier
        self._accepted = accepted

    def on_change(self, observation: Observation, before: Value | None) -> None:
        """Called by the cache after each change."""
        kind, key, value = observation.kind, observation.key, observation.value
        self._accepted.mark(kind, key)
        if kind in PLANNED_KINDS and (_spec_changed(before, value) or _learnt(before, value)):
            self._planner.mark(kind, key)
        if kind in ("Node", "Pod", GPUType.KIND, FleetPolicy.KIND):
            self._fleet.mark_inventory()
        if kind == LLMService.KIND:
            # Its own status is no news to it; a status that somebody else wrote is.
            if not observation.own or _spec_changed(before, value):
                self._queue.add(key)
        elif isinstance(value, InvalidObject):
            ref = ObjectRef(kind, value.namespace, value.name, value.uid)
            self._applier.emit(ref, "Warning", REASON_INVALID_SPEC, value.message)
        elif kind == FleetPolicy.KIND and _spec_changed(before, value):
            self._planner.wake()
            self._everyone()
        elif kind == GPUType.KIND and _spec_changed(before, value):
            self._everyone()
        for owned in (before, value):
            if isinstance(owned, ObservedPod | ObservedDeployment | ObservedConfigMap):
                self._ledger.mark(owned.key)
                self._queue.add_after(owned.key, SETTLE_S)

    def _everyone(self) -> None:
        for service in self._cache.services:
            self._queue.add(service)


def _spec_changed(before: Value | None, after: Value | None) -> bool:
    """Whether the planner has to know: not for a status, and not for labels."""
    custom = FleetPolicy | GPUType | LLMService | ModelProfile | PowerDomain
    if isinstance(before, custom) and isinstance(after, custom):
        old, new = before.metadata, after.metadata
        return (old.uid, old.generation, old.deletion_timestamp) != (new.uid, new.generation, new.deletion_timestamp)
    if isinstance(before, InvalidObject) and isinstance(after, InvalidObject):
        return (before.uid, before.generation, before.deleting) != (after.uid, after.generation, after.deleting)
    return True


def _learnt(before: Value | None, after: Value | None) -> bool:
    """Whether a profile has other corrections: the only part of a status that a plan depends on."""
    return (
        isinstance(before, ModelProfile)
        and isinstance(after, ModelProfile)
        and before.status.corrections != after.status.corrections
    )


async def _fill(lister: Lister, watched: WatchedKind) -> None:
    """Lists one kind, however long it takes: nothing is decided before all of them are in."""
    said = ""
    while True:
        try:
            await lister.fill(watched)
            return
        except httpx2.HTTPError as error:
            if str(error) != said:
                said = str(error)
                log.warning("cannot list yet", extra={"kind": watched.kind, "cause": said})
            await asyncio.sleep(LIST_RETRY_S)


async def _recheck(cache: Cache, queue: WorkQueue) -> None:
    """Looks again at every service that is not Ready each `RECHECK_S`, and at one that is each `RECHECK_READY_S`."""
    rounds = 0
    while True:
        await asyncio.sleep(RECHECK_S)
        rounds += 1
        for number, (key, service) in enumerate(list(cache.services.items())):
            ready = any(c.type == CONDITION_READY and c.status == "True" for c in service.status.conditions)
            if not ready or (number + rounds) % round(RECHECK_READY_S / RECHECK_S) == 0:
                queue.add(key)
        for kind, key in list(cache.invalid):
            if kind == LLMService.KIND:
                queue.add(key)
