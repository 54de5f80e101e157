"""One service's next actions: `reconcile(desired, observed) -> actions`. Pure, level-based, idempotent.

    desired   plan of the last solve, or why there is none
    observed  the service, its Deployments, pods and ConfigMap, free devices, time
       |
       |  plan in force   the new plan, else the one that the ConfigMap remembers (a refusal removes nothing, and a
       |                  plan in shadow mode changes nothing)
       |  states          planned and present replicas by variant
       |  templates       as applied last where its inputs are unchanged, else rendered
       |  step            make before break (`rollout`)
       v
    grow, routing table, marks on victims, shrink, clean up, status, events

The order is the order of safety: capacity before routes, routes before marks, marks before deletions. It emits only
what differs from what is observed, so reconciling its own result gives nothing, and it may be interrupted anywhere:
the next round sees what is so and continues. What others have changed of the fields that it applies is set back, and an
Event says so; what they have added stays. The caller must have complete caches: a pod that is not seen is taken
not to exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from llmfleet.operator import migration
from llmfleet.operator.model import (
    ANNOTATION_CONTENT,
    Action,
    AnnotatePod,
    ApplyConfigMap,
    ApplyDeployment,
    DeleteDeployment,
    Desired,
    EmitEvent,
    Finding,
    Observed,
    ObservedDeployment,
    PlannedService,
    PluginPackage,
    ProvideMigration,
    Shadow,
    WriteStatus,
)
from llmfleet.operator.overlay import InvalidSpec
from llmfleet.operator.render import check_service, checked_overlay, deployment, inputs_hash, render_template
from llmfleet.operator.rollout import Step, VariantState, next_step, variant_states
from llmfleet.operator.routing import config_map, routing_table, settle, stored_plan, stored_table
from llmfleet.operator.status import Picture, next_status, transition_events
from llmfleet.operator.victims import choose_victims, is_marked, mark_actions

REASON_DRIFT_CORRECTED = "DriftCorrected"
"""Reason of the Event that tells what others had changed."""
CORRECTION_PAUSE = timedelta(seconds=10)
"""Between two corrections of one Deployment."""


@dataclass(frozen=True, slots=True)
class _Template:
    """A pod template with the hash of its inputs."""

    inputs: str
    body: Mapping[str, Any]


def reconcile(desired: Desired, observed: Observed) -> tuple[Action, ...]:
    """What to do next for one service; () when all is as it should be or the service is being deleted."""
    service = observed.service
    if service.metadata.deletion_timestamp is not None:
        return ()
    in_force = plan_in_force(desired, observed)
    states = variant_states(observed, in_force.plan if in_force is not None else None)
    inputs = _inputs(states, observed)
    rendered, invalid = _render(states, inputs, observed)
    outdated = [
        name
        for name, template in rendered.items()
        if (live := states[name].deployment) is not None and live.input_hash != template.inputs
    ]
    renderable = [name for name, state in states.items() if state.deployment is not None or name in rendered]
    step = next_step(states, observed, outdated, renderable)

    grow: list[Action] = []
    marks: list[AnnotatePod] = []
    shrink: list[Action] = []
    for name, state in states.items():
        if state.deployment is not None and state.deployment.terminating:
            continue
        replicas, pod_marks = _shrunk(state, step.replicas[name], observed.unfit_nodes)
        marks += pod_marks
        apply = _apply(observed, state, rendered.get(name), step, replicas)
        if apply is not None:
            (shrink if replicas < state.asked else grow).extend([apply, *_correction(state.deployment, replicas)])
        elif _abandoned(state):
            assert state.deployment is not None
            live = state.deployment
            shrink.append(DeleteDeployment(live.namespace, live.name, live.uid))

    templates = [rendered[name].body if name in rendered else _live_template(state) for name, state in states.items()]
    peer_key = migration.peer_key_secret(service) if any(map(migration.is_equipped, templates)) else None
    provide = _provide(peer_key, observed)
    routing = _routing(in_force, observed, states, peer_key)
    # A service's first table goes out first: if its name is taken, no engine would ever get a request.
    first = [*routing, *grow] if observed.routing is None else [*grow, *routing]
    actions: list[Action] = [*provide, *first, *marks, *shrink]
    picture = Picture(
        desired=desired,
        in_force=in_force,
        states=states,
        step=step,
        inputs=inputs,
        invalid=invalid,
        unmovable=_unmovable(states, inputs, set(rendered), observed),
    )
    status = next_status(picture, observed)
    if status != service.status:
        actions.append(WriteStatus(service.metadata.namespace or "", service.metadata.name, status))
        actions += transition_events(service.status, status)
    return tuple(actions)


def plan_in_force(desired: Desired, observed: Observed) -> PlannedService | None:
    """The plan that is carried out: the new one, or the last that the service's ConfigMap remembers."""
    stored = stored_plan(observed.routing)
    if isinstance(desired, Shadow):
        desired = desired.in_force
    return settle(desired, stored) if isinstance(desired, PlannedService) else stored


