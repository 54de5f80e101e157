"""Runs the real operator and the real gateway beside a cluster, and waits for what they do.

    rig = Rig(cluster, logs)                                        CRDs, RBAC, the operator's service account
    with rig.operator() as operator: ...                            one replica, signed in as that account
    with rig.gateway() as gate, rig.operator(gateway=gate): ...     and a gateway, whom it asks for demand
    rig.wait("the service is ready", lambda: rig.ready(namespace, "chat"))

Everything is read with the administrator's credentials; operator and gateway themselves have only what their
`rbac.yaml` gives. Every wait has a deadline and, when it passes, shows the ends of their logs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightkube import ApiError, Client
from lightkube.config.kubeconfig import KubeConfig
from lightkube.generic_resource import GenericGlobalResource, GenericNamespacedResource
from lightkube.types import PatchType, on_error_stop

from e2e.cluster.cluster import Cluster
from e2e.cluster.processes import marked_environment
from e2e.operator.components import AdminPort, Component
from e2e.operator.components import Gateway as Gateway
from e2e.operator.components import Operator as Operator
from e2e.operator.components import RigError as RigError
from e2e.operator.launch import (
    GATEWAY_ACCOUNT,
    GATEWAY_RBAC,
    NAMESPACE_FILE,
    OPERATOR_ACCOUNT,
    OPERATOR_RBAC,
    ROOT,
    write_admin_token,
)
from e2e.operator.launch import NAMESPACE as NAMESPACE
from llmfleet.api.meta import LABEL_SERVICE
from llmfleet.operator import kinds

_POLL_S = 0.2
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
    "PowerDomain": kinds.POWER_DOMAINS,
    "FleetPolicy": kinds.FLEET_POLICIES,
}

OWN_KINDS = ("LLMService", "ModelProfile", "GPUType", "FleetPolicy", "PowerDomain")

Json = dict[str, Any]
T = TypeVar("T")


def patience() -> float:
    """How many times as long as on a quiet machine something may take: processes that want to run, by core."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


class Rig:
    """A cluster made ready for the operator."""

    def __init__(self, cluster: Cluster, logs: Path) -> None:
        self.cluster = cluster
        self._logs = logs
        self._numbers = itertools.count(1)
        self._components: list[Component] = []
        config = KubeConfig.from_file(cluster.kubeconfig).get()
        self.client = Client(config=config, field_manager="rig", trust_env=False)
        cluster.kubectl("apply", "--server-side", "-f", NAMESPACE_FILE)
        self.apply_crds()
        cluster.kubectl("apply", "--server-side", "-f", OPERATOR_RBAC)
        self._kubeconfig = cluster.service_account_kubeconfig(NAMESPACE, OPERATOR_ACCOUNT)

    def apply_crds(self) -> None:
        """Installs the CRDs, or puts them back as they are in the checkout."""
        crds = ROOT / "crds"
        self.cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", crds)
        self.cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", crds)
        # A kind whose schema has changed answers "storage is (re)initializing" for a moment.
        self.wait("every kind is served", lambda: [self.list(kind) for kind in OWN_KINDS])

    def close(self) -> None:
        """Closes the connections to the API server."""
        self.client.close()

    @contextlib.contextmanager
    def operator(
        self, identity: str | None = None, *, gateway: AdminPort | None = None, token_file: Path | None = None
    ) -> Iterator[Operator]:
        """A replica that lasts as long as the context; see `start_operator`."""
        operator = self.start_operator(identity, gateway=gateway, token_file=token_file)
        try:
            yield operator
        finally:
            if operator.running:
                operator.terminate()

    def start_operator(
        self, identity: str | None = None, *, gateway: AdminPort | None = None, token_file: Path | None = None
    ) -> Operator:
        """A replica that the caller ends. It asks `gateway` for demand, with the token of `token_file` or, where
        none is given, with the gateway's own."""
        number = next(self._numbers)
        operator = Operator(
            self._environment(self._kubeconfig, "operator"),
            self._logs / f"operator-{number}.log",
            identity or f"replica-{number}",
            gateway_urls=() if gateway is None else (gateway.admin_url,),
            token_file=token_file or (None if gateway is None else gateway.token_file),
        )
        self._components.append(operator)
        return operator

    @contextlib.contextmanager
    def gateway(self, *, queue_wait_s: float | None = None) -> Iterator[Gateway]:
        """A gateway that is ready, and lasts as long as the context. `queue_wait_s`: how long a request may wait for
        an engine, if not as long as by default."""
        number = next(self._numbers)
        self.cluster.kubectl("apply", "--server-side", "-f", GATEWAY_RBAC)
        gateway = Gateway(
            self._environment(self.cluster.service_account_kubeconfig(NAMESPACE, GATEWAY_ACCOUNT), "gateway"),
            self._logs / f"gateway-{number}.log",
            write_admin_token(self._logs / f"gateway-{number}.token"),
            queue_wait_s,
        )
        self._components.append(gateway)
        try:
            self.wait("the gateway is ready", lambda: gateway.ready)
            yield gateway
        finally:
            if gateway.running:
                gateway.terminate()

    def _environment(self, kubeconfig: Path, component: str) -> dict[str, str]:
        return marked_environment(self.cluster.directory, component) | {"KUBECONFIG": str(kubeconfig)}

    def wait(self, what: str, found: Callable[[], T | None], deadline_s: float = 60) -> T:
        """Polls until `found` gives something that is true. API errors count as not found. The deadline is that of a
        quiet machine."""
        began = time.monotonic()
        problem = ""
        while True:
            try:
                result = found()
            except ApiError as error:
                result, problem = None, f" (last: {error})"
            if result:
                return result
            if time.monotonic() > began + deadline_s * patience():
                tails = "\n".join(f"--- {op.log.name}\n{op.tail()}" for op in self._components[-2:])
                raise RigError(f"not within {time.monotonic() - began:.0f} s: {what}{problem}\n{tails}")
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
        return is_ready(self.get("LLMService", name, namespace))

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
        for kind in ("GPUType", "FleetPolicy", "PowerDomain"):
            for obj in self.list(kind):
                self.delete(kind, obj["metadata"]["name"])
        # The garbage collector would do it, but needs up to half a minute to learn of a new kind of owner.
        for kind in ("Deployment", "ConfigMap"):
            for obj in self._owned(kind):
                self.delete(kind, obj["metadata"]["name"], obj["metadata"]["namespace"])
        owned = ("Deployment", "ConfigMap", "Pod")
        self.wait("everything that was owned is gone", lambda: not any(map(self._owned, owned)), 60)

    def _owned(self, kind: str) -> Sequence[Json]:
        return [obj for obj in self.list(kind) if LABEL_SERVICE in obj["metadata"].get("labels", {})]


def _condition(service: Json | None, type_: str) -> Json:
    conditions = (service or {}).get("status", {}).get("conditions", [])
    return next((condition for condition in conditions if condition["type"] == type_), {})


def is_ready(service: Json | None) -> bool:
    """Whether Ready is True for the service's own spec."""
    ready = _condition(service, "Ready")
    return service is not None and (ready.get("status"), ready.get("observedGeneration")) == (
        "True",
        service["metadata"]["generation"],
    )


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
