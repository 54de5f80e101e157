"""How many replicas each variant has next, and whose template changes next: make before break.

    plan + Deployments + pods + free devices  -->  Step(replicas by variant, rolling variant, what blocks)

Growth comes first and takes only room that is there. Old capacity beyond the plan (the surplus) goes when all that
is planned serves; until then it keeps serving. Where there is no room for the new beside the old, one surplus
replica leaves at a time, and the next only after what it made room for serves: the old must break first, but never
more of it than needed. That room may be needed by another service (two services that swap GPU types), so a blocked
service gives up surplus on any type that somebody wants.

Pods beyond the plan that cannot serve anyway (no node, still pulling, crash-looping) are not worth keeping and go
at once. A running engine that is not Ready is kept: it may be loading, or busy.

A changed template reaches one variant at a time, the worst off first. While one is rolling no other starts, so a
template that does not come up takes down at most one surge pod, or `maxUnavailableEngines` where there is no room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from llmfleet.api import ServicePlan
from llmfleet.operator.engine_variant import Variant
from llmfleet.operator.inventory import pending_deadline_s
from llmfleet.operator.model import Observed, ObservedDeployment, ObservedPod
from llmfleet.operator.victims import is_marked

STUCK_SHARE = 0.5
"""A pod without a node for this share of its pending deadline shows that the room it was promised is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantState:
    """One variant of one service: what is planned and what is there."""

    variant: Variant
    planned: int
    deployment: ObservedDeployment | None
    pods: Sequence[ObservedPod]
    """All of its pods that still hold something, terminating ones included."""

    @property
    def asked(self) -> int:
        """Replicas that the Deployment asks for."""
        return self.deployment.replicas if self.deployment is not None else 0

    @property
    def staying(self) -> list[ObservedPod]:
        """Pods that are not being deleted."""
        return [pod for pod in self.pods if not pod.terminating]

    @property
    def serving(self) -> int:
        """Replicas that a gateway may use, whatever their template."""
        return sum(pod.serving for pod in self.pods)

    @property
    def missing(self) -> int:
        """Planned replicas that do not serve."""
        return max(0, self.planned - self.serving)

    @property
    def surplus(self) -> int:
        """Replicas that the Deployment asks for beyond the plan."""
        return max(0, self.asked - self.planned)

    @property
    def rolling(self) -> bool:
        """Its pods are not all on the template of its Deployment yet."""
        if self.deployment is None:
            return False
        current = self.deployment.template_hash
        return self.deployment.rolling or any(pod.template_hash != current for pod in self.staying)

    @property
    def worth_keeping(self) -> int:
        """Replicas that serve, drain, or are running and may yet serve."""
        running = sum(pod.ready or (pod.phase == "Running" and not pod.waiting_reason) for pod in self.staying)
        return max(running, self.deployment.ready_replicas if self.deployment is not None else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The next move of one service."""

    replicas: Mapping[str, int]
    """Replicas that each variant's Deployment shall ask for, once its victims are marked."""
    rolling: str | None = None
    """The one variant whose template may change now."""
    surge: Mapping[str, bool]
    """Whether the rolling update of a variant may make the new pod before the old is gone."""
    blocked: Mapping[str, int]
    """Planned replicas, by variant, that there is no room for beside the old."""


def variant_states(observed: Observed, plan: ServicePlan | None) -> dict[str, VariantState]:
    """Every variant that is planned, deployed or has pods, by name. Without a plan, what is deployed is planned."""
    variants: dict[str, Variant] = {}
    deployments: dict[str, ObservedDeployment] = {}
    pods: dict[str, list[ObservedPod]] = {}
    for pod in observed.pods:
        if not pod.finished:
            pods.setdefault(pod.variant, []).append(pod)
            variants.setdefault(pod.variant, Variant(pod.variant, pod.gpu_type, max(1, pod.devices)))
    for deployment in observed.deployments:
        deployments[deployment.variant] = deployment
        layout = (deployment.tensor_parallel, deployment.pipeline_parallel)
        variants[deployment.variant] = Variant(deployment.variant, deployment.gpu_type, *layout)
    planned = {name: deployment.replicas for name, deployment in deployments.items()}
    if plan is not None:
        planned = plan.replicas
        variants |= {v.name: Variant.of(v) for v in plan.variants}
    return {
        name: VariantState(
            variant=variants[name],
            planned=planned.get(name, 0),
            deployment=deployments.get(name),
            pods=sorted(pods.get(name, ()), key=lambda pod: pod.name),
        )
        for name in sorted(variants)
    }


def next_step(
    states: Mapping[str, VariantState],
    observed: Observed,
    outdated: Iterable[str],
    renderable: Iterable[str],
) -> Step:
    """Decides the next move.

    `outdated` are deployed variants whose live template is not what the spec asks for, `renderable` those that new
    pods can be made of: they have a template, live or rendered.
    """
    free = {name: max(0, amount) for name, amount in observed.free_devices.items()}
    possible = set(renderable)
    replicas = {name: state.asked for name, state in states.items()}
    blocked: dict[str, int] = {}
    for name, state in states.items():
        growth = state.planned - state.asked
        if growth > 0 and name in possible:
            gpu_type, devices = state.variant.gpu_type, state.variant.devices
            grown = min(growth, free.get(gpu_type, 0) // devices)
            free[gpu_type] = free.get(gpu_type, 0) - grown * devices
            replicas[name] += grown
            if grown < growth:
                blocked[name] = growth - grown
        stuck = _stuck(state, states, observed)
        if stuck and state.planned > 0:
            blocked[name] = blocked.get(name, 0) + stuck

    releases = _releases(states, observed, blocked, free)
    all_serve = all(state.missing == 0 for state in states.values())
    for name, state in states.items():
        if state.surplus == 0:
            continue
        if all_serve:
            replicas[name] = state.planned
        else:
            useful = max(state.planned, min(state.asked, state.worth_keeping))
            replicas[name] = max(state.planned, min(useful, state.asked - releases.get(name, 0)))

    rolling = _next_to_roll(states, outdated)
    surge = {
        name: _may_surge(state, states, free.get(state.variant.gpu_type, 0), observed) for name, state in states.items()
    }
    return Step(replicas=replicas, rolling=rolling, surge=surge, blocked=blocked)


def _stuck(state: VariantState, states: Mapping[str, VariantState], observed: Observed) -> int:
    """Pods that were promised room and got none, though nothing of this service is still leaving the type."""
    gpu_type = state.variant.gpu_type
    if any(pod.terminating for other in states.values() for pod in other.pods if pod.gpu_type == gpu_type):
        return 0
    patience_s = STUCK_SHARE * pending_deadline_s(observed.gpu_types.get(gpu_type), observed.policy)
    patience = timedelta(seconds=patience_s)
    return sum(pod.lacks_room and observed.now - pod.created_at > patience for pod in state.staying)


def _releases(
    states: Mapping[str, VariantState], observed: Observed, blocked: Mapping[str, int], free: Mapping[str, int]
) -> dict[str, int]:
    """Surplus replicas, by variant, that leave before their replacement serves. At most one is on its way at a time.

    A release in progress shows in the pods: marked, then beyond what the Deployment asks for, then terminating. So
    the decision stays the same until its pod is gone, and needs no memory.

    None leaves while the service holds fewer devices than are planned for it (those count that are free for it but
    too few for a whole replica): what an earlier release made room for, here or in another service, comes first.
    This cannot lock up: where everything that somebody waits for is held by services that wait themselves, at least
    one of them holds as much as it is to get.
    """
    if not blocked or any(state.rolling for state in states.values()):
        return {}
    if any(pod.terminating for state in states.values() for pod in state.pods):
        return {}
    if any(len(state.staying) != state.asked for state in states.values()):
        return {}
    marked = {name: 1 for name, state in states.items() if state.surplus and any(map(is_marked, state.staying))}
    if marked:
        return dict(list(marked.items())[:1])
    if any(pod.scheduled and not pod.ready for state in states.values() if state.planned for pod in state.staying):
        return {}
    own = {states[name].variant.gpu_type for name in blocked}
    if _devices_serving(states) + sum(free.get(gpu_type, 0) for gpu_type in own) < _devices_planned(states):
        return {}
    wanted = own | {gpu_type for gpu_type, amount in observed.wanted_devices.items() if amount > 0}
    candidates = [name for name, state in states.items() if state.surplus and state.variant.gpu_type in wanted]
    if not candidates:
        return {}
    return {
        min(candidates, key=lambda name: (states[name].variant.gpu_type not in own, -states[name].surplus, name)): 1
    }


def _devices_serving(states: Mapping[str, VariantState]) -> int:
    return sum(state.serving * state.variant.devices for state in states.values())


def _devices_planned(states: Mapping[str, VariantState]) -> int:
    return sum(state.planned * state.variant.devices for state in states.values())


def _next_to_roll(states: Mapping[str, VariantState], outdated: Iterable[str]) -> str | None:
    """The variant whose template may change: one that is rolling already, else one that is down, else the one that
    serves least. None while a variant that is up to date is still coming up: it may be the last that was rolled."""
    candidates = sorted(outdated, key=lambda name: (states[name].serving, name))
    rolling = [name for name, state in states.items() if state.rolling and state.asked]
    if rolling:
        return next((name for name in candidates if name in rolling), None)
    down = [name for name, state in states.items() if state.missing and state.asked]
    if any(name not in candidates for name in down):
        return None
    return next((name for name in candidates if name in down), next(iter(candidates), None))


def _may_surge(state: VariantState, states: Mapping[str, VariantState], free: int, observed: Observed) -> bool:
    """Whether there is room for one more pod of a variant beside those it has, or that pod exists already."""
    if _stuck(state, states, observed):
        return False
    surging = state.rolling and len(state.staying) > state.asked
    return surging or free >= state.variant.devices
