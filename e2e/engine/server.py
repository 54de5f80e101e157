"""`EngineServer`: a real vLLM on loopback, from start to end of a `with` block.

    with EngineServer.start(core=0) as engine:
        httpx.get(engine.url + "/v1/models")

The engine is a session of processes of its own. At the end all of them are killed, also when the block fails; and
if the program that started it is killed, the kernel tells the engine to end. `cpu_fraction` makes it a slow one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from e2e.engine.command import MAX_MODEL_LEN_TOKENS, EngineLayout, engine_args, engine_env
from e2e.engine.cpu_quota import cpu_quota
from e2e.engine.environment import EngineError, engine_environment
from e2e.engine.tiny_model import MODEL_NAME, tiny_model

_LOG_TAIL_LINES = 30
_POLL_S = 0.1
_TRACKER_DEADLINE_S = 5


@dataclass(frozen=True)
class EngineServer:
    """A running engine.

    url: `http://127.0.0.1:<port>`, without `/v1`. model: the name to ask for. process: the API server, leader of the
    engine's session; tests may signal it. log: what the engine prints. start_s: seconds until it was healthy.
    """

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path
    start_s: float

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        *,
        core: int | None = None,
        cpu_fraction: float | None = None,
        port: int | None = None,
        model: str = MODEL_NAME,
        extra_args: Sequence[str] = (),
        deadline_s: float = 240,
    ) -> Iterator[EngineServer]:
        """Start an engine, wait until it is healthy, and end it with the block.

        core: bind it to this core. cpu_fraction: let it use at most this share of a core (root only). port: a free
        one by default. model: name under which it serves the tiny model.

        Raises EngineError if it ends or is not healthy after `deadline_s`; the message carries the end of its log.
        """
        layout = EngineLayout(engine_environment(), tiny_model())
        port = port or _free_port()
        command = [
            *("setpriv", "--pdeathsig", "TERM"),
            *(str(layout.executable), "serve", str(layout.model)),
            f"--served-model-name={model}",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--max-model-len={MAX_MODEL_LEN_TOKENS}",
            *engine_args(),
            *extra_args,
        ]
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmfleet-engine-")))
            if cpu_fraction is not None:
                join = stack.enter_context(cpu_quota(cpu_fraction))
                command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(join), *command]
            environment = os.environ | engine_env(layout, core) | {"HOME": str(directory)}
            process = stack.enter_context(_session(command, environment, directory / "log"))
            url = f"http://127.0.0.1:{port}"
            started = time.monotonic()
            _wait_healthy(url, process, directory / "log", started + deadline_s)
            yield cls(url, model, process, directory / "log", time.monotonic() - started)

    def log_tail(self) -> str:
        """The last lines that the engine printed."""
        return _tail(self.log)

    def pids(self) -> list[int]:
        """All its processes."""
        return _session_members(self.process.pid)


@contextlib.contextmanager
def _session(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole session, even if its leader is dead already; only Python's resource tracker may first remove
    the others' semaphores from /dev/shm, which it does as soon as they are gone."""
    for pid in _session_members(process.pid):
        with contextlib.suppress(OSError):
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _TRACKER_DEADLINE_S
    while _session_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _wait_gone(process.pid)


def _wait_gone(session: int) -> None:
    deadline = time.monotonic() + 10
    while left := _session_members(session):
        if time.monotonic() > deadline:
            raise EngineError(f"processes {left} of an engine do not end")
        time.sleep(0.02)


def _session_members(session: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # After the command's closing bracket: state, parent, process group, session.
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                members.append(int(entry.name))
    return members


def _wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    while True:
        code = process.poll()
        if code is not None:
            raise EngineError(f"the engine ended with exit code {code} before it was healthy:\n{_tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url + "/health", timeout=5, trust_env=False).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise EngineError(f"the engine was not healthy in time:\n{_tail(log)}")
        time.sleep(_POLL_S)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
