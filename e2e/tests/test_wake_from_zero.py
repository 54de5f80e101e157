"""A service at zero replicas answers its first request: real gateway, real operator, real kubelet, real vLLM."""

from __future__ import annotations

import json
import time
import urllib.error
from pathlib import Path

import pytest
from openai import OpenAI

from e2e.cluster import Cluster
from e2e.demo.manifests import demo_objects
from e2e.operator.launch import open_url
from e2e.operator.objects import policy
from e2e.operator.rig import Gateway, Rig

pytestmark = [pytest.mark.node, pytest.mark.full, pytest.mark.timeout(900)]

API_KEY = "wake-key"
TOKENS = 16
PATIENCE_S = 400.0
"""How long the gateway lets a request wait: an engine needs 20 s to start on a quiet machine."""
WINDOW_S = 20


def engine_pods(rig: Rig) -> list[str]:
    return [pod["metadata"]["name"] for pod in rig.list("Pod", "demo")]


def knows_a_service(gateway: Gateway) -> bool:
    """Whether a routing table has arrived: then the list of models asks for one of its keys."""
    try:
        with open_url(f"{gateway.url}/v1/models"):
            return False
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code == 401


def test_the_first_request_of_a_service_at_zero_is_answered_when_its_engine_has_started(
    node_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node_cluster.advertise(
        node_cluster.node_name, {"demo.llmfleet.io/cpu-fast": 1}, labels={"llmfleet.io/demo": "true"}
    )
    objects = demo_objects(API_KEY)
    service = next(manifest for manifest in objects if manifest["kind"] == "LLMService")
    service["spec"]["gpuTypes"] = ["cpu-fast"]
    service["spec"]["traffic"] = {"mode": "observe"}
    rig = Rig(node_cluster, tmp_path)
    for manifest in [*objects, policy(demandWindowSeconds=WINDOW_S, replanIntervalSeconds=1)]:
        node_cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest))
    with rig.gateway(queue_wait_s=PATIENCE_S) as gateway, rig.operator(gateway=gateway):
        rig.wait_ready("demo", "tiny")
        assert rig.condition("demo", "tiny", "Ready")["reason"] == "ScaledToZero"
        assert engine_pods(rig) == []
        rig.wait("the gateway knows the service", lambda: knows_a_service(gateway))

        # No retries in the client: an answer with 5xx would be an exception.
        with OpenAI(base_url=f"{gateway.url}/v1", api_key=API_KEY, max_retries=0, timeout=PATIENCE_S) as client:
            asked = time.monotonic()
            first_token_s = 0.0
            usage = None
            for chunk in client.completions.create(
                model="tiny",
                prompt="Is anybody there?",
                max_tokens=TOKENS,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            ):
                first_token_s = first_token_s or time.monotonic() - asked
                usage = chunk.usage or usage
            again = time.monotonic()
            client.completions.create(model="tiny", prompt="And now?", max_tokens=1)
            awake_s = time.monotonic() - again
        assert usage is not None
        assert usage.completion_tokens == TOKENS
        with capsys.disabled():
            print(
                f"\nfrom zero, the first token came after {first_token_s:.1f} s; the next answer took {awake_s:.2f} s"
            )

        rig.wait("without demand the engine is gone", lambda: not engine_pods(rig), 180)
        rig.wait("it says so", lambda: rig.condition("demo", "tiny", "Ready").get("reason") == "ScaledToZero")
        rig.clean()
    rig.close()
