"""What the gateway costs: latency that it adds, CPU per request and per streamed token.

    clients --+--> engine                    direct
              +--> gateway ------> engine    value
              +--> vllm-router --> engine    peer

All three in the same run, on the same engine, in turns. Where there are two cores the proxy that is measured has one
to itself, clients and engine share the other. CPU is the scheduler's time of the proxy's process with all threads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from e2e.bench import gateway_load
from e2e.bench.gateway_engine import TOKENS
from e2e.bench.gateway_peer import NAME, command, installed_peer
from e2e.bench.report import Report

_FULL = os.environ.get("FULL") == "1"
_ROUNDS = 30 if _FULL else 10
_LATENCY_REQUESTS = 1000
_PLAIN_CONNECTIONS = 32
_PLAIN_S = 3.0
_STREAMS = 256
_START_DEADLINE_S = 30.0
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")

_GATEWAY = """
import sys
from llmfleet.gateway.main import run
from llmfleet.gateway.settings import GatewaySettings
run(GatewaySettings(listen=f"127.0.0.1:{sys.argv[1]}", admin_listen="127.0.0.1:0", engines=(sys.argv[2],), drain_s=1.0))
"""


@dataclass(frozen=True)
class Proxy:
    """A running proxy."""

    pid: int
    port: int

    def cpu_s(self) -> float:
        """CPU time of the process so far, all threads and finished ones included, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S


def main() -> None:
    report = Report("gateway")
    cores = sorted(os.sched_getaffinity(0))
    proxy_core = {cores[-1]}
    if len(cores) > 1:
        os.sched_setaffinity(0, set(cores[:-1]))
    program, reason = installed_peer()
    with contextlib.ExitStack() as stack:
        engine_port = stack.enter_context(_engine())
        port = _free_port()
        arguments = [sys.executable, "-c", _GATEWAY, str(port), f"http://127.0.0.1:{engine_port}"]
        gateway = stack.enter_context(_proxy("gateway", arguments, port, proxy_core))
        peer: Proxy | None = None
        if program is not None:
            port = _free_port()
            try:
                peer = stack.enter_context(_proxy(NAME, command(program, port, engine_port), port, proxy_core))
            except gateway_load.LoadError as error:
                reason = str(error)
        _latency(report, engine_port, gateway, peer, reason)
        _cpu(report, gateway, peer, reason)
    report.write()


def _latency(report: Report, direct: int, gateway: Proxy, peer: Proxy | None, reason: str) -> None:
    ports = {"direct": direct, "gateway": gateway.port} | ({"peer": peer.port} if peer else {})
    quantiles: dict[str, dict[int, list[float]]] = {name: {50: [], 99: []} for name in ports}
    for port in ports.values():
        uvloop.run(gateway_load.latencies_us(port, _LATENCY_REQUESTS))
    for turn in range(_ROUNDS):
        print(f"latency, round {turn + 1} of {_ROUNDS} ...", flush=True)
        for name, port in ports.items():
            cuts = statistics.quantiles(uvloop.run(gateway_load.latencies_us(port, _LATENCY_REQUESTS)), n=100)
            for level in (50, 99):
                quantiles[name][level].append(cuts[level - 1])
    for level in (50, 99):
        base = quantiles["direct"][level]
        added = {n: [v - b for v, b in zip(q[level], base, strict=True)] for n, q in quantiles.items()}
        report.add(
            f"added_latency_p{level}",
            "us",
            added["gateway"],
            peer=NAME if peer else None,
            peer_runs=added.get("peer", ()),
            note=_note(f"direct p{level} {statistics.median(base):.0f} us, concurrency 1", reason),
        )


def _cpu(report: Report, gateway: Proxy, peer: Proxy | None, reason: str) -> None:
    proxies = {"gateway": gateway} | ({"peer": peer} if peer else {})
    per_request: dict[str, list[float]] = {name: [] for name in proxies}
    per_token: dict[str, list[float]] = {name: [] for name in proxies}
    rates: list[float] = []
    for turn in range(_ROUNDS // 2):
        print(f"CPU, round {turn + 1} of {_ROUNDS // 2} ...", flush=True)
        for name, proxy in proxies.items():
            before = proxy.cpu_s()
            answered = uvloop.run(gateway_load.plain(proxy.port, _PLAIN_CONNECTIONS, _PLAIN_S))
            per_request[name].append((proxy.cpu_s() - before) / answered * 1e6)
            if name == "gateway":
                rates.append(answered / _PLAIN_S)
            before = proxy.cpu_s()
            # The last event of a stream is [DONE].
            tokens = uvloop.run(gateway_load.streams(proxy.port, _STREAMS)) - _STREAMS
            if tokens != _STREAMS * TOKENS:
                raise gateway_load.LoadError(f"{name} passed {tokens} of {_STREAMS * TOKENS} tokens")
            per_token[name].append((proxy.cpu_s() - before) / tokens * 1e6)
    for row, runs, what in (
        ("cpu_per_request", per_request, f"{_PLAIN_CONNECTIONS} clients, {statistics.median(rates):.0f} requests/s"),
        ("cpu_per_streamed_token", per_token, f"{_STREAMS} streams of {TOKENS} tokens at 20 ms, requests included"),
    ):
        report.add(
            row,
            "us",
            runs["gateway"],
            peer=NAME if peer else None,
            peer_runs=runs.get("peer", ()),
            note=_note(what, reason),
        )


def _note(text: str, reason: str) -> str:
    return f"{text}; no peer: {reason}" if reason else text


@contextlib.contextmanager
def _engine() -> Iterator[int]:
    """The mock engine; gives its port."""
    process = subprocess.Popen([sys.executable, "-m", "e2e.bench.gateway_engine"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        _end(process)


@contextlib.contextmanager
def _proxy(name: str, arguments: Sequence[str], port: int, cores: set[int]) -> Iterator[Proxy]:
    """A proxy that answers. Raises LoadError with the end of its log if it does not."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        try:
            _wait_until_it_answers(name, process, port, log.fileno())
            yield Proxy(process.pid, port)
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
