"""What `kubectl get llms` and `kubectl describe` say: conditions, replicas, costs, and Events on transitions.

Three conditions, each with a reason that says what to do:

    Planned       the plan in force gives this service replicas for all its demand
    EnginesReady  every planned replica runs the template that the spec asks for, and is Ready
    Ready         both

Ready never lies: pods that crash, pods of an older template and pods that drain do not count. Every condition
carries the generation of the spec that was planned or refused, and never that of a newer one which no solve has seen
yet; the status as a whole speaks of the same one, so that tools which compare it wait. NoSurgeCapacity and NoMigration
are there only while they matter.

A condition's transition time moves only when its status does; a status equal to the one already written is not
written again. Events are emitted where a condition changes its status or its reason, never for a mere repetition.

In shadow mode Planned goes on speaking of the plan in force, and Shadow says what would be instead, without a figure
that follows the demand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmfleet.api import (
    CONDITION_ENGINES_READY,
    CONDITION_PLANNED,
    CONDITION_READY,
    CONDITION_SHADOW,
    Condition,
    LLMServiceStatus,
    Refusal,
    ServicePlan,
    VariantStatus,
)
from llmfleet.api.llmservice import Model
from llmfleet.operator.model import Desired, EmitEvent, Finding, Observed, ObservedPod, PlannedService, Shadow
from llmfleet.operator.overlay import InvalidSpec
from llmfleet.operator.rollout import Step, VariantState

CONDITION_NO_MIGRATION = "NoMigration"
"""Some engines of the service cannot hand their requests over, although it asks for that."""
CONDITION_NO_SURGE = "NoSurgeCapacity"
"""New capacity has no room beside the old, so the old goes first, one replica at a time."""

REASON_AT_RISK = "DemandAtRisk"
"""Planned, but not protected against the loss of a spot pool as the service asks."""
IMAGE_REASONS = frozenset({"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"})
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
DOWNLOAD_FAILURES: tuple[tuple[str, str], ...] = (
    (
        r"gated repo|GatedRepoError|401 Client Error|403 Client Error|Invalid user token|restricted and you",
        "the repository is gated or private: accept its terms and set spec.model.tokenSecret",
    ),
    (
        r"RepositoryNotFoundError|RevisionNotFoundError|EntryNotFoundError|404 Client Error|"
        r"is not a local folder and is not a valid model|Repo id must",
        "the model does not exist: check spec.model.name, revision and source",
    ),
    (
        r"No space left on device|Disk quota exceeded|not enough disk space",
        "the disk is full: give the weights a larger claim in spec.model.claim",
    ),
    (
        r"429 Client Error|Too Many Requests|rate limit",
        "the hub limits the rate: cache the weights in a claim (spec.model.claim) or set spec.model.tokenSecret",
    ),
    (
        r"LocalEntryNotFoundError|OfflineModeIsEnabled|We couldn't connect to|huggingface\.co.{0,80}Max retries|"
        r"NameResolutionError",
        "the hub cannot be reached: check the network, or serve from a claim (spec.model.source pvc)",
    ),
)
"""Patterns over an engine's last words, and what to do about each."""

ROUTINE_REASONS = frozenset(
    {"EnginesStarting", "RollingOut", "Planning", "EnginePending", "NoPlan", "NothingPlanned", "ShadowMode"}
)
"""Reasons that pass by themselves or repeat what another condition says: their Events are no warnings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What reconcile found out, for status to tell."""

    desired: Desired
    in_force: PlannedService | None
    states: Mapping[str, VariantState]
    step: Step
    inputs: Mapping[str, str]
    """Inputs hash that the spec asks for, by variant; absent where the variant cannot be rendered."""
    invalid: InvalidSpec | None
    unmovable: Mapping[str, Finding] = field(default_factory=dict)
    """By planned variant, why its engines have no plug-in for migration."""