def _inputs(states: Mapping[str, VariantState], observed: Observed) -> dict[str, str]:
    """The inputs hash that the spec asks for, by planned variant whose GPUType exists."""
    return {
        name: inputs_hash(observed.service, gpu_type, state.variant)
        for name, state in states.items()
        if state.planned > 0 and (gpu_type := observed.gpu_types.get(state.variant.gpu_type)) is not None
    }


def _render(
    states: Mapping[str, VariantState], inputs: Mapping[str, str], observed: Observed
) -> tuple[dict[str, _Template], InvalidSpec | None]:
    """Templates of planned variants that are new or changed, and the first reason why one cannot be made.

    Where nothing is planned, the service is checked by itself: its first request would find out too late.
    """
    rendered: dict[str, _Template] = {}
    invalid: InvalidSpec | None = None
    if not any(state.planned for state in states.values()):
        try:
            check_service(observed.service)
        except InvalidSpec as error:
            invalid = error
    for name, wanted in inputs.items():
        state = states[name]
        if state.deployment is not None and state.deployment.input_hash == wanted:
            continue
        try:
            gpu_type = observed.gpu_types[state.variant.gpu_type]
            plugin = observed.plugin if isinstance(observed.plugin, PluginPackage) else None
            body = render_template(observed.service, gpu_type, state.variant, plugin)
        except InvalidSpec as error:
            invalid = invalid or error
        else:
            rendered[name] = _Template(wanted, body)
    return rendered, invalid


def _live_template(state: VariantState) -> Mapping[str, Any]:
    return state.deployment.template if state.deployment is not None else {}


def _provide(peer_key: str | None, observed: Observed) -> list[ProvideMigration]:
    """What pods with the plug-in mount. Whether it is there is not watched, so it is provided again now and then."""
    if peer_key is None or observed.migration_provided or not isinstance(observed.plugin, PluginPackage):
        return []
    return [ProvideMigration(peer_key, observed.plugin)]


def _unmovable(
    states: Mapping[str, VariantState], inputs: Mapping[str, str], rendered: Set[str], observed: Observed
) -> dict[str, Finding]:
    """By planned variant, why its engines have no plug-in although the service asks for it."""
    service, plugin = observed.service, observed.plugin
    if service.spec.engine.migration != "auto" or plugin is None:
        return {}
    found: dict[str, Finding] = {}
    for name in inputs:
        variant, live = states[name].variant, states[name].deployment
        if live is not None and migration.is_equipped(live.template):
            continue
        gpu_type = observed.gpu_types[variant.gpu_type]
        try:
            why = migration.why_not(service, gpu_type, variant, checked_overlay(service, gpu_type))
        except InvalidSpec:
            continue
        if why is None and not isinstance(plugin, PluginPackage):
            why = plugin
        if why is None and live is not None and name not in rendered:
            why = "TemplateKept", f"{name}: its pods are as they were before; the next change of the service adds it"
        if why is not None:
            found[name] = why
    return found


