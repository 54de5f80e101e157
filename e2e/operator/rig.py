"""Runs the real operator beside a cluster, and waits for what it does.

    rig = Rig(cluster)                     CRDs, RBAC, the operator's service account
    with rig.operator() as operator: ...   one replica, signed in as that account, logging to a file
    rig.wait("the service is ready", lambda: rig.ready(namespace, "chat"))

Everything is read with the administrator's credentials; the operator itself has only what `operator/rbac.yaml` gives.
Every wait has a deadline and, when it passes, shows the ends of the operators' logs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lightkube import ApiError, Client
from lightkube.config.kubeconfig import KubeConfig
from lightkube.generic_resource import GenericGlobalResource, GenericNamespacedResource
from lightkube.types import PatchType, on_error_stop

from e2e.cluster.cluster import Cluster
from e2e.cluster.processes import clean_environment
from llmfleet.api.meta import LABEL_SERVICE
from llmfleet.operator import kinds

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "llmfleet-system"
ACCOUNT = "llmfleet-operator"
_LOG_TAIL_LINES = 60
_POLL_S = 0.2
_LAUNCH = """
import json, sys
from pathlib import Path
from llmfleet.operator.main import run
from llmfleet.operator.settings import OperatorSettings
options = json.loads(sys.argv[1])
if "gateway_token_file" in options:
    options["gateway_token_file"] = Path(options["gateway_token_file"])