def next_status(picture: Picture, observed: Observed) -> LLMServiceStatus:
    """The status that says what is so; equal to the observed one where nothing changed."""
    planned = _planned(picture, observed)
    engines = _engines(picture, observed, planned)
    generation = planned.observed_generation
    conditions = [planned, engines, _ready(planned, engines, observed)]
    if isinstance(picture.desired, Shadow):
        shadow = _shadow(picture.desired, picture.in_force)
        shadow_generation = picture.desired.proposed.generation or None
        conditions.append(_condition(observed, CONDITION_SHADOW, "True", *shadow, shadow_generation))
    no_surge = _no_surge(picture)
    if no_surge is not None:
        conditions.append(_condition(observed, CONDITION_NO_SURGE, "True", *no_surge, generation))
    if picture.unmovable:
        reasons = list(dict.fromkeys(picture.unmovable.values()))
        message = "; ".join(message for _, message in reasons)
        conditions.append(_condition(observed, CONDITION_NO_MIGRATION, "True", reasons[0][0], message, generation))
    variants = [
        VariantStatus(
            name=name,
            gpu_type=state.variant.gpu_type,
            tensor_parallel=state.variant.tensor_parallel,
            devices=state.variant.devices,
            desired=state.planned,
            ready=_current(picture, name),
            surplus=max(0, len(state.pods) - state.planned),
        )
        for name, state in picture.states.items()
        if state.planned or state.pods
    ]
    plan = picture.in_force.plan if picture.in_force is not None else None
    return LLMServiceStatus(
        observed_generation=generation,
        conditions=conditions,
        plan_id=picture.in_force.plan_id if picture.in_force is not None else "",
        variants=variants,
        replicas=",".join(f"{variant.name} {variant.ready}/{variant.desired}" for variant in variants),
        cost_per_hour=_legible(plan.cost_per_hour) if plan is not None else None,
        cost_per_million_tokens=_legible(plan.cost_per_million_tokens) if plan is not None else None,
        next_best_cost_per_hour=_legible(plan.next_best.cost_per_hour) if plan is not None and plan.next_best else None,
        binding=list(plan.binding)[:32] if plan is not None else [],
        unserved_requests_per_second=plan.unserved_rps if plan is not None else 0.0,
    )


def _legible(cost: float | None) -> float | None:
    """A cost with five significant digits: a table of `kubectl get` is not the place for seventeen."""
    return None if cost is None else float(f"{cost:.5g}")


def transition_events(before: LLMServiceStatus, after: LLMServiceStatus) -> list[EmitEvent]:
    """One Event per condition that changed its status or reason; Ready repeats the others and has none."""
    known = {condition.type: (condition.status, condition.reason) for condition in before.conditions}
    events = []
    for condition in after.conditions:
        if condition.type == CONDITION_READY or known.get(condition.type) == (condition.status, condition.reason):
            continue
        bad = condition.type == CONDITION_NO_SURGE or condition.status == "False"
        routine = condition.reason in ROUTINE_REASONS
        kind: Literal["Normal", "Warning"] = "Warning" if bad and not routine else "Normal"
        events.append(EmitEvent(kind, condition.reason, condition.message or condition.type))
    return events


def download_failure(message: str) -> str | None:
    """What to do about a download that failed, recognised in an engine's last words; None where it is no such."""
    return next((advice for pattern, advice in DOWNLOAD_FAILURES if re.search(pattern, message, re.IGNORECASE)), None)


