"""The peer: vllm-router, a router of the same purpose in Rust, installed from the registry into the cache.

`locks/bench-gateway-peer.txt` pins it by hash (`make lock` writes it).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from uv import find_uv_bin

from e2e.cluster.state import cache_directory, exclusive

NAME = "vllm-router"
LOCK = Path(__file__).resolve().parents[2] / "locks" / "bench-gateway-peer.txt"
_INSTALL_DEADLINE_S = 300


def installed_peer() -> tuple[Path | None, str]:
    """The program, installed first if needed, and nothing; or None and why there is none."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    environment = cache_directory() / f"{NAME}-{digest}"
    program = environment / "bin" / NAME
    environment.mkdir(exist_ok=True)
    with exclusive(environment):
        if not program.exists():
            try:
                _install(environment)
            except (OSError, subprocess.SubprocessError) as error:
                said = getattr(error, "stderr", None) or str(error)
                return None, f"{NAME} does not install here: {said.strip().splitlines()[-1][:200]}"
    return program, ""


def _install(environment: Path) -> None:
    uv, python = find_uv_bin(), environment / "bin" / "python"
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, "--allow-existing", str(environment)],
        [uv, "pip", "install", "--quiet", "--python", str(python), "--require-hashes", "--requirement", str(LOCK)],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_DEADLINE_S)


def command(program: Path, port: int, engine_ports: Sequence[int]) -> list[str]:
    """How it is started in front of these engines."""
    return [
        str(program),
        "--host=127.0.0.1",
        f"--port={port}",
        "--worker-urls",
        *(f"http://127.0.0.1:{engine_port}" for engine_port in engine_ports),
        "--policy=round_robin",
        "--log-level=error",
    ]