options["gateway_urls"] = tuple(options.get("gateway_urls", ()))
run(OperatorSettings(listen_host="127.0.0.1", listen_port=0, **options))
"""
_RESOURCES: dict[str, type[GenericNamespacedResource] | type[GenericGlobalResource]] = {
    "Deployment": kinds.DEPLOYMENTS,
    "ConfigMap": kinds.CONFIG_MAPS,
    "Pod": kinds.PODS,
    "Event": kinds.EVENTS,
    "Lease": kinds.LEASES,
    "Node": kinds.NODES,
    "LLMService": kinds.LLM_SERVICES,
    "ModelProfile": kinds.MODEL_PROFILES,
    "GPUType": kinds.GPU_TYPES,
    "FleetPolicy": kinds.FLEET_POLICIES,
}

Json = dict[str, Any]
T = TypeVar("T")


class RigError(Exception):
    """What was waited for did not come."""


class Operator:
    """One operator process."""

    def __init__(self, kubeconfig: Path, log: Path, identity: str, **options: Any) -> None:
        self.log = log
        self.identity = identity
        command = [sys.executable, "-c", _LAUNCH, json.dumps({"identity": identity, **options})]
        environment = clean_environment() | {"KUBECONFIG": str(kubeconfig)}
        with log.open("ab") as stream:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=stream)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def lines(self) -> list[Json]:
        """What it logged, without what is no JSON (tracebacks of the interpreter)."""
        found = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def said(self, message: str) -> Json | None:
        """The newest log line with this message."""
        return next((line for line in reversed(self.lines()) if line.get("msg") == message), None)

    def get(self, path: str) -> tuple[int, str]:
        """(status, body) of its HTTP port."""
        serving = self.said("serving health and metrics")
        if serving is None:
            raise RigError("the operator does not serve yet")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{serving['port']}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Its Prometheus samples by name with labels."""
        samples = (line.rsplit(" ", 1) for line in self.get("/metrics")[1].splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def rss_bytes(self) -> int:
        """Resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak_rss_bytes(self) -> int:
        """Largest resident memory so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def cpu_s(self) -> float:
        """CPU time used, that of running children included."""
        return sum(_cpu_s(pid) for pid in (self.pid, *self.children()))

    def children(self) -> list[int]:
        """Its child processes: the planner."""
        task = Path(f"/proc/{self.pid}/task")
        return [int(pid) for thread in task.iterdir() for pid in (thread / "children").read_text().split()]

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait(timeout=10)

    def terminate(self, deadline_s: float = 30) -> int:
        """SIGTERM, upon which it gives up its Lease; returns the exit code. SIGKILL after the deadline."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RigError(f"the operator did not end within {deadline_s:.0f} s:\n{self.tail()}") from None

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text().splitlines()[-_LOG_TAIL_LINES:])


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Rig:
    """A cluster made ready for the operator."""

    def __init__(self, cluster: Cluster, logs: Path) -> None:
        self.cluster = cluster
        self._logs = logs
        self._numbers = itertools.count(1)
        self._operators: list[Operator] = []
        config = KubeConfig.from_file(cluster.kubeconfig).get()
        self.client = Client(config=config, field_manager="rig", trust_env=False)
        cluster.kubectl("create", "namespace", NAMESPACE)
        self.apply_crds()
        cluster.kubectl("apply", "--server-side", "-f", ROOT / "operator" / "rbac.yaml")
        self._kubeconfig = cluster.service_account_kubeconfig(NAMESPACE, ACCOUNT)

    def apply_crds(self) -> None:
        """Installs the CRDs, or puts them back as they are in the checkout."""
        crds = ROOT / "crds"
        self.cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", crds)
        self.cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", crds)

    def close(self) -> None:
        """Closes the connections to the API server."""
        self.client.close()

    @contextlib.contextmanager
    def operator(self, identity: str | None = None, **options: Any) -> Iterator[Operator]:
        """A replica that lasts as long as the context."""
        operator = self.start_operator(identity, **options)
        try:
            yield operator
        finally:
            if operator.running:
                operator.terminate()

    def start_operator(self, identity: str | None = None, **options: Any) -> Operator:
        """A replica that the caller ends."""
        number = next(self._numbers)
        operator = Operator(
            self._kubeconfig, self._logs / f"operator-{number}.log", identity or f"replica-{number}", **options
        )
        self._operators.append(operator)
        return operator

    def wait(self, what: str, found: Callable[[], T | None], deadline_s: float = 60) -> T:
        """Polls until `found` gives something that is true. API errors count as not found."""
        end = time.monotonic() + deadline_s
        problem = ""
        while True:
            try:
                result = found()
            except ApiError as error:
                result, problem = None, f" (last: {error})"
            if result:
                return result
            if time.monotonic() > end:
                tails = "\n".join(f"--- {op.log.name}\n{op.tail()}" for op in self._operators[-2:])
                raise RigError(f"not within {deadline_s:.0f} s: {what}{problem}\n{tails}")
            time.sleep(_POLL_S)

    def apply(self, *objects: Json) -> None:
        """Server-side apply, forced."""
        for obj in objects:
            resource = _RESOURCES[obj["kind"]]
            name, namespace = obj["metadata"]["name"], obj["metadata"].get("namespace")
            if issubclass(resource, GenericNamespacedResource):
                self.client.patch(resource, name, obj, namespace=namespace, patch_type=PatchType.APPLY, force=True)
            else:
                self.client.patch(resource, name, obj, patch_type=PatchType.APPLY, force=True)

    def get(self, kind: str, name: str, namespace: str | None = None) -> Json | None:
        """An object, or None."""
        resource = _RESOURCES[kind]
        try:
            if issubclass(resource, GenericNamespacedResource):
                return self.client.get(resource, name, namespace=namespace)
            return self.client.get(resource, name)
        except ApiError as error:
            if error.status.code == 404:
                return None
            raise

    def list(self, kind: str, namespace: str = "*") -> list[Json]:
        """All objects of a kind in a namespace."""
        resource = _RESOURCES[kind]
        if issubclass(resource, GenericNamespacedResource):
            return list(self.client.list(resource, namespace=namespace, chunk_size=1000))
        return list(self.client.list(resource))

    def delete(self, kind: str, name: str, namespace: str | None = None) -> None:
        """Deletes an object; one that is gone is no error."""
        resource = _RESOURCES[kind]
        try:
            if issubclass(resource, GenericNamespacedResource):
                self.client.delete(resource, name, namespace=namespace)
            else:
                self.client.delete(resource, name)
        except ApiError as error:
            if error.status.code != 404:
                raise

    def condition(self, namespace: str, name: str, type_: str) -> Json:
        """A condition of an LLMService; empty when it has none."""
        return _condition(self.get("LLMService", name, namespace), type_)

    def ready(self, namespace: str, name: str) -> bool:
        """Whether Ready is True for the service's current spec."""
        service = self.get("LLMService", name, namespace)
        ready = _condition(service, "Ready")
        return service is not None and (ready.get("status"), ready.get("observedGeneration")) == (
            "True",
            service["metadata"]["generation"],
        )

    def wait_ready(self, namespace: str, name: str, deadline_s: float = 60) -> Json:
        """The service, once it is Ready."""
        self.wait(f"LLMService {namespace}/{name} is Ready", lambda: self.ready(namespace, name), deadline_s)
        service = self.get("LLMService", name, namespace)
        assert service is not None
        return service

    def replicas(self, namespace: str) -> dict[str, int]:
        """spec.replicas by Deployment name."""
        return {d["metadata"]["name"]: d["spec"]["replicas"] for d in self.list("Deployment", namespace)}

    def holder(self) -> str:
        """Identity of the leader, empty when there is none."""
        lease = self.get("Lease", "llmfleet-operator", NAMESPACE) or {}
        return str(lease.get("spec", {}).get("holderIdentity") or "")

    def events(self, namespace: str, name: str) -> set[str]:
        """Reasons of the Events on an object."""
        return {e["reason"] for e in self.list("Event", namespace) if e["involvedObject"]["name"] == name}

    def clean(self) -> None:
        """Removes what a test made: custom resources, and all that they own, are gone afterwards."""
        for kind in ("LLMService", "ModelProfile"):
            for obj in self.list(kind):
                self.delete(kind, obj["metadata"]["name"], obj["metadata"]["namespace"])
        for kind in ("GPUType", "FleetPolicy"):
            for obj in self.list(kind):
                self.delete(kind, obj["metadata"]["name"])
        self.wait("everything that was owned is gone", lambda: not self._owned(), 60)

    def _owned(self) -> bool:
        return any(
            LABEL_SERVICE in obj["metadata"].get("labels", {})
            for kind in ("Deployment", "ConfigMap", "Pod")
            for obj in self.list(kind)
        )


def _condition(service: Json | None, type_: str) -> Json:
    conditions = (service or {}).get("status", {}).get("conditions", [])
    return next((condition for condition in conditions if condition["type"] == type_), {})


class PodRecorder:
    """Watches the engine pods of one namespace from the start on: every state that the API server had."""

    def __init__(self, rig: Rig, namespace: str) -> None:
        self._client = rig.client
        self._namespace = namespace
        self.states: list[dict[str, Json]] = []
        """All pods by name, after each change, in the API server's order."""
        threading.Thread(target=self._record, daemon=True).start()

    def _record(self) -> None:
        pods: dict[str, Json] = {}
        # The watch ends with the cluster, or with an outage that a test makes.
        for kind, pod in self._client.watch(kinds.PODS, namespace=self._namespace, on_error=on_error_stop):
            if kind == "DELETED":
                pods.pop(pod["metadata"]["name"], None)
            else:
                pods[pod["metadata"]["name"]] = pod
            self.states.append(dict(pods))


def serves(pod: Json) -> bool:
    """Whether a gateway would send this pod a new request."""
    annotations = pod["metadata"].get("annotations", {})
    conditions = pod.get("status", {}).get("conditions", [])
    return (
        "deletionTimestamp" not in pod["metadata"]
        and "llmfleet.io/draining" not in annotations
        and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    )
