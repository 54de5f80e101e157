"""The local cluster for pytest.

`control_plane` is one cluster for the whole session: tests share it, so each works in a namespace of its own and
removes the cluster-scoped objects it makes. A test that takes the cluster down, or needs it empty, starts its own with
`Cluster.start`. `node_cluster` is the same with a real kubelet, and is skipped where pytest does not run as root. Under
xdist all users of a shared cluster are one group (`--dist loadgroup`), or each worker would start a cluster. A shared
cluster ends with its last user, not with the session: idle, it would take from the tests that are still to come.

Tests marked `long`, which those groups are, are begun first, the longest before all: the others fill the time that
they leave.

Programs that are missing are built before the first test, outside any test's time limit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from _pytest.fixtures import SubRequest
from _pytest.nodeid import NodeId

from e2e.cluster.binaries import NEEDED, ensure_binaries
from e2e.cluster.cluster import Cluster

SHARED = {"control_plane": 60, "node_cluster": 70}
"""Fixtures of which there is one for the whole session, and about how many seconds all their tests take."""

ENDING_EARLY = frozenset({*SHARED, "operator_cluster"})
"""Fixtures of a session that end with their last user."""
_USERS_LEFT = pytest.StashKey[Counter[str]]()
"""Tests to come by the fixtures that they use. Each worker of xdist counts all tests, and runs all of a group."""
_ENDS = pytest.StashKey[dict[str, Callable[[], None]]]()
"""What ends a fixture that has begun, after all that depend on it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Group the tests by the cluster that they share, and put the long ones first."""
    for item in items:
        for fixture in SHARED.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(fixture))
            item.add_marker(pytest.mark.long(SHARED[fixture]))
    items.sort(key=_seconds, reverse=True)
    if config.getoption("loadgroup", default=False):
        for item in items:
            if group := item.get_closest_marker("xdist_group"):
                # What pytest-xdist 3.8 does to tell its scheduler, in a way that pytest 9.2 does not see any more, so
                # that groups fell apart in silence (pytest-xdist issue 1386).
                item._id = NodeId.parse(f"{item.nodeid}@{group.args[0]}")


def _seconds(item: pytest.Item) -> float:
    """About how long a test and its group take; 0 where that does not matter. Raises UsageError where a mark leaves it
    open."""
    marks = list(item.iter_markers("long"))
    if not all(mark.args for mark in marks):
        raise pytest.UsageError(f"{item.nodeid}: mark long as long(seconds), which its group takes")
    return max((float(mark.args[0]) for mark in marks), default=0.0)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the selected tests need, and count who uses what."""
    fixtures = (fixture for item in session.items for fixture in getattr(item, "fixturenames", ()))
    session.config.stash[_USERS_LEFT] = Counter(fixtures)
    session.config.stash[_ENDS] = {}
    if session.config.option.collectonly:
        return
    needed: set[str] = set()
    for item in session.items:
        if item.get_closest_marker("cluster"):
            needed.update(NEEDED["control-plane"])
        if item.get_closest_marker("node"):
            needed.update(NEEDED["node"])
    if needed:
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        ensure_binaries(needed, terminal.write_line if terminal else lambda line: None)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: SubRequest) -> None:
    """Keep how to end the fixtures that are shared."""
    if fixturedef.argname in ENDING_EARLY:
        request.config.stash[_ENDS][fixturedef.argname] = functools.partial(fixturedef.finish, request)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """End the shared clusters whose last user this was."""
    yield
    left = item.config.stash[_USERS_LEFT]
    for fixture in ENDING_EARLY & set(getattr(item, "fixturenames", ())):
        left[fixture] -= 1
        if left[fixture] == 0 and (end := item.config.stash[_ENDS].pop(fixture, None)):
            end()


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """The session's shared cluster with a real API server, scheduler, controllers and kwok; no nodes yet."""
    with Cluster.start("control-plane") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def node_cluster() -> Iterator[Cluster]:
    """The session's shared cluster with a real node (root only)."""
    if os.geteuid() != 0:
        pytest.skip("a real node needs root: network namespaces, mounts and cgroups are made")
    with Cluster.start("node") as cluster:
        yield cluster


@contextlib.contextmanager
def fresh_namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of a test's own in a shared cluster, with its default service account. No workload stays in it."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.create_namespace(name)
    yield name
    cluster.end_workloads(name)


@pytest.fixture
def namespace(control_plane: Cluster) -> Iterator[str]:
    """A namespace of the test's own in the shared control plane."""
    with fresh_namespace(control_plane) as name:
        yield name
