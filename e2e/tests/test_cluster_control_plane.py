"""The control-plane profile as its users rely on it, against the real thing."""

from __future__ import annotations

import json
import ssl
import subprocess
import textwrap
import urllib.error
import urllib.request
from base64 import b64decode
from typing import Any

import pytest

from e2e.cluster import Cluster, ClusterError
from e2e.cluster.processes import marked_processes
from e2e.cluster.state import cluster_directory

pytestmark = pytest.mark.cluster


def _objects(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def _server(cluster: Cluster) -> tuple[str, ssl.SSLContext]:
    described = _objects(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
    authority = b64decode(described["certificate-authority-data"]).decode()
    return described["server"], ssl.create_default_context(cadata=authority)


def test_a_deployment_becomes_ready_on_the_nodes_that_offer_its_resource(
    control_plane: Cluster, namespace: str
) -> None:
    prefix = f"gpu-{namespace}"
    names = control_plane.add_kwok_nodes(
        2, labels={"for": namespace}, allocatable={"example.com/gpu": "1"}, prefix=prefix
    )
    deployment = f"""
    apiVersion: apps/v1
    kind: Deployment
    metadata: {{name: engine, namespace: {namespace}}}
    spec:
      replicas: 2
      selector: {{matchLabels: {{app: engine}}}}
      template:
        metadata: {{labels: {{app: engine}}}}
        spec:
          containers:
          - name: engine
            image: none
            resources: {{limits: {{example.com/gpu: 1}}}}
    """
    try:
        control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=textwrap.dedent(deployment))
        control_plane.kubectl("rollout", "status", "deployment/engine", "-n", namespace, "--timeout=60s")
        pods = _objects(control_plane.kubectl("get", "pods", "-n", namespace, "-o", "json"))["items"]
        assert {pod["spec"]["nodeName"] for pod in pods} == set(names)
    finally:
        control_plane.kubectl("delete", "nodes", *names)


def test_anonymous_requests_are_refused(control_plane: Cluster) -> None:
    server, trust = _server(control_plane)
    for path in ("/readyz", "/version", "/api/v1/nodes"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(server + path, context=trust, timeout=10)
        assert refusal.value.code == 401
        refusal.value.close()


def test_a_made_up_token_is_refused(control_plane: Cluster) -> None:
    server, trust = _server(control_plane)
    request = urllib.request.Request(f"{server}/api", headers={"Authorization": "Bearer made-up"})
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, context=trust, timeout=10)
    assert refusal.value.code == 401
    refusal.value.close()


def test_the_server_certificate_is_not_trusted_without_the_clusters_authority(control_plane: Cluster) -> None:
    server, _ = _server(control_plane)
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(server + "/readyz", timeout=10)


def test_a_service_account_may_do_what_rbac_grants_it_and_no_more(control_plane: Cluster, namespace: str) -> None:
    control_plane.kubectl("create", "serviceaccount", "reader", "-n", namespace)
    kubeconfig = control_plane.service_account_kubeconfig(namespace, "reader")
    identity = _objects(control_plane.kubectl("--kubeconfig", kubeconfig, "auth", "whoami", "-o", "json"))
    assert identity["status"]["userInfo"]["username"] == f"system:serviceaccount:{namespace}:reader"

    listing = ("--kubeconfig", kubeconfig, "get", "configmaps", "-n", namespace)
    with pytest.raises(ClusterError, match=r"Forbidden.*cannot list resource \"configmaps\""):
        control_plane.kubectl(*listing)

    control_plane.kubectl("create", "role", "reader", "-n", namespace, "--verb=list", "--resource=configmaps")
    binding = ("rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:reader")
    control_plane.kubectl("create", *binding, "-n", namespace)
    assert "kube-root-ca.crt" in control_plane.kubectl(*listing)
    with pytest.raises(ClusterError, match="Forbidden"):
        control_plane.kubectl("--kubeconfig", kubeconfig, "get", "secrets", "-n", namespace)


def test_a_kubeconfig_for_an_account_that_does_not_exist_is_an_error(control_plane: Cluster, namespace: str) -> None:
    with pytest.raises(ClusterError, match='serviceaccounts "nobody" not found'):
        control_plane.service_account_kubeconfig(namespace, "nobody")


def test_pod_security_is_enforced_in_a_restricted_namespace(control_plane: Cluster, namespace: str) -> None:
    control_plane.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    with pytest.raises(ClusterError, match="violates PodSecurity"):
        control_plane.kubectl("run", "loose", "--image=none", "-n", namespace, "--dry-run=server")


def test_cel_rules_of_a_custom_resource_are_enforced_under_server_side_apply(
    control_plane: Cluster, namespace: str
) -> None:
    group = f"{namespace}.example.com"
    definition = f"""
    apiVersion: apiextensions.k8s.io/v1
    kind: CustomResourceDefinition
    metadata: {{name: widgets.{group}}}
    spec:
      group: {group}
      scope: Namespaced
      names: {{plural: widgets, singular: widget, kind: Widget}}
      versions:
      - name: v1
        served: true
        storage: true
        schema:
          openAPIV3Schema:
            type: object
            properties:
              spec:
                type: object
                properties: {{min: {{type: integer}}, max: {{type: integer}}}}
                x-kubernetes-validations:
                - {{rule: "self.min <= self.max", message: "min must not exceed max"}}
    """
    widget = (
        '{{"apiVersion": "{0}/v1", "kind": "Widget", "metadata": {{"name": "w"}}, "spec": {{"min": {1}, "max": 3}}}}'
    )
    apply = ("apply", "--server-side", "--field-manager=test", "-n", namespace, "-f", "-")
    try:
        control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=textwrap.dedent(definition))
        control_plane.kubectl("wait", "--for=condition=Established", f"crd/widgets.{group}", "--timeout=30s")
        control_plane.kubectl(*apply, stdin=widget.format(group, 2))
        with pytest.raises(ClusterError, match="min must not exceed max"):
            control_plane.kubectl(*apply, stdin=widget.format(group, 4))
        kept = _objects(control_plane.kubectl("get", f"widgets.{group}", "w", "-n", namespace, "-o", "json"))
        assert kept["spec"] == {"min": 2, "max": 3}
    finally:
        control_plane.kubectl("delete", "crd", f"widgets.{group}")


