"""What of the demo outlives the command that started it: a cluster, an operator and a gateway.

Everything lies in `<cache>/session-<name>/`, and the cluster has the same name; `demo` unless told otherwise. The
operator and the gateway are ordinary processes of this machine that sign in with the tokens of their own service
accounts, so their rights are exactly what `operator/rbac.yaml` and `gateway/rbac.yaml` say. They are found again by
the marks that `e2e.cluster.processes` puts on them, so a second `make demo` replaces them and `make demo-down` ends
them, whatever happened in between.

With KUBECONFIG set, that cluster is used instead of one of our own. Its node must see this machine's files (the
engines run this machine's vLLM by hostPath), as the clusters of `python -m e2e.cluster up --profile node` do. What was
in it before the demo stays in it afterwards (`borrowed`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from e2e.cluster.binaries import NEEDED, ensure_binaries
from e2e.cluster.cluster import Cluster
from e2e.cluster.node import ENGINE_IMAGE
from e2e.cluster.processes import Processes, clean_environment
from e2e.cluster.removal import remove_abandoned
from e2e.cluster.state import ClusterError, cache_directory, cluster_directory
from e2e.demo import borrowed
from e2e.demo.manifests import REPOSITORY
from e2e.engine.environment import engine_environment
from e2e.engine.tiny_model import tiny_model
from e2e.operator.launch import (
    NAMESPACE,
    answers,
    free_port,
    gateway_command,
    open_url,
    operator_command,
    write_admin_token,
)

RESULT = REPOSITORY / "build" / "demo.json"
RECORD = "session.json"
COMPONENT_DEADLINE_S = 60
GRACE_S = 10


class DemoError(Exception):
    """The demo cannot go on; the message says what was waited for and ends with the guilty log."""


class Session:
    """The running demo. `say` and `show` print; everything else talks to the cluster."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.monotonic()
        self._directory = _directory(name)
        self._directory.mkdir(exist_ok=True, mode=0o700)
        self._cluster: Cluster | None = None
        self._kubeconfig = Path(os.environ["KUBECONFIG"]) if os.environ.get("KUBECONFIG") else None
        self._processes = Processes(self._directory, os.environ["PATH"])
        self.gateway_url = ""
        self.admin_url = ""

    def say(self, line: str) -> None:
        """One line of progress, with the seconds since the start."""
        print(f"[{time.monotonic() - self._started:5.0f}s] {line}", flush=True)

    def show(self, text: str, end: str = "\n") -> None:
        """Text as it is."""
        print(text, end=end, flush=True)

    def up(self) -> None:
        """Installs the engine, and starts the cluster or checks the one in KUBECONFIG."""
        self.say("vLLM and the tiny model: from the cache, or installed now (a few minutes, several GB)")
        engine_environment(self.say)
        tiny_model(self.say)
        ensure_binaries(NEEDED["node"], self.say)
        if self._kubeconfig is None:
            self._cluster = Cluster.start("node", self._name, detached=True, report=self.say)
            self._kubeconfig = self._cluster.kubeconfig
        else:
            self.say(f"using the cluster of {self._kubeconfig}")
        self._remember()

    def engine_node(self) -> str:
        """A Ready node that has the engine image. Raises DemoError where there is none."""
        nodes = json.loads(self.kubectl("get", "nodes", "-o", "json"))["items"]
        for node in nodes:
            images = [name for image in node["status"].get("images", []) for name in image.get("names", [])]
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"]["conditions"])
            if ready and ENGINE_IMAGE in images:
                return str(node["metadata"]["name"])
        raise DemoError(
            f"no Ready node of this cluster has the image {ENGINE_IMAGE}: unset KUBECONFIG, or start a cluster that "
            "shares this machine's files with `python -m e2e.cluster up --profile node`"
        )

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """kubectl as administrator. Raises DemoError with kubectl's own words."""
        return _kubectl(self._directory, self._kubeconfig, *arguments, stdin=stdin)

    def apply(self, manifest: dict[str, Any]) -> None:
        """Server-side apply of one object."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(manifest))

    def start_components(self) -> None:
        """Starts operator and gateway, replacing those of an earlier run, and waits until both are ready."""
        for component in ("operator", "gateway"):
            self._processes.stop(component, GRACE_S)
        token_file = write_admin_token(self._directory / "admin-token")
        gateway, admin, health = (free_port() for _ in range(3))
        self.gateway_url = f"http://127.0.0.1:{gateway}"
        self.admin_url = f"http://127.0.0.1:{admin}"
        self._start(
            "operator",
            operator_command(port=health, gateway_urls=[self.admin_url], token_file=token_file, log_format="console"),
        )
        self._start(
            "gateway",
            gateway_command(port=gateway, admin_port=admin, token_file=token_file, log_format="console"),
        )
        self._wait_ready("operator", f"http://127.0.0.1:{health}/readyz")
        self._wait_ready("gateway", f"{self.admin_url}/readyz")
        self.say(f"operator and gateway are ready; gateway at {self.gateway_url}")

    def _start(self, component: str, command: list[str]) -> None:
        kubeconfig = self._service_account_kubeconfig(f"llmfleet-{component}")
        self.say(f"starting the {component}; log in {self._directory / 'logs' / f'{component}.log'}")
        # The processes get no KUBECONFIG of the caller's: each signs in as its own service account.
        self._processes.start(component, ["env", f"KUBECONFIG={kubeconfig}", *command])

    def _service_account_kubeconfig(self, account: str) -> Path:
        """A kubeconfig with a real token of a service account, good for a day."""
        view = json.loads(self.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
        token = self.kubectl("create", "token", account, "-n", NAMESPACE, "--duration=24h").strip()
        name = view["contexts"][0]["name"]
        view["users"] = [{"name": account, "user": {"token": token}}]
        view["contexts"][0]["context"]["user"] = account
        view["current-context"] = name
        target = self._directory / f"{account}.kubeconfig"
        target.touch(mode=0o600)
        target.write_text(json.dumps(view))
        return target

    def _wait_ready(self, component: str, url: str) -> None:
        self._processes.wait(f"answer of {url}", lambda: answers(url), [component], COMPONENT_DEADLINE_S)

    def gateway_metrics(self) -> dict[str, float]:
        """The gateway's Prometheus samples by name with labels."""
        with open_url(f"{self.admin_url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def check_components(self) -> None:
        """Raises DemoError with the log's end when operator or gateway has ended."""
        for component in ("operator", "gateway"):
            if not self._processes.alive(component):
                raise DemoError(f"the {component} ended\n{self._processes.log_tail(component)}")

    def evidence(self, namespace: str) -> str:
        """What explains a deadline: pods, their events, the operator's last words."""
        parts = [
            self.kubectl("get", "pods", "-n", namespace, "-o", "wide"),
            self.kubectl("get", "events", "-n", namespace, "--sort-by=.lastTimestamp"),
            *(self._processes.log_tail(component) for component in ("operator", "gateway")),
        ]
        pods = json.loads(self.kubectl("get", "pods", "-n", namespace, "-o", "json"))["items"]
        for pod in pods:
            name = pod["metadata"]["name"]
            parts.append(f"--- log of {name}\n" + self.kubectl("logs", name, "-n", namespace, "--tail=30"))
        return "\n".join(parts)

    def _remember(self) -> None:
        """Says to `down` whose cluster it is, and what was in a borrowed one before the demo was first up in it."""
        record: dict[str, Any] = {"borrowed_kubeconfig": None}
        if self._cluster is None:
            uid = self.kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}")
            before = _record(self._directory)
            known = before.get("cluster") == uid
            record = {
                "borrowed_kubeconfig": str(self._kubeconfig),
                "cluster": uid,
                "found": before["found"] if known else borrowed.found(self.kubectl),
            }
        (self._directory / RECORD).write_text(json.dumps(record))


