"""A cluster of these tests' own: they stop its API server, and an operator acts on the whole cluster."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from e2e.cluster.cluster import Cluster
from e2e.operator.rig import Operator, Rig

NODES = 4
DEVICES_PER_NODE = 4


@pytest.fixture(scope="session")
def operator_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A control plane with CRDs, RBAC, and nodes that offer 16 devices of each of two kinds."""
    with Cluster.start("control-plane") as cluster:
        rig = Rig(cluster, tmp_path_factory.mktemp("operators"))
        cluster.add_kwok_nodes(
            NODES, allocatable={f"example.com/{kind}": str(DEVICES_PER_NODE) for kind in ("fast", "slow")}
        )
        yield rig
        rig.close()


@pytest.fixture
def rig(operator_cluster: Rig) -> Iterator[Rig]:
    """The cluster, empty of fleet objects before and after."""
    yield operator_cluster
    operator_cluster.clean()


@pytest.fixture(scope="module")
def operator(operator_cluster: Rig) -> Iterator[Operator]:
    """One replica of the operator, for all tests of a module."""
    with operator_cluster.operator() as running:
        yield running


@pytest.fixture
def team(rig: Rig) -> Iterator[str]:
    """A namespace for services."""
    name = f"team-{secrets.token_hex(3)}"
    rig.cluster.create_namespace(name)
    yield name
    rig.cluster.end_workloads(name)
