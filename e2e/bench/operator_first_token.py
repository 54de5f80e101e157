"""How much the product adds to an engine's start: from `kubectl apply` of a service to its first token.

    apply --> Deployment --> pod, node, sandbox --> [ engine starts ] --> Ready --> gateway --> first token
    |------------- before ----------------------|                    |----------- after -----------------|

Real node, real operator, real gateway, one real vLLM on a core of its own. The engine's own start lasts from the
first sight of a process that runs vLLM for this service until its `/health` first answers 200; everything before and
after is overhead. The former is looked for in the process table every 20 ms (the start time that the kernel keeps is
that of the container runtime's process, which becomes the engine only later), the latter is asked every 50 ms: what
Kubernetes itself writes down is rounded to seconds. The client's request comes right after the apply. It is refused as
long as the gateway does not know the service, which takes a moment, and then waits at the gateway for the engine.

The first token costs the engine some computing of its own, since it has not warmed up; that counts as overhead.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from e2e.cluster.cluster import Cluster
from e2e.demo.manifests import EXAMPLES, load
from e2e.engine.environment import engine_environment
from e2e.engine.tiny_model import tiny_model
from e2e.operator.rig import Json, Rig, RigError

GPU_TYPE = "cpu-fast"
API_KEY = "bench-key"
_SERVICE_NAMESPACE = "demo"
_ENGINE_PORT = 8000
_PROCESS_POLL_S = 0.02
_HEALTH_POLL_S = 0.05
_ASK_AGAIN_S = 0.02
_DEADLINE_S = 300.0


@dataclass(frozen=True)
class FirstToken:
    """One run; all in seconds since the start of `kubectl apply`."""

    before_s: float
    """The engine's process was seen."""
    healthy_s: float
    """The engine answered its health check."""
    token_s: float
    """The client got the first token."""

    @property
    def engine_start_s(self) -> float:
        """The engine's own start."""
        return self.healthy_s - self.before_s

    @property
    def after_s(self) -> float:
        """From the engine's health to the token."""
        return self.token_s - self.healthy_s

    @property
    def overhead_s(self) -> float:
        """Everything else."""
        return self.before_s + self.after_s


def measure(scratch: Path, runs: int) -> list[FirstToken]:
    """Starts a node cluster, operator and gateway, and measures one service after the other."""
    print("starting a cluster with a real node ...", flush=True)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster.start("node"))
        cluster.advertise(cluster.node_name, {f"demo.llmfleet.io/{GPU_TYPE}": 1}, labels={"llmfleet.io/demo": "true"})
        rig = stack.enter_context(contextlib.closing(Rig(cluster, scratch)))
        service = _prepare(cluster)
        gateway = stack.enter_context(rig.gateway())
        operator = stack.enter_context(rig.operator(gateway=gateway))
        rig.wait("the operator has made a plan", lambda: operator.said("planned"))
        found = []
        for run in range(runs):
            one = _run(rig, gateway.url, service, f"tiny-{run}", scratch)
            print(
                f"apply to first token, run {run + 1} of {runs}: {one.token_s:.2f} s; {one.before_s:.2f} s to the "
                f"engine's process, {one.engine_start_s:.2f} s for its start, {one.after_s:.2f} s to the token",
                flush=True,
            )
            found.append(one)
            rig.delete("LLMService", f"tiny-{run}", _SERVICE_NAMESPACE)
            rig.wait("the engine is gone", lambda: not rig.list("Pod", _SERVICE_NAMESPACE), 180)
        return found


def _prepare(cluster: Cluster) -> Json:
    """Applies everything of the demo but its service, and returns that, cut to one engine."""
    paths = {
        "ENGINE": str(engine_environment()),
        "MODEL": str(tiny_model()),
        "PYTHON_PREFIX": sys.base_prefix,
        "API_KEY": API_KEY,
    }
    names = ("namespace", "gputypes", "modelprofile", "llmservice")
    objects = [manifest for name in names for manifest in load(EXAMPLES / f"{name}.yaml", paths)]
    service = next(manifest for manifest in objects if manifest["kind"] == "LLMService")
    service["spec"]["gpuTypes"] = [GPU_TYPE]
    service["spec"]["traffic"]["requestsPerSecond"] = 1
    service["spec"]["engine"]["terminationGracePeriodSeconds"] = 15
    for manifest in objects:
        if manifest is not service:
            cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest))
    return service