def test_an_api_outage_refuses_connections_and_keeps_the_data(control_plane: Cluster, namespace: str) -> None:
    control_plane.kubectl("create", "configmap", "kept", "--from-literal=a=b", "-n", namespace)
    control_plane.stop_api_server()
    try:
        assert not control_plane.healthy()
        with pytest.raises(ClusterError, match="refused"):
            control_plane.kubectl("get", "configmap", "kept", "-n", namespace)
    finally:
        control_plane.start_api_server()
    kept = _objects(control_plane.kubectl("get", "configmap", "kept", "-n", namespace, "-o", "json"))
    assert kept["data"] == {"a": "b"}
    # The others ride the outage out: a new namespace gets its account from the controller manager.
    control_plane.kubectl("create", "namespace", f"{namespace}-after")
    control_plane.kubectl("wait", "--for=create", "serviceaccount/default", "-n", f"{namespace}-after", "--timeout=60s")
    assert control_plane.healthy()


def test_workloads_of_a_namespace_end_and_nothing_else_does(control_plane: Cluster, namespace: str) -> None:
    control_plane.kubectl("create", "configmap", "kept", "-n", namespace)
    control_plane.kubectl("create", "deployment", "engine", "--image=none", "-n", namespace)
    control_plane.kubectl("wait", "--for=create", "pod", "-l", "app=engine", "-n", namespace, "--timeout=60s")
    control_plane.end_workloads(namespace)
    for kind in ("deployment", "replicaset", "pod"):
        control_plane.kubectl("wait", "--for=delete", kind, "-l", "app=engine", "-n", namespace, "--timeout=60s")
    assert "configmap/kept" in control_plane.kubectl("get", "configmaps", "-n", namespace, "-o", "name")


def test_two_clusters_run_side_by_side_and_know_nothing_of_each_other(control_plane: Cluster, namespace: str) -> None:
    with Cluster.start("control-plane") as other:
        assert other.kubeconfig != control_plane.kubeconfig
        with pytest.raises(ClusterError, match="not found"):
            other.kubectl("get", "namespace", namespace)
        with pytest.raises(ClusterError, match=r"[Uu]nauthorized|unknown authority|certificate"):
            _call_with_foreign_credentials(control_plane, other)
    assert control_plane.healthy()


def _call_with_foreign_credentials(mine: Cluster, other: Cluster) -> None:
    document = _objects(mine.kubeconfig.read_text())
    document["clusters"] = _objects(other.kubeconfig.read_text())["clusters"]
    mixed = mine.kubeconfig.with_name("mixed.kubeconfig")
    mixed.write_text(json.dumps(document))
    other.kubectl("--kubeconfig", mixed, "get", "namespaces")


def test_down_leaves_no_process_and_no_file() -> None:
    cluster = Cluster.start("control-plane", "test-down-leaves-nothing")
    directory = cluster_directory(cluster.name)
    pids = marked_processes(directory)
    assert len(pids) == len(cluster.components()) == 5
    cluster.down()
    assert marked_processes(directory) == []
    assert not directory.exists()
    alive = subprocess.run(["ps", "-o", "pid=", "-p", ",".join(map(str, pids))], capture_output=True, text=True)
    assert alive.stdout.split() == []
