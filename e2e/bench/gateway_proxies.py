"""The processes of the gateway's benchmark: the mock engines, and the proxies that are measured.

Out flow ports, and of a proxy its CPU time and its memory as the kernel counts them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from e2e.bench import gateway_load

_START_DEADLINE_S = 30.0
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Proxy:
    """A running proxy."""

    name: str
    pid: int
    port: int

    def cpu_s(self) -> float:
        """CPU time of the process so far, all threads and finished ones included, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    def memory_bytes(self) -> int:
        """Resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE_BYTES


@contextlib.contextmanager
def engines(count: int) -> Iterator[list[int]]:
    """Mock engines in one process; gives their ports."""
    command = [sys.executable, "-m", "e2e.bench.gateway_engine", str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield [int(port) for port in process.stdout.readline().split()]
    finally:
        _end(process)


@contextlib.contextmanager
def proxy(name: str, command: Sequence[str], port: int, cores: set[int]) -> Iterator[Proxy]:
    """A proxy that answers. Raises LoadError with the end of its log if it does not."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        try:
            _wait_until_it_answers(name, process, port, log.fileno())
            yield Proxy(name, process.pid, port)
        finally:
            _end(process)


def _wait_until_it_answers(name: str, process: subprocess.Popen[bytes], port: int, log: int) -> None:
    end = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, gateway_load.LoadError):
            uvloop.run(gateway_load.latencies_us(port, 1))
            return
        time.sleep(0.1)
    tail = os.pread(log, 4000, max(0, os.fstat(log).st_size - 4000)).decode(errors="replace").strip()
    raise gateway_load.LoadError(f"{name} did not answer within {_START_DEADLINE_S:.0f} s: {tail[-500:]}")


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
