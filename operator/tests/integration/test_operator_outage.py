"""The API server is away for a while. In a cluster of its own: Kubernetes' controllers need a minute to find back,
which other tests would feel. What counts is what the operator writes, not what becomes of it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from e2e.cluster.cluster import Cluster
from e2e.operator.objects import gpu_type, profile, service
from e2e.operator.rig import Rig

pytestmark = [pytest.mark.cluster, pytest.mark.long(30)]

OUTAGE_S = 20.0


def test_an_api_server_outage_is_waited_out(tmp_path: Path) -> None:
    with Cluster.start("control-plane") as cluster:
        rig = Rig(cluster, tmp_path)
        cluster.add_kwok_nodes(2, allocatable={"example.com/slow": "8"})
        with contextlib.closing(rig), rig.operator() as operator:
            rig.apply(gpu_type("slow", "example.com/slow", 0.6), profile("default", {"slow": 2.5}))
            rig.apply(service("default", "chat", 3.0))
            rig.wait_ready("default", "chat")
            rig.apply(service("default", "chat", 7.0))

            cluster.stop_api_server()
            time.sleep(OUTAGE_S)
            assert operator.running
            assert operator.get("/healthz")[0] == 200
            assert operator.metrics()["llmfleet_operator_leader"] == 0.0, "without its lease it must not write"
            cluster.start_api_server()

            rig.wait("a change from before the outage is made", lambda: rig.replicas("default") == {"chat-slow": 4})
            rig.apply(service("default", "chat", 11.0))
            rig.wait("a change from after it is seen", lambda: rig.replicas("default") == {"chat-slow": 6})
            assert operator.running
            assert rig.holder() == operator.identity
