"""Each manifest of examples/invalid gets the answer that stands beside it, and a sound service notices none of them.

An `.expected` file names in its first line who answers: `admission` (the API server refuses the object) or
`condition TYPE REASON` (the operator says so in the service's status, and in an Event). Every further line is a text
that the message must contain: object, field, value, what is accepted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster import Cluster, ClusterError
from e2e.cluster.pytest_plugin import fresh_namespace

ROOT = Path(__file__).resolve().parents[2]
INVALID = ROOT / "examples" / "invalid"
NODE_DEVICES = 16
ANSWER_DEADLINE_S = 90
SETTLE_DEADLINE_S = 120


@dataclass(frozen=True)
class Example:
    """One manifest and the answer that it must get."""

    path: Path
    answered_by: str
    condition: tuple[str, str]
    message_contains: tuple[str, ...]

    @property
    def documents(self) -> list[dict[str, Any]]:
        return list(yaml.safe_load_all(self.path.read_text()))


def read_example(path: Path) -> Example:
    first, *texts = path.with_suffix(".expected").read_text().splitlines()
    answered_by, *condition = first.split()
    assert answered_by in ("admission", "condition"), path
    kind, reason = condition or ("", "")
    return Example(path, answered_by, (kind, reason), tuple(texts))


EXAMPLES = [read_example(path) for path in sorted(INVALID.glob("*.yaml"))]
REFUSED = [example for example in EXAMPLES if example.answered_by == "admission"]
ANSWERED = [example for example in EXAMPLES if example.answered_by == "condition"]


def test_there_are_thirty_examples_and_more_each_with_its_answer() -> None:
    assert len(EXAMPLES) > 30
    assert {path.stem for path in INVALID.glob("*.expected")} == {example.path.stem for example in EXAMPLES}
    assert all(len(example.message_contains) >= 2 for example in EXAMPLES)


@pytest.fixture(scope="module")
def refusing(fleet: Cluster) -> Iterator[str]:
    """A namespace for examples that are refused: of each only what stands before the refused object is stored."""
    with fresh_namespace(fleet) as name:
        yield name


@pytest.fixture(scope="module")
def fleet(control_plane: Cluster) -> Cluster:
    """The shared control plane with llmfleet's CRDs."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", ROOT / "crds")
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", ROOT / "crds")
    return control_plane


def apply(cluster: Cluster, namespace: str, *documents: dict[str, Any]) -> None:
    """Raises ClusterError with the API server's words where it refuses."""
    cluster.kubectl("apply", "--server-side", "-n", namespace, "-f", "-", stdin=yaml.safe_dump_all(documents))


def delete(cluster: Cluster, namespace: str, *documents: dict[str, Any]) -> None:
    if documents:
        cluster.kubectl("delete", "-n", namespace, "--ignore-not-found", "-f", "-", stdin=yaml.safe_dump_all(documents))


@pytest.mark.cluster
@pytest.mark.parametrize("example", REFUSED, ids=lambda example: example.path.stem)
def test_the_api_server_refuses_it_and_says_why(fleet: Cluster, refusing: str, example: Example) -> None:
    *earlier, last = example.documents
    try:
        for document in earlier:
            apply(fleet, refusing, document)
        with pytest.raises(ClusterError) as refused:
            apply(fleet, refusing, last)
        for text in example.message_contains:
            assert text in str(refused.value)
    finally:
        delete(fleet, refusing, *earlier)