def _planned(picture: Picture, observed: Observed) -> Condition:
    desired, in_force = picture.desired, picture.in_force
    if isinstance(desired, Refusal):
        refused = desired.generation or None
        return _condition(observed, CONDITION_PLANNED, "False", desired.reason, desired.message, refused)
    if picture.invalid is not None:
        return _condition(observed, CONDITION_PLANNED, "False", picture.invalid.reason, str(picture.invalid))
    if desired is None:
        before = _before(observed, CONDITION_PLANNED)
        return before or _condition(observed, CONDITION_PLANNED, "False", "Planning", "waiting for the first plan")
    generation: int | None
    if not isinstance(desired, Shadow):
        generation = desired.generation or None
    elif in_force is None:
        message = f"nothing is applied, so there are no engines: {_shadow(desired, None)[1]}"
        generation = desired.proposed.generation or None
        return _condition(observed, CONDITION_PLANNED, "False", "ShadowMode", message, generation)
    else:
        generation = desired.in_force.generation if desired.in_force is not None else _carried_out(observed)
    assert in_force is not None
    plan = in_force.plan
    if plan.shortfall is not None or plan.unserved_rps > 0:
        message = plan.shortfall or f"{plan.unserved_rps:g} requests per second cannot be served"
        if plan.conflict:
            message = f"{message}; limits that cannot all hold while all is served: {', '.join(plan.conflict)}"
        missing = observed.service.spec.replicas.min > sum(plan.replicas.values())
        if plan.unserved_rps == 0 and not missing and any(loss.unserved_rps > 0 for loss in plan.losses):
            return _condition(observed, CONDITION_PLANNED, "True", REASON_AT_RISK, message, generation)
        return _condition(observed, CONDITION_PLANNED, "False", "InsufficientCapacity", message, generation)
    unknown = [name for name, state in picture.states.items() if state.planned and name not in picture.inputs]
    if unknown:
        message = f"the plan uses {', '.join(unknown)}, whose GPUType is gone; a new plan is on its way"
        return _condition(observed, CONDITION_PLANNED, "False", "UnknownGPUType", message, generation)
    notes = [_mix(plan), *plan.warnings]
    return _condition(observed, CONDITION_PLANNED, "True", "PlanFound", "; ".join(notes), generation)


def _mix(plan: ServicePlan) -> str:
    replicas = ", ".join(f"{variant.replicas} x {variant.name}" for variant in plan.variants if variant.replicas)
    return f"{replicas or 'no replicas'} at {plan.cost_per_hour:.4g} per hour"


def _carried_out(observed: Observed) -> int:
    """Generation for which the plan in force was made, as far as the status remembers it; 0: not known."""
    before = _before(observed, CONDITION_PLANNED)
    speaks_of_it = before is not None and before.reason in ("PlanFound", "InsufficientCapacity", REASON_AT_RISK)
    return before.observed_generation if before is not None and speaks_of_it else 0


def _shadow(desired: Shadow, in_force: PlannedService | None) -> Finding:
    proposed = desired.proposed.plan
    short = ", and some demand would go unserved" if proposed.unserved_rps > 0 or proposed.shortfall else ""
    now = "nothing" if in_force is None else _mix(in_force.plan)
    if in_force is not None and proposed.replicas == in_force.plan.replicas:
        return "PlanUnchanged", f"FleetPolicy mode is shadow: {now} would stay{short}"
    return "PlanNotApplied", f"FleetPolicy mode is shadow: there would be {_mix(proposed)}{short}, not {now}"


def _engines(picture: Picture, observed: Observed, planned: Condition) -> Condition:
    generation = planned.observed_generation
    if picture.in_force is None:
        message = "no plan has been in force yet, so there are no engines"
        return _condition(observed, CONDITION_ENGINES_READY, "False", "NoPlan", message, generation)
    total = sum(state.planned for state in picture.states.values())
    ready = sum(min(_current(picture, name), state.planned) for name, state in picture.states.items())
    if total == 0 and planned.status != "True":
        message = f"no engine is planned: see condition {CONDITION_PLANNED}"
        return _condition(observed, CONDITION_ENGINES_READY, "False", "NothingPlanned", message, generation)
    if total == 0:
        return _condition(observed, CONDITION_ENGINES_READY, "True", "ScaledToZero", _asleep(observed), generation)
    if ready == total:
        message = f"all {total} planned engines serve"
        return _condition(observed, CONDITION_ENGINES_READY, "True", "EnginesReady", message, generation)
    reason, message = _why_not(picture, observed)
    message = f"{ready} of {total} ready: {message}"
    return _condition(observed, CONDITION_ENGINES_READY, "False", reason, message, generation)


def _asleep(observed: Observed) -> str:
    """Why there are no engines although all is well, and what would start one."""
    spec = observed.service.spec
    if spec.replicas.max == 0:
        return "spec.replicas.max is 0, so there are no engines"
    if spec.traffic.mode == "expected":
        return "spec.traffic.requestsPerSecond is 0, so there are no engines; in mode observe a request would start one"
    return "no demand, no engines; the first request starts one"


