"""In a cluster that is not its own, the demo takes out what it put in and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from e2e.cluster import Cluster
from e2e.demo import borrowed
from e2e.demo.manifests import CRDS, EXAMPLES, GPU_TYPES, NAMESPACE, SYSTEM, load

pytestmark = [pytest.mark.cluster, pytest.mark.full]

SOMEBODYS = """
apiVersion: llmfleet.io/v1alpha1
kind: FleetPolicy
metadata: {name: default}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start("control-plane") as cluster:
        yield cluster


def demo(cluster: Cluster) -> None:
    """Applies what the demo applies."""
    install(cluster)
    paths = {name: f"/somewhere/{name}" for name in ("ENGINE", "MODEL", "PYTHON_PREFIX", "API_KEY")}
    for name in ("namespace", "gputypes", "modelprofile", "llmservice"):
        for manifest in load(EXAMPLES / f"{name}.yaml", paths):
            cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest))


def install(cluster: Cluster) -> None:
    for path in (CRDS, *SYSTEM):
        cluster.kubectl("apply", "--server-side", "-f", path)
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", CRDS)


def left(cluster: Cluster, *what: str) -> set[str]:
    return set(cluster.kubectl("get", *what, "--ignore-not-found", "-o", "name").split())


def test_of_a_demo_in_an_empty_cluster_nothing_stays(cluster: Cluster) -> None:
    before = borrowed.found(cluster.kubectl)
    assert before == []
    demo(cluster)
    borrowed.leave(cluster.kubectl, before)
    assert left(cluster, "crds") == set()
    assert left(cluster, "namespace", NAMESPACE, "llmfleet-system") == set()
    assert left(cluster, "clusterrole", "llmfleet-operator", "llmfleet-gateway") == set()
    borrowed.leave(cluster.kubectl, before)


def test_what_others_run_with_llmfleet_stays(cluster: Cluster) -> None:
    install(cluster)
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=SOMEBODYS)
    before = borrowed.found(cluster.kubectl)
    demo(cluster)
    assert len(left(cluster, "gputypes")) == len(GPU_TYPES)
    borrowed.leave(cluster.kubectl, before)
    assert left(cluster, "fleetpolicies") == {"fleetpolicy.llmfleet.io/default"}
    assert left(cluster, "serviceaccounts", "-n", "llmfleet-system") >= {"serviceaccount/llmfleet-operator"}
    assert left(cluster, "gputypes") == set()
    assert left(cluster, "namespace", NAMESPACE) == set()
