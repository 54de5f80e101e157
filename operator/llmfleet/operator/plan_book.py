"""What is decided for each service, put together from the planner's answers.

    Solved ---------> take      what is in force from now on
    Solved (shadow) -> propose  what would be, beside what is in force
    Rejected -------> reject    nothing new, and why

Out flows, by service, what its reconcile is given (`desired`), and for the next solve the plan in force, whole. An
answer holds only what changed since the one before, so the book is what knows the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmfleet.api import Plan, Refusal, ServicePlan
from llmfleet.operator.model import Desired, PlannedService, Shadow
from llmfleet.operator.planner_protocol import Rejected, Solved, refusals_by_key

REASON_REJECTED = "PlanRejected"
"""The newest plan would have broken a constraint, so it was dropped."""


@dataclass(slots=True)
class PlanBook:
    """What is decided now, by service.

    A service keeps the id of the plan that last changed *its* part. The fleet's newest plan has a newer id whenever
    anything anywhere changed, and a thousand routing tables are not rewritten for one service's sake.
    """

    services: dict[str, PlannedService] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    proposed: dict[str, PlannedService] | None = None
    """What would be decided, while the policy's mode is `shadow`: `services` is then what was decided before, and stays
    in force. None in mode `apply`."""
    newest: Plan | None = None
    """Head of the newest plan; its `services` are those that changed then."""
    restored: Plan | None = None
    """What was in force before this process started, until the first solve. It is not what is *desired*: specs may
    have changed since, and until a solve has seen them nobody may claim that they are planned."""

    def take(self, solved: Solved, generations: Mapping[str, int]) -> set[str]:
        """Takes a new plan over. `generations` are those of the specs that it was made from, by service key.
        Returns the keys of the services for which something changed."""
        newer = {service.key: service for service in solved.plan.services}
        changed = set(solved.gone)
        if self.proposed is not None:
            # The first plan after shadow mode is a whole one, and everyone is told.
            changed |= self.proposed.keys() | (self.services.keys() - newer.keys())
            self.proposed = None
        # A planner that was started anew does not know of what is gone since.
        changed |= self.services.keys() - newer.keys() - generations.keys()
        for key in changed - newer.keys():
            self.services.pop(key, None)
        for key in newer.keys() | self.services.keys():
            current = self.services.get(key)
            plan = newer.get(key)
            generation = generations.get(key, 0)
            if plan is not None and (current is None or current.plan != plan):
                self.services[key] = PlannedService(plan_id=solved.plan.plan_id, plan=plan, generation=generation)
                changed.add(key)
            elif current is not None and current.generation != generation:
                self.services[key] = replace(current, generation=generation)
                changed.add(key)
        self.newest = solved.plan
        return changed | self._refuse(solved.plan)

    def propose(self, solved: Solved, generations: Mapping[str, int]) -> set[str]:
        """The same for a plan that is only shown: what is in force stays, but for services that are gone."""
        newer = {service.key: service for service in solved.plan.services}
        changed = set(solved.gone)
        before = self.proposed or {}
        known = {key: before[key].plan for key in before.keys() - changed} | newer
        self.proposed = {}
        for key, plan in known.items():
            if key not in generations:
                continue
            current, generation = before.get(key), generations[key]
            if current is None or current.plan != plan:
                current = PlannedService(plan_id=solved.plan.plan_id, plan=plan, generation=generation)
            self.proposed[key] = replace(current, generation=generation)
            if self.proposed[key] != before.get(key):
                changed.add(key)
        alive = generations.keys() | {kept.key for kept in solved.plan.kept}
        for key in self.services.keys() - alive:
            del self.services[key]
            changed.add(key)
        if self.newest is not None:
            kept = [service for service in self.newest.kept if service.key in alive]
            self.newest = self.newest.model_copy(update={"kept": kept})
        elif self.restored is not None:
            services = [service for service in self.restored.services if service.key in alive]
            self.restored = self.restored.model_copy(update={"services": services})
        return changed | self._refuse(solved.plan)

    def _refuse(self, plan: Plan) -> set[str]:
        refusals = refusals_by_key(plan)
        changed = {key for key, refusal in refusals.items() if self.refusals.get(key) != refusal}
        changed |= self.refusals.keys() - refusals.keys()
        self.refusals = refusals
        return changed

    def reject(self, rejected: Rejected, generations: Mapping[str, int]) -> set[str]:
        """Notes that a plan was dropped: what is in force stays, and a service whose spec no plan in force has seen is
        told why. Returns the keys of those."""
        message = (
            f"the new plan broke {rejected.count} of its own constraints and was dropped; the plan in force stays. "
            f"This is a bug of llmfleet, please report it: {rejected.violations[0]}"
        )
        latest = self.services if self.proposed is None else self.proposed
        seen = {key: planned.generation for key, planned in latest.items()}
        seen |= {key: refusal.generation for key, refusal in self.refusals.items()}
        waiting = {key: generation for key, generation in generations.items() if seen.get(key) != generation}
        for key, generation in waiting.items():
            namespace, name = key.split("/")
            self.refusals[key] = Refusal(
                namespace=namespace, service=name, reason=REASON_REJECTED, message=message, generation=generation
            )
        return set(waiting)

    def desired(self, key: str) -> Desired:
        """What the service's reconcile is given."""
        if self.proposed is not None and key in self.proposed and key not in self.refusals:
            return Shadow(proposed=self.proposed[key], in_force=self.services.get(key))
        return self.refusals.get(key) or self.services.get(key)

    def in_force(self) -> Plan | None:
        """The newest plan, whole; before the first solve the restored one."""
        if self.newest is None:
            return self.restored
        return self.newest.model_copy(update={"services": [planned.plan for planned in self.services.values()]})

    def plans(self) -> dict[str, ServicePlan]:
        """Plans in force by service key, those included by which services go on running that cannot be planned."""
        if self.newest is None:
            return {service.key: service for service in self.restored.services} if self.restored is not None else {}
        kept = {service.key: service for service in self.newest.kept}
        return kept | {key: planned.plan for key, planned in self.services.items()}
