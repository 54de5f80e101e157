"""A model that cannot be downloaded is a condition with its cause, from a real vLLM in a real pod."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2e.cluster import Cluster
from e2e.demo.manifests import demo_objects
from e2e.operator.rig import Rig

pytestmark = [pytest.mark.node, pytest.mark.timeout(900)]

MISSING = "llmfleet/no-such-model"


def test_a_failed_download_is_a_condition_with_its_cause(node_cluster: Cluster, tmp_path: Path) -> None:
    node_cluster.advertise(
        node_cluster.node_name, {"demo.llmfleet.io/cpu-fast": 1}, labels={"llmfleet.io/demo": "true"}
    )
    objects = demo_objects("unused")
    service = next(manifest for manifest in objects if manifest["kind"] == "LLMService")
    service["spec"]["gpuTypes"] = ["cpu-fast"]
    service["spec"]["model"] = {"source": "hf", "name": MISSING, "contextLength": 4096}
    # The engine that the kubelet has started again by then serves nobody.
    service["spec"]["engine"]["terminationGracePeriodSeconds"] = 1
    rig = Rig(node_cluster, tmp_path)
    for manifest in objects:
        node_cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest))
    with rig.operator():
        rig.wait(
            "EnginesReady says that the download failed",
            lambda: rig.condition("demo", "tiny", "EnginesReady").get("reason") == "ModelDownloadFailed",
            deadline_s=600,
        )
        condition = rig.condition("demo", "tiny", "EnginesReady")
        assert condition["status"] == "False"
        assert f"cannot load {MISSING!r} from hf" in condition["message"]
        assert rig.condition("demo", "tiny", "Ready")["status"] == "False"
        assert "ModelDownloadFailed" in rig.events("demo", "tiny")
        rig.delete("LLMService", "tiny", "demo")
    rig.close()