class Operated:
    """A namespace with a sound service, the condition examples, and a running operator."""

    def __init__(self, cluster: Cluster, namespace: str, log: Path) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.log = log

    def objects(self, kind: str) -> list[dict[str, Any]]:
        text = self.cluster.kubectl("get", kind, "-n", self.namespace, "-o", "json")
        items: list[dict[str, Any]] = json.loads(text)["items"]
        return items

    def conditions(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Conditions of all services by (service, type)."""
        return {
            (item["metadata"]["name"], condition["type"]): condition
            for item in self.objects("llmservices")
            for condition in item.get("status", {}).get("conditions", ())
        }

    def wait(self, what: str, check: Callable[[], bool], deadline_s: float) -> None:
        until = time.monotonic() + deadline_s
        while not check():
            if time.monotonic() > until:
                tail = "\n".join(self.log.read_text().splitlines()[-40:])
                status = json.dumps([i.get("status") for i in self.objects("llmservices")], indent=1)
                pytest.fail(f"no {what} within {deadline_s:g} s\n--- end of the operator's log:\n{tail}\n{status}")
            time.sleep(0.25)

    def engines(self) -> dict[str, str]:
        """The service of every engine pod, by the pod's uid: a replaced pod has another."""
        return {
            pod["metadata"]["uid"]: pod["metadata"]["labels"]["llmfleet.io/service"] for pod in self.objects("pods")
        }

    def sound_is_ready(self) -> bool:
        return self.conditions().get(("sound", "Ready"), {}).get("status") == "True"


@pytest.fixture(scope="module")
def operated(fleet: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """The operator at work: the sound service is Ready, then every condition example is applied beside it."""
    namespace = "invalid-examples"
    log = tmp_path_factory.mktemp("operator") / "operator.log"
    sound = list(yaml.safe_load_all((INVALID / "sound" / "objects.yaml").read_text()))
    bad = [document for example in ANSWERED for document in example.documents]
    fleet.kubectl("create", "namespace", namespace)
    fleet.kubectl("wait", "--for=create", "serviceaccount/default", "-n", namespace, "--timeout=30s")
    nodes = fleet.add_kwok_nodes(
        1,
        allocatable={"cpu": "64", "memory": "512Gi", "pods": "110", "example.com/gpu": str(NODE_DEVICES)},
        prefix=namespace,
    )
    environment = os.environ | {"KUBECONFIG": str(fleet.kubeconfig)}
    command = [str(Path(sys.executable).with_name("llmfleet")), "operator", "--namespace", namespace]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0", "--log-format", "console"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    running = Operated(fleet, namespace, log)
    try:
        apply(fleet, namespace, *sound)
        running.wait("Ready sound service", running.sound_is_ready, SETTLE_DEADLINE_S)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        delete(fleet, namespace, *sound, *bad)
        fleet.kubectl("delete", "node", *nodes)
        fleet.kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.mark.cluster
def test_the_operator_answers_in_a_condition_and_an_event_and_leaves_the_sound_service_alone(
    operated: Operated,
) -> None:
    engines_before = operated.engines()
    assert set(engines_before.values()) == {"sound"}
    expected = {(e.documents[-1]["metadata"]["name"], *e.condition): e.message_contains for e in ANSWERED}
    apply(operated.cluster, operated.namespace, *(document for e in ANSWERED for document in e.documents))

    def unanswered() -> set[tuple[str, str, str]]:
        found = operated.conditions().items()
        return expected.keys() - {(*key, c["reason"]) for key, c in found if c["status"] == "False"}

    operated.wait("condition for each example", lambda: not unanswered(), ANSWER_DEADLINE_S)
    conditions = operated.conditions()
    messages = {(service, kind): conditions[service, kind]["message"] for service, kind, _ in expected}
    for (service, kind, _), texts in expected.items():
        for text in texts:
            assert text in messages[service, kind]
        assert conditions[service, "Ready"]["status"] == "False"

    def without_event() -> set[tuple[str, str]]:
        warnings = [event for event in operated.objects("events") if event["type"] == "Warning"]
        said = {(event["involvedObject"]["name"], event["reason"]) for event in warnings}
        return {(service, reason) for service, _, reason in expected} - said

    operated.wait("Warning event for each example", lambda: not without_event(), ANSWER_DEADLINE_S)
    assert operated.sound_is_ready()
    assert operated.engines() == engines_before


@pytest.mark.cluster
def test_explain_says_of_the_running_fleet_what_serves_and_why_another_does_not(operated: Operated) -> None:
    lost = next(example for example in ANSWERED if example.condition[1] == "ProfileNotFound")
    service = lost.documents[-1]["metadata"]["name"]
    apply(operated.cluster, operated.namespace, *lost.documents)
    operated.wait(
        f"condition on {service}",
        lambda: operated.conditions().get((service, "Planned"), {}).get("reason") == "ProfileNotFound",
        ANSWER_DEADLINE_S,
    )

    def explained(name: str) -> str:
        return subprocess.run(
            [Path(sys.executable).with_name("llmfleet"), "explain", name, "-n", operated.namespace],
            env=os.environ | {"KUBECONFIG": str(operated.cluster.kubeconfig)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    sound = explained("sound")
    assert f"{operated.namespace}/sound: 1 of 1 requests per second for 1.40 per hour" in sound
    assert "2 x example-gpu" in sound
    assert f"{operated.namespace}/{service} has no plan: ProfileNotFound" in explained(service)
