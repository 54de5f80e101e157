"""Nodes without machines, by the thousand: kwok plays the kubelet of every Node annotated as its own.

The real scheduler places pods on them by labels, taints and allocatable resources like on any other; kwok then marks
nodes Ready and pods Running, and keeps the nodes' leases. Nothing runs, so nothing answers at the pods' addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from e2e.cluster.api_client import ApiClient, Json, grant_cluster_role
from e2e.cluster.binaries import Binaries
from e2e.cluster.control_plane import NODE_GRACE_PERIOD_S, ControlPlane
from e2e.cluster.processes import Processes

_MINE = ("kwok.x-k8s.io/node", "fake")
# Pods get one address each. A range of loopback, where nobody listens: whoever believes a pod's Ready and connects is
# refused at once. Of any other range something on the way may answer, a proxy for example, in the pod's place.
_POD_ADDRESSES = "127.64.0.0/10"

_USER = "system:kwok"
_ROLE_RULES: list[Json] = [
    {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["nodes/status", "pods/status"], "verbs": ["patch", "update"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["delete", "get", "list", "patch", "update", "watch"]},
    {"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch", "update"]},
    {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
    },
]


def start_kwok(
    binaries: Binaries, processes: Processes, control_plane: ControlPlane, client: ApiClient, enter: Sequence[str]
) -> None:
    """Start the kwok controller under an identity with exactly the rights above."""
    grant_cluster_role(client, _USER, _USER, _ROLE_RULES)
    client.create("/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas", _flow_schema())
    kubeconfig = control_plane.component_kubeconfig("kwok")
    processes.start(
        "kwok",
        [
            *enter,
            binaries["kwok"],
            f"--kubeconfig={kubeconfig}",
            *(f"--config={stage}" for stage in binaries.kwok_stages),
            f"--manage-nodes-with-annotation-selector={'='.join(_MINE)}",
            f"--node-lease-duration-seconds={NODE_GRACE_PERIOD_S}",
            "--v=WARN",
            f"--cidr={_POD_ADDRESSES}",
        ],
    )


def _flow_schema() -> Json:
    """Exempts kwok from the API server's priorities: it stands in for a thousand kubelets, which have a share that
    nobody else competes for."""
    everything: Json = {
        "resourceRules": [
            {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"], "namespaces": ["*"], "clusterScope": True}
        ]
    }
    rule = everything | {"subjects": [{"kind": "User", "user": {"name": _USER}}]}
    return {
        "metadata": {"name": "kwok"},
        "spec": {
            "priorityLevelConfiguration": {"name": "exempt"},
            "matchingPrecedence": 1000,
            "rules": [rule],
        },
    }


def kwok_node(name: str, labels: Mapping[str, str], allocatable: Mapping[str, str]) -> Json:
    """A Node object for kwok to adopt. Its whole allocatable is `allocatable`, in Kubernetes quantities."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "type": "kwok", **labels},
            "annotations": dict([_MINE]),
        },
        "status": {"allocatable": dict(allocatable), "capacity": dict(allocatable)},
    }