def _shrunk(state: VariantState, target: int, unfit_nodes: Set[str]) -> tuple[int, list[AnnotatePod]]:
    """(replicas to ask for now, marks to write): the Deployment shrinks only when all victims are seen marked."""
    pods = state.staying
    if state.deployment is None:
        return target, []
    beyond = max(0, len(pods) - target)
    if state.rolling:
        # One pod more than asked for may be the surge of the rolling update, which the Deployment takes care of.
        beyond = min(beyond, max(state.asked - target, sum(map(is_marked, pods))))
    victims = choose_victims(pods, beyond, state.deployment.template_hash, unfit_nodes)
    ready_to_shrink = all(map(is_marked, victims))
    return (target if target >= state.asked or ready_to_shrink else state.asked), mark_actions(pods, victims)


def _apply(
    observed: Observed, state: VariantState, rendered: _Template | None, step: Step, replicas: int
) -> ApplyDeployment | None:
    """The Deployment, if it has to change: replicas, template where it is this variant's turn, or what is around."""
    live = state.deployment
    name = state.variant.name
    if live is None:
        if rendered is None or replicas == 0:
            return None
        template, surge = rendered, True
    else:
        turn = rendered is not None and (step.rolling == name or not state.staying)
        template = rendered if rendered is not None and turn else _Template(live.input_hash, live.template)
        surge = step.surge[name] if step.rolling == name or state.rolling else live.surge
    manifest = deployment(
        observed.service,
        state.variant,
        template=template.body,
        inputs=template.inputs,
        replicas=replicas,
        surge=surge,
        max_unavailable=observed.policy.max_unavailable_engines,
        startup_deadline_seconds=observed.service.spec.engine.startup_deadline_seconds,
    )
    content = manifest["metadata"]["annotations"][ANNOTATION_CONTENT]
    as_applied = live is not None and live.recorded and not is_due_for_correction(live, observed.now)
    if live is not None and as_applied and (live.content_hash, live.replicas, live.surge) == (content, replicas, surge):
        return None
    return ApplyDeployment(manifest)


def is_due_for_correction(live: ObservedDeployment, now: datetime) -> bool:
    """Whether others have changed what the operator applied, and its last apply is long enough ago: somebody who
    changes it over and over is answered now and then."""
    applied_ago = now - live.applied_at if live.applied_at is not None else None
    just_applied = applied_ago is not None and timedelta() <= applied_ago < CORRECTION_PAUSE
    return bool(live.drift) and not just_applied


def _correction(live: ObservedDeployment | None, replicas: int) -> list[EmitEvent]:
    """What is set back by this apply, in words. A difference that nobody is known to have made may be the API server's
    own, which the first apply after a restart finds out."""
    if live is None:
        return []
    paths = [drift.path for drift in live.drift if drift.removed or (drift.live and live.edited_by)]
    if live.applied_replicas not in (None, live.replicas) and replicas != live.replicas:
        paths.append("spec.replicas")
    if not paths:
        return []
    who = f" by {', '.join(live.edited_by[:3])}" if live.edited_by else ""
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    message = f"Deployment {live.name}: {', '.join(paths[:5])}{more} changed{who}; set back to what is planned"
    return [EmitEvent("Warning", REASON_DRIFT_CORRECTED, message)]


def _abandoned(state: VariantState) -> bool:
    """No longer planned, shrunk to nothing, and its last pod is gone."""
    live = state.deployment
    return (
        live is not None and state.planned == 0 and live.replicas == 0 and not state.pods and not live.status_replicas
    )


def _routing(
    in_force: PlannedService | None, observed: Observed, states: Mapping[str, VariantState], peer_key: str | None
) -> list[ApplyConfigMap]:
    """The ConfigMap, if it has to change."""
    if in_force is None:
        return []
    serving = {name: state.serving for name, state in states.items()}
    table = routing_table(observed.service, in_force, serving, stored_table(observed.routing), peer_key)
    manifest = config_map(observed.service, table, in_force.plan)
    content, live = manifest["metadata"]["annotations"][ANNOTATION_CONTENT], observed.routing
    if live is not None and live.content_hash == content and dict(live.data) == manifest["data"]:
        return []
    return [ApplyConfigMap(manifest)]
