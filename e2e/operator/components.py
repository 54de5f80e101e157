"""A running operator and a running gateway, as whoever started them for a test or a benchmark sees them.

Each is a subprocess that signs in as its own service account and logs JSON to a file. Here is what one may ask of it:
its log, its HTTP port for health and metrics, its use of the machine, and its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from e2e.operator.launch import answers, free_port, gateway_command, open_url, operator_command

_LOG_TAIL_LINES = 60

Json = dict[str, Any]


class RigError(Exception):
    """What was waited for did not come."""


class Component:
    """One process of ours. `environment` names its kubeconfig and the cluster that it is ended with at the latest."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as stream:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=stream)

    @property
    def health_url(self) -> str:
        """Address of `/healthz`, `/readyz` and `/metrics`. Raises RigError while it is not known."""
        raise NotImplementedError

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

    def get(self, path: str) -> tuple[int, str]:
        """(status, body) of its HTTP port."""
        try:
            with open_url(self.health_url + path) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Its Prometheus samples by name with labels."""
        samples = (line.rsplit(" ", 1) for line in self.get("/metrics")[1].splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait(timeout=10)

    def terminate(self, deadline_s: float = 30) -> int:
        """SIGTERM, upon which it ends cleanly; returns the exit code. SIGKILL after the deadline."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RigError(f"{self.log.stem} did not end within {deadline_s:.0f} s:\n{self.tail()}") from None

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text().splitlines()[-_LOG_TAIL_LINES:])


class Operator(Component):
    """One replica of the operator."""

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        identity: str,
        *,
        gateway_urls: Sequence[str] = (),
        token_file: Path | None = None,
    ) -> None:
        self.identity = identity
        command = operator_command(identity=identity, gateway_urls=gateway_urls, token_file=token_file)
        super().__init__(command, environment, log)

    @property
    def health_url(self) -> str:
        """See Component; the port is a free one, which the log names."""
        serving = self.said("serving health and metrics")
        if serving is None:
            raise RigError("the operator does not serve yet")
        return f"http://127.0.0.1:{serving['port']}"

    def said(self, message: str) -> Json | None:
        """The newest log line with this message."""
        return next((line for line in reversed(self.lines()) if line.get("msg") == message), None)

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


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class AdminPort(Protocol):
    """What an operator asks for demand: a gateway, or what a test has in place of one."""

    admin_url: str
    token_file: Path


class Gateway(Component):
    """One gateway, with its API and its admin port on free ports of loopback."""

    def __init__(
        self, environment: Mapping[str, str], log: Path, token_file: Path, queue_wait_s: float | None = None
    ) -> None:
        port, admin_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        self.token_file = token_file
        command = gateway_command(
            port=port, admin_port=admin_port, token_file=token_file, drain_s=1, queue_wait_s=queue_wait_s
        )
        super().__init__(command, environment, log)

    @property
    def health_url(self) -> str:
        """See Component."""
        return self.admin_url

    @property
    def ready(self) -> bool:
        """Whether it knows the fleet and takes requests."""
        return answers(f"{self.admin_url}/readyz")
