"""How the real operator and the real gateway are started on this machine: command lines, ports, token, readiness.

The demo, the integration tests and the benchmarks start the same two programs, the command line's own `llmfleet
operator` and `llmfleet gateway`, with the same options. They differ in who owns the process afterwards: a demo stays
when its starter has ended (`e2e.demo.session`), a test's or benchmark's ends with its block (`e2e.operator.rig`).
"""

from __future__ import annotations

import secrets
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPResponse
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "llmfleet-system"
OPERATOR_ACCOUNT = "llmfleet-operator"
GATEWAY_ACCOUNT = "llmfleet-gateway"
NAMESPACE_FILE = ROOT / "operator" / "namespace.yaml"
OPERATOR_RBAC = ROOT / "operator" / "rbac.yaml"
GATEWAY_RBAC = ROOT / "gateway" / "rbac.yaml"

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

LogFormat = Literal["json", "console"]


def operator_command(
    *,
    port: int = 0,
    identity: str | None = None,
    gateway_urls: Sequence[str] = (),
    token_file: Path | None = None,
    log_format: LogFormat = "json",
) -> list[str]:
    """The operator on loopback. It asks the gateways at `gateway_urls` (admin addresses) with the token in a file."""
    return [
        *_program("operator", log_format),
        f"--listen=127.0.0.1:{port}",
        *([] if identity is None else [f"--identity={identity}"]),
        *[f"--gateway-url={url}" for url in gateway_urls],
        *([] if token_file is None else [f"--gateway-token-file={token_file}"]),
    ]


def gateway_command(
    *,
    port: int,
    admin_port: int,
    token_file: Path,
    drain_s: float | None = None,
    queue_wait_s: float | None = None,
    log_format: LogFormat = "json",
) -> list[str]:
    """The gateway on loopback; its admin port asks for the token in a file. Times that are not given are those of the
    gateway's own defaults."""
    return [
        *_program("gateway", log_format),
        f"--listen=127.0.0.1:{port}",
        f"--admin-listen=127.0.0.1:{admin_port}",
        f"--admin-token-file={token_file}",
        *([] if drain_s is None else [f"--drain={drain_s}"]),
        *([] if queue_wait_s is None else [f"--queue-wait={queue_wait_s}"]),
    ]


def _program(name: str, log_format: LogFormat) -> list[str]:
    return [str(Path(sys.executable).with_name("llmfleet")), name, f"--log-format={log_format}"]


def write_admin_token(path: Path) -> Path:
    """Writes a new token of the admin port into a file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_text(secrets.token_urlsafe(32))
    return path


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def open_url(url: str, timeout_s: float = 5) -> HTTPResponse:
    """GET of an address on this machine, past the proxy that the environment may name. Raises what urllib raises."""
    response: HTTPResponse = _OPENER.open(url, timeout=timeout_s)
    return response


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with open_url(url, timeout_s=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