def _run(rig: Rig, gateway: str, service: Json, name: str, scratch: Path) -> FirstToken:
    path = scratch / f"{name}.json"
    path.write_text(json.dumps(service | {"metadata": {"name": name, "namespace": _SERVICE_NAMESPACE}}))
    known = set(os.listdir("/proc"))
    client = _Client(gateway, name)
    began = time.monotonic()
    rig.cluster.kubectl("apply", "-f", path)
    client.start()
    try:
        _wait_for_process(name, known, began)
        before_s = time.monotonic() - began
        address = rig.wait("the engine's pod has an address", lambda: _address(rig, name))
        _wait_for_health(f"http://{address}:{_ENGINE_PORT}/health", began)
        healthy_s = time.monotonic() - began
        return FirstToken(before_s, healthy_s, client.first_token_at() - began)
    finally:
        client.stop()


def _wait_for_process(served_name: str, known: set[str], began: float) -> None:
    """Waits until a process of the table runs vLLM under this name. Pids of the node's namespaces are seen here too."""
    while True:
        for pid in set(os.listdir("/proc")) - known:
            if not pid.isdigit():
                known.add(pid)
                continue
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if served_name.encode() in words and any(word.endswith(b"/bin/vllm") for word in words):
                    return
        _check_deadline(began, f"no process serves {served_name}")
        time.sleep(_PROCESS_POLL_S)


def _wait_for_health(url: str, began: float) -> None:
    with httpx.Client(timeout=2.0, trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if client.get(url).status_code == 200:
                    return
            _check_deadline(began, f"{url} does not answer 200")
            time.sleep(_HEALTH_POLL_S)


def _check_deadline(began: float, problem: str) -> None:
    if time.monotonic() - began > _DEADLINE_S:
        raise RigError(f"{problem} within {_DEADLINE_S:.0f} s")


def _address(rig: Rig, name: str) -> str | None:
    pods = rig.list("Pod", _SERVICE_NAMESPACE)
    addresses = [pod["status"].get("podIP") for pod in pods if pod["metadata"]["name"].startswith(f"{name}-")]
    return next((address for address in addresses if address), None)


class _Client:
    """One streaming request, sent again for as long as the gateway refuses it."""

    def __init__(self, gateway: str, model: str) -> None:
        self._url = f"{gateway}/v1/completions"
        self._body = {"model": model, "prompt": "Count the engines.", "max_tokens": 4, "stream": True}
        self._ended = threading.Event()
        self._arrived = threading.Event()
        self._arrived_at = 0.0
        self._refusal = "no answer"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Sends the request from a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, once the current answer has come."""
        self._ended.set()

    def first_token_at(self) -> float:
        """Monotonic time of the first token. Raises RigError with the last refusal when none comes."""
        if not self._arrived.wait(_DEADLINE_S):
            raise RigError(f"no token within {_DEADLINE_S:.0f} s; the gateway's last answer: {self._refusal}")
        return self._arrived_at

    def _run(self) -> None:
        headers = {"authorization": f"Bearer {API_KEY}"}
        with httpx.Client(timeout=_DEADLINE_S, trust_env=False, headers=headers) as http:
            while not self._ended.is_set() and not self._arrived.is_set():
                try:
                    self._ask(http)
                except httpx.TransportError as error:
                    self._refusal = repr(error)
                time.sleep(_ASK_AGAIN_S)

    def _ask(self, http: httpx.Client) -> None:
        with http.stream("POST", self._url, json=self._body) as answer:
            if answer.status_code != 200:
                self._refusal = f"{answer.status_code} {answer.read().decode(errors='replace')[:500]}"
                return
            for line in answer.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                    self._arrived_at = time.monotonic()
                    self._arrived.set()
                    return
            self._refusal = "a stream without a token"
