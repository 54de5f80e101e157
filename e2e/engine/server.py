"""`EngineServer`: a real vLLM on loopback, from start to end of a `with` block.

    with EngineServer.start(core=0) as engine:
        httpx.get(engine.url + "/v1/models")

    with EngineServer.start_together(EngineOptions(core=0), EngineOptions(core=1)) as (one, another):
        ...

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
class EngineOptions:
    """How one engine differs from another.

    core: bind it to this core. cpu_fraction: let it use at most this share of a core (root only). port: a free one by
    default. arguments: for `vllm serve`, after all others, so that they win. environment: variables beside those of
    `engine_env`.
    """

    core: int | None = None
    cpu_fraction: float | None = None
    port: int | None = None
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


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
        deadline_s: float = 240,
    ) -> Iterator[EngineServer]:
        """Start an engine, wait until it is healthy, and end it with the block.

        Raises EngineError if it ends or is not healthy after `deadline_s`; the message carries the end of its log.
        """
        options = EngineOptions(core=core, cpu_fraction=cpu_fraction, port=port)
        with cls.start_together(options, deadline_s=deadline_s) as (engine,):
            yield engine

    @classmethod
    @contextlib.contextmanager
    def start_together(cls, *options: EngineOptions, deadline_s: float = 240) -> Iterator[tuple[EngineServer, ...]]:
        """Start several engines at the same time, wait until all are healthy, and end all with the block.

        Raises EngineError if one ends or is not healthy after `deadline_s`.
        """
        layout = EngineLayout(engine_environment(), tiny_model())
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            starting = [stack.enter_context(_launched(layout, one)) for one in options]
            yield tuple(
                cls(url, MODEL_NAME, process, log, _wait_healthy(url, process, log, started, deadline_s))
                for url, process, log in starting
            )

    def log_tail(self) -> str:
        """The last lines that the engine printed."""
        return _tail(self.log)

    def pids(self) -> list[int]:
        """All its processes."""
        return _session_members(self.process.pid)


@contextlib.contextmanager
def _launched(layout: EngineLayout, options: EngineOptions) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    port = options.port or free_port()
    command = [
        *("setpriv", "--pdeathsig", "TERM"),
        *(str(layout.executable), "serve", str(layout.model)),
        f"--served-model-name={MODEL_NAME}",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--max-model-len={MAX_MODEL_LEN_TOKENS}",
        *engine_args(),
        *options.arguments,
    ]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmfleet-engine-")))
        if options.cpu_fraction is not None:
            join = stack.enter_context(cpu_quota(options.cpu_fraction))
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(join), *command]
        environment = (
            os.environ | engine_env(layout, options.core) | dict(options.environment) | {"HOME": str(directory)}
        )
        process = stack.enter_context(_session(command, environment, directory / "log"))
        yield f"http://127.0.0.1:{port}", process, directory / "log"


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


def _wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path, started: float, deadline_s: float) -> float:
    """Seconds from `started` until the engine is healthy."""
    while True:
        code = process.poll()
        if code is not None:
            raise EngineError(f"the engine ended with exit code {code} before it was healthy:\n{_tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url + "/health", timeout=5, trust_env=False).status_code == 200:
                return time.monotonic() - started
        if time.monotonic() > started + deadline_s:
            raise EngineError(f"the engine was not healthy in time:\n{_tail(log)}")
        time.sleep(_POLL_S)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])


def free_port() -> int:
    """A TCP port of loopback that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