def _ready(planned: Condition, engines: Condition, observed: Observed) -> Condition:
    generation = planned.observed_generation
    for condition in (planned, engines):
        if condition.status != "True":
            return _condition(observed, CONDITION_READY, "False", condition.reason, condition.message, generation)
    reason = "Ready" if engines.reason == "EnginesReady" else engines.reason
    return _condition(observed, CONDITION_READY, "True", reason, engines.message, generation)


def _current(picture: Picture, name: str) -> int:
    """Replicas of a variant that serve on the template that the spec asks for."""
    wanted = picture.inputs.get(name)
    return sum(pod.serving and pod.template_hash == wanted for pod in picture.states[name].pods)


def _why_not(picture: Picture, observed: Observed) -> Finding:
    """The most telling reason for which planned replicas do not serve: what a person must act on comes first."""
    short = [(name, state) for name, state in picture.states.items() if _current(picture, name) < state.planned]
    pods = [pod for _, state in short for pod in state.staying if not pod.ready]
    for pod in sorted(pods, key=lambda pod: pod.name):
        finding = _pod_finding(pod, observed.service.spec.model)
        if finding is not None:
            return finding
    for name, state in short:
        if state.deployment is not None and state.deployment.failure:
            return "PodsRefused", f"{name}: {state.deployment.failure}"
    for pod in pods:
        if not pod.scheduled:
            return "EnginePending", f"pod {pod.name} has no node: {pod.message or 'not scheduled yet'}"
    blocked = [name for name, _ in short if name in picture.step.blocked]
    if blocked:
        return "WaitingForCapacity", f"{', '.join(blocked)}: no free devices beside the engines that still serve"
    for name, state in short:
        if name not in picture.inputs:
            return "NotRenderable", f"{name}: see condition {CONDITION_PLANNED}"
        old = sum(pod.serving and pod.template_hash != picture.inputs[name] for pod in state.pods)
        if old:
            return "RollingOut", f"{old} of {name} still serve on the previous template"
    restarted = sum(pod.restarts > 0 for pod in pods)
    names = ", ".join(name for name, _ in short)
    again = f", {restarted} after a restart" if restarted else ""
    return "EnginesStarting", f"{names}: engines are starting{again}"


def _pod_finding(pod: ObservedPod, model: Model) -> Finding | None:
    if pod.waiting_reason in IMAGE_REASONS:
        return "ImagePullFailed", f"pod {pod.name}: {pod.waiting_reason}: {pod.message}"
    if pod.waiting_reason in CONFIG_REASONS:
        return "EngineConfigFailed", f"pod {pod.name}: {pod.waiting_reason}: {pod.message}"
    if pod.restarts == 0 and pod.waiting_reason != "CrashLoopBackOff":
        return None
    advice = download_failure(pod.message)
    if advice is not None:
        weights = f"{model.name!r} from {model.source}"
        return "ModelDownloadFailed", f"pod {pod.name} cannot load {weights}: {advice}; it said: {pod.message}"
    return "EngineCrashLooping", f"pod {pod.name} restarted {pod.restarts} times; it said: {pod.message or 'nothing'}"


def _no_surge(picture: Picture) -> Finding | None:
    step = picture.step
    if step.blocked:
        waiting = ", ".join(f"{count} x {name}" for name, count in sorted(step.blocked.items()))
        return "NoFreeDevices", f"{waiting} wait until engines that are no longer planned have left, one at a time"
    rolling = step.rolling
    if rolling is not None and not step.surge.get(rolling, True):
        return "NoFreeDevices", f"{rolling} is replaced in place: there is no free device for a new pod beside the old"
    return None


def _before(observed: Observed, kind: str) -> Condition | None:
    return next((condition for condition in observed.service.status.conditions if condition.type == kind), None)


def _condition(
    observed: Observed,
    kind: str,
    status: Literal["True", "False"],
    reason: str,
    message: str,
    generation: int | None = None,
) -> Condition:
    before = _before(observed, kind)
    same = before is not None and before.status == status
    return Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message if len(message) <= 4096 else f"{message[:4093]}...",
        observed_generation=observed.service.metadata.generation if generation is None else generation,
        last_transition_time=before.last_transition_time
        if before is not None and same
        else observed.now.replace(microsecond=0),
    )
