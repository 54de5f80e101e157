"""From a key to done: one round of one service.

    key --cache, plan, ledger--> Observed --reconcile--> actions --Applier--> API server --> cache

Several workers take keys from the queue; the queue sees to it that no key is in two hands. Everything that decides
is in the pure core; here a round is put together, carried out, and its failures are sorted: what the API server
refuses becomes the service's condition, all else is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import httpx2

from llmfleet.api import (
    CONDITION_ENGINES_READY,
    CONDITION_PLANNED,
    CONDITION_READY,
    Condition,
    LLMService,
    LLMServiceStatus,
)
from llmfleet.operator.apply import Applier, FencedError, NameTakenError, ObjectRef, RefusedError
from llmfleet.operator.cache import Cache
from llmfleet.operator.invalid import REASON_INVALID_SPEC, InvalidObject
from llmfleet.operator.ledger import DeviceLedger
from llmfleet.operator.metrics import Metrics
from llmfleet.operator.model import (
    Action,
    ApplyDeployment,
    EmitEvent,
    Finding,
    Observed,
    PluginPackage,
    ProvideMigration,
    WriteStatus,
)
from llmfleet.operator.parse import deployment_from_object
from llmfleet.operator.plan_book import PlanBook
from llmfleet.operator.provide import NotProvidedError
from llmfleet.operator.reconcile import CORRECTION_PAUSE, REASON_DRIFT_CORRECTED, reconcile
from llmfleet.operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

REASON_REFUSED = "ApplyRefused"
"""Reason of the conditions of a service whose objects the API server refuses."""
REASON_NAME_TAKEN = "NameTaken"
"""The same where an object of somebody else has the name of one of the service's."""
BACKLOG = 50
"""Services in the queue beyond which engines and routes go before statuses."""
PROVIDED_FOR_S = 600.0
"""How long what pods with the plug-in mount is taken to be there, or to be refused, before it is asked for again."""
REASON_NOT_PROVIDED = "NotProvided"
"""Reason of NoMigration where the API server refuses the peer key or the plug-in."""
FIRST_PLAN_WAIT_S = 5.0
"""How long a new service waits for its first plan before its status says that it waits."""


