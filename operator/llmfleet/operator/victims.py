"""Which pods leave when a variant shrinks, and how they are told.

Kubernetes chooses among a ReplicaSet's pods by: no node, not running, not ready, then the lower deletion cost. The
operator chooses in the same order and then writes the cost, so that its choice and Kubernetes' are the same. The
draining annotation goes with it: gateways send a marked engine nothing more. Only when all victims are seen to be
marked does the Deployment shrink, so no request is on its way to a pod that is about to be deleted.

Among pods that are all the same to Kubernetes, those on a node that is cordoned or NotReady go first: they are about
to lose it anyway, and their devices are no longer counted as inventory.

The choice is repeated in every round from what is so. It prefers pods that are marked already, and takes the marks
off again where the plan has grown back.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from llmfleet.api.meta import ANNOTATION_DRAINING
from llmfleet.operator.model import ANNOTATION_DELETION_COST, AnnotatePod, ObservedPod

VICTIM_COST = -1000
"""Deletion cost of a pod that is to leave; others have none, which counts as 0."""


def choose_victims(
    pods: Sequence[ObservedPod], count: int, template_hash: str, unfit_nodes: Set[str]
) -> list[ObservedPod]:
    """The `count` pods that leave first. `pods` are not being deleted; `template_hash` is the current one;
    `unfit_nodes` are those that take no new pods."""
    ranked = sorted(
        pods,
        key=lambda pod: (
            pod.scheduled,
            pod.phase == "Running",
            pod.ready,
            not is_marked(pod),
            pod.node not in unfit_nodes,
            pod.template_hash == template_hash,
            -pod.created_at.timestamp(),
            pod.name,
        ),
    )
    return ranked[:count]


def is_marked(pod: ObservedPod) -> bool:
    """Gateways and Kubernetes both know that this pod leaves."""
    return pod.draining and pod.deletion_cost == VICTIM_COST


def mark_actions(pods: Sequence[ObservedPod], victims: Sequence[ObservedPod]) -> list[AnnotatePod]:
    """Marks for victims that have none, and none for pods that are no victims."""
    leaving = {pod.name for pod in victims}
    actions = []
    for pod in pods:
        if pod.name in leaving and not is_marked(pod):
            marks: dict[str, str | None] = {ANNOTATION_DRAINING: "true", ANNOTATION_DELETION_COST: str(VICTIM_COST)}
            actions.append(AnnotatePod(pod.namespace, pod.name, marks))
        elif pod.name not in leaving and (pod.draining or pod.deletion_cost == VICTIM_COST):
            actions.append(
                AnnotatePod(pod.namespace, pod.name, {ANNOTATION_DRAINING: None, ANNOTATION_DELETION_COST: None})
            )
    return actions