def down(name: str) -> None:
    """Ends the demo, however far it came: processes, cluster (or what was put into a borrowed one), files.

    Raises DemoError where a borrowed cluster cannot be left.
    """
    directory = _directory(name)
    Processes(directory, os.environ["PATH"]).kill_all()
    remove_abandoned()
    # No such cluster: the demo used a borrowed one, or did not come that far.
    with contextlib.suppress(ClusterError):
        Cluster.attach(name).down()
    record = _record(directory)
    if record.get("borrowed_kubeconfig"):
        kubeconfig = Path(record["borrowed_kubeconfig"])
        if kubeconfig.exists():
            borrowed.leave(functools.partial(_kubectl, directory, kubeconfig), record["found"])
    shutil.rmtree(directory, ignore_errors=True)


def _kubectl(directory: Path, kubeconfig: Path | None, *arguments: str | Path, stdin: str | None = None) -> str:
    # kubectl would keep what it discovers under the user's home, and trust it when an address is reused.
    options = [f"--kubeconfig={kubeconfig}", f"--cache-dir={directory / 'kubectl'}"]
    command = [str(ensure_binaries(["kubectl"], print)["kubectl"]), *options, *map(str, arguments)]
    said = f"kubectl {' '.join(map(str, arguments))}"
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=clean_environment(), timeout=180
        )
    except subprocess.TimeoutExpired as late:
        raise DemoError(f"{said} did not end within 180 s") from late
    if done.returncode != 0:
        raise DemoError(f"{said}: {done.stderr.strip()}")
    return done.stdout


def _record(directory: Path) -> dict[str, Any]:
    """What `_remember` wrote; {} where it did not come that far."""
    try:
        record: dict[str, Any] = json.loads((directory / RECORD).read_text())
    except FileNotFoundError:
        return {}
    return record


def _directory(name: str) -> Path:
    cluster_directory(name)  # raises ClusterError for a name that no cluster may have
    return cache_directory() / f"session-{name}"