class ServiceReconciler:
    """Works through the queue."""

    def __init__(
        self,
        cache: Cache,
        book: PlanBook,
        ledger: DeviceLedger,
        applier: Applier,
        queue: WorkQueue,
        metrics: Metrics,
        plugin: PluginPackage | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cache = cache
        self._book = book
        self._ledger = ledger
        self._applier = applier
        self._queue = queue
        self._metrics = metrics
        self._plugin = plugin
        self._now = now
        self._provided: dict[str, tuple[float, Finding | None]] = {}
        """By uid of a service: until when what its pods mount counts as there, or why it is not to be had."""
        self._turn = asyncio.Lock()

    async def work(self) -> None:
        """One worker: takes keys for ever."""
        while True:
            key = await self._queue.get()
            # One service is decided on per turn of the event loop. Deciding takes a millisecond or two, and many in a
            # row, by one worker or by all, would keep it from everything else.
            async with self._turn:
                await asyncio.sleep(0)
            began = time.perf_counter()
            result = "error"
            try:
                result = await self.round(key)
            except FencedError:
                result = "fenced"
            except httpx2.HTTPError as error:
                log.warning("reconcile failed", extra={"service": key, "cause": repr(error)})
            except Exception:
                # A fault in one service's round must not end the others'.
                log.exception("reconcile crashed", extra={"service": key})
            self._metrics.reconciles.labels(result).inc()
            self._metrics.reconcile_seconds.observe(time.perf_counter() - began)
            if result in ("done", "nothing"):
                self._queue.done(key)
            else:
                self._queue.failed(key)

    async def round(self, key: str) -> str:
        """One round. Returns `nothing` or `done`, or `refused` when it has to be tried again."""
        invalid = self._cache.invalid.get((LLMService.KIND, key))
        if invalid is not None:
            return await self._report_invalid(invalid)
        service = self._cache.services.get(key)
        if service is None or service.metadata.deletion_timestamp is not None:
            return "nothing"
        if self._waits_for_first_plan(service):
            self._queue.add_after(key, FIRST_PLAN_WAIT_S)
            return "nothing"
        observed = self._observed(service)
        if any(deployment.drift for deployment in observed.deployments):
            self._queue.add_after(key, CORRECTION_PAUSE.total_seconds())
        actions: Sequence[Action] = reconcile(self._book.desired(key), observed)
        if not actions:
            return "nothing"
        actions = self._most_urgent(key, actions)
        self._ledger.hold(
            key, [deployment_from_object(action.manifest) for action in actions if isinstance(action, ApplyDeployment)]
        )
        try:
            await self._applier.execute(service, actions)
        except NotProvidedError as error:
            log.warning("engines start without the plug-in", extra={"service": key, "cause": str(error)})
            self._remember_provided(service, (REASON_NOT_PROVIDED, str(error)))
            self._queue.add(key)
            return "done"
        except RefusedError as error:
            reason = REASON_NAME_TAKEN if isinstance(error, NameTakenError) else REASON_REFUSED
            await self._report_refused(service, actions, reason, str(error))
            return "refused"
        finally:
            self._ledger.release(key)
        if any(isinstance(action, ProvideMigration) for action in actions):
            self._remember_provided(service, None)
        return "done"

    def _remember_provided(self, service: LLMService, refused: Finding | None) -> None:
        now_s = self._now().timestamp()
        self._provided = {uid: known for uid, known in self._provided.items() if known[0] > now_s}
        self._provided[service.metadata.uid] = now_s + PROVIDED_FOR_S, refused

    def _observed(self, service: LLMService) -> Observed:
        key = service.key
        until_s, refused = self._provided.get(service.metadata.uid, (0.0, None))
        known = until_s > self._now().timestamp()
        return Observed(
            service=service,
            deployments=tuple(self._cache.deployments.get(key, {}).values()),
            pods=tuple(self._cache.pods.get(key, {}).values()),
            routing=self._cache.routing.get(key),
            gpu_types=self._cache.gpu_types,
            free_devices=self._ledger.free(),
            wanted_devices=self._ledger.wanted(),
            unfit_nodes=self._cache.unfit_nodes,
            policy=self._cache.policy,
            now=self._now(),
            plugin=refused if known and refused is not None else self._plugin,
            migration_provided=known,
        )

    def _most_urgent(self, key: str, actions: Sequence[Action]) -> Sequence[Action]:
        """All actions; while many services wait, only those that change what runs. What is told about them then
        comes with the service's next turn, and by that time there is often more to tell."""
        if len(self._queue) <= BACKLOG:
            return actions
        urgent = [
            action
            for action in actions
            if not isinstance(action, WriteStatus | EmitEvent)
            # It cannot be told later: by then all is as it should be.
            or (isinstance(action, EmitEvent) and action.reason == REASON_DRIFT_CORRECTED)
        ]
        if not urgent:
            return actions
        if len(urgent) < len(actions):
            self._queue.add(key)
        return urgent

    def _waits_for_first_plan(self, service: LLMService) -> bool:
        """A service that nothing was done for yet, and whose plan is on its way: one status less to write."""
        key = service.key
        created_at = service.metadata.creation_timestamp
        return (
            self._book.desired(key) is None
            and key not in self._cache.deployments
            and key not in self._cache.routing
            and created_at is not None
            and (self._now() - created_at).total_seconds() < FIRST_PLAN_WAIT_S
        )

    async def _report_invalid(self, invalid: InvalidObject) -> str:
        """Says in the status of an object that does not parse what is wrong with it. Its engines are left alone."""
        if invalid.reported:
            return "nothing"
        conditions = [
            Condition(
                type=type_,
                status="False",
                reason=REASON_INVALID_SPEC,
                message=invalid.message,
                observed_generation=invalid.generation,
                last_transition_time=self._now().replace(microsecond=0),
            ).to_wire()
            for type_ in (CONDITION_PLANNED, CONDITION_READY)
        ]
        status = {"observedGeneration": invalid.generation, "conditions": conditions}
        await self._applier.patch_status(invalid.namespace or "", invalid.name, status)
        ref = ObjectRef(invalid.kind, invalid.namespace, invalid.name, invalid.uid)
        self._applier.emit(ref, "Warning", REASON_INVALID_SPEC, invalid.message)
        return "done"

    async def _report_refused(self, service: LLMService, actions: Sequence[Action], reason: str, message: str) -> None:
        """Writes the status that the round would have written, with the refusal in it."""
        intended = next((action.status for action in actions if isinstance(action, WriteStatus)), service.status)
        status = refused_status(intended, service, reason, message, self._now())
        log.warning("refused", extra={"service": service.key, "reason": reason, "cause": message})
        if status != service.status:
            await self._applier.write_status(service.metadata.namespace or "", service.metadata.name, status)
            self._applier.emit(ObjectRef.of(service), "Warning", reason, message)


def refused_status(
    intended: LLMServiceStatus, service: LLMService, reason: str, message: str, now: datetime
) -> LLMServiceStatus:
    """`intended` with EnginesReady and Ready False because an object cannot be written."""
    before = {condition.type: condition for condition in service.status.conditions}

    def refused(type_: str) -> Condition:
        old = before.get(type_)
        return Condition(
            type=type_,
            status="False",
            reason=reason,
            message=message[:4096],
            observed_generation=service.metadata.generation,
            last_transition_time=old.last_transition_time
            if old is not None and old.status == "False"
            else now.replace(microsecond=0),
        )

    replaced = (CONDITION_ENGINES_READY, CONDITION_READY)
    kept = [condition for condition in intended.conditions if condition.type not in replaced]
    return intended.model_copy(update={"conditions": [*kept, *map(refused, replaced)]})
