"""What the gateway costs: latency that it adds, CPU per request and per streamed token, memory per open stream.

    clients --+--> engines                    direct
              +--> gateway ------> engines    value
              +--> vllm-router --> engines    peer

All in the same run, on the same 64 engines, in turns. Where there are two cores the proxy that is measured has one to
itself, clients and engines share the other. CPU is the scheduler's time of the proxy's process with all threads, so
that others' work on the machine does not count; it still costs caches, which is why the targets are ratios.

A ratio is the median over the rounds of the gateway's figure by the peer's of the same round.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import uvloop

from e2e.bench import gateway_load
from e2e.bench.gateway_engine import Pace
from e2e.bench.gateway_load import LoadError, chat, closed_loop
from e2e.bench.gateway_peer import NAME, command, installed_peer
from e2e.bench.gateway_proxies import Proxy, engines, free_port, proxy
from e2e.bench.report import Report

ENGINES = 64
_FULL = os.environ.get("FULL") == "1"
_ROUNDS = 10 if _FULL else 3
_LATENCY_ROUNDS = 30 if _FULL else 8
_LATENCY_REQUESTS = 1000
_CONNECTIONS = 32
_LOOP_S = 2.5
_STREAMS = 256
_SHORT = Pace(tokens=1)
_ONE_PER_READ = Pace(tokens=150, interval_ms=20.0)
_FOUR_PER_READ = Pace(tokens=600, per_write=4, interval_ms=20.0)
_UNPACED_STREAMS, _UNPACED = 64, Pace(tokens=1500, stamped=True)
_OPEN_STREAMS, _OPEN, _OPEN_PROMPT_BYTES = 2000, Pace(tokens=500, per_write=50, interval_ms=400.0, holds=True), 8192
_STALLED, _STALLED_PACE, _STALLED_S = 4, Pace(tokens=10_000_000, per_write=64), 8.0
MOST_STALLED_MIB = 5.0
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Work:
    """What is measured by its CPU time, and the most that the gateway may need of what its peer does."""

    row: str
    most: float
    what: str
    run: Callable[[int], int]
    """Does it at a port. Gives the units by which the CPU time is divided."""


def _requests(request: bytes) -> Callable[[int], int]:
    return lambda port: uvloop.run(closed_loop(port, request, _CONNECTIONS, _LOOP_S))


def _tokens(count: int, pace: Pace) -> Callable[[int], int]:
    def run(port: int) -> int:
        uvloop.run(gateway_load.streams(port, count, pace))
        return count * pace.tokens

    return run


def _works(late_ms: list[float]) -> list[Work]:
    """`late_ms` gets how long tokens were on their way where there are too many of them."""

    def unpaced(port: int) -> int:
        late = uvloop.run(gateway_load.streams(port, _UNPACED_STREAMS, _UNPACED))
        late_ms.append(statistics.quantiles(late, n=100)[98])
        return _UNPACED_STREAMS * _UNPACED.tokens

    return [
        Work("cpu_per_request", 0.7, f"plain, {_CONNECTIONS} clients", _requests(chat(0))),
        Work("cpu_per_short_stream", 0.55, f"one token, {_CONNECTIONS} clients", _requests(chat(0, _SHORT))),
        Work("cpu_per_token_one_per_read", 0.9, f"{_STREAMS} streams at 20 ms", _tokens(_STREAMS, _ONE_PER_READ)),
        Work(
            "cpu_per_token_four_per_read", 0.6, f"{_STREAMS} streams, 4 each 20 ms", _tokens(_STREAMS, _FOUR_PER_READ)
        ),
        Work("cpu_per_token_overload", 0.55, f"{_UNPACED_STREAMS} streams as fast as they go", unpaced),
    ]


def main() -> None:
    report = Report("gateway")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cores = sorted(os.sched_getaffinity(0))
    proxy_core = {cores[-1]}
    if len(cores) > 1:
        os.sched_setaffinity(0, set(cores[:-1]))
    program, reason = installed_peer()
    with contextlib.ExitStack() as stack:
        engine_ports = stack.enter_context(engines(ENGINES))
        port = free_port()
        front = [sys.executable, "-m", "e2e.bench.gateway_front", str(port), *map(str, engine_ports)]
        proxies = [stack.enter_context(proxy("gateway", front, port, proxy_core))]
        if program is not None:
            port = free_port()
            try:
                proxies.append(stack.enter_context(proxy(NAME, command(program, port, engine_ports), port, proxy_core)))
            except LoadError as error:
                reason = str(error)
        _latency(report, engine_ports[0], proxies, reason)
        _cpu(report, proxies, reason)
        _memory(report, proxies, reason)
    report.write()


def _latency(report: Report, direct: int, proxies: Sequence[Proxy], reason: str) -> None:
    ports = {"direct": direct} | {one.name: one.port for one in proxies}
    quantiles: dict[str, dict[int, list[float]]] = {name: {50: [], 99: []} for name in ports}
    for port in ports.values():
        uvloop.run(gateway_load.latencies_us(port, _LATENCY_REQUESTS))
    for turn in range(_LATENCY_ROUNDS):
        print(f"latency, round {turn + 1} of {_LATENCY_ROUNDS} ...", flush=True)
        for name, port in ports.items():
            cuts = statistics.quantiles(uvloop.run(gateway_load.latencies_us(port, _LATENCY_REQUESTS)), n=100)
            for level in (50, 99):
                quantiles[name][level].append(cuts[level - 1])
    for level in (50, 99):
        base = quantiles["direct"][level]
        added = {
            name: [value - less for value, less in zip(quantiles[name][level], base, strict=True)]
            for name in ports
            if name != "direct"
        }
        what = f"direct p{level} {statistics.median(base):.0f} us, concurrency 1"
        _add(report, f"added_latency_p{level}", "us", added, 1.0, what, reason)


def _cpu(report: Report, proxies: Sequence[Proxy], reason: str) -> None:
    late_ms: dict[str, list[float]] = {one.name: [] for one in proxies}
    works = {one.name: _works(late_ms[one.name]) for one in proxies}
    used_us: dict[str, dict[str, list[float]]] = {}
    for turn in range(_ROUNDS):
        print(f"CPU, round {turn + 1} of {_ROUNDS} ...", flush=True)
        for one in proxies:
            for work in works[one.name]:
                before_s, began_s = one.cpu_s(), time.monotonic()
                units = work.run(one.port)
                used_s, took_s = one.cpu_s() - before_s, time.monotonic() - began_s
                rows = used_us.setdefault(work.row, {name: [] for name in works})
                rows[one.name].append(used_s / units * 1e6)
                print(f"  {one.name} {work.row}: {100 * used_s / took_s:.0f} % of a core", flush=True)
    for work in works[proxies[0].name]:
        _add(report, work.row, "us", used_us[work.row], work.most, work.what, reason)
    _add(report, "token_latency_p99_overload", "ms", late_ms, 0.2, "of the same tokens", reason)


def _memory(report: Report, proxies: Sequence[Proxy], reason: str) -> None:
    print("memory ...", flush=True)
    kib: dict[str, list[float]] = {}
    for one in proxies:
        before = one.memory_bytes()
        kib[one.name] = [(uvloop.run(_with_open_streams(one)) - before) / _OPEN_STREAMS / 1024]
    what = f"{_OPEN_STREAMS} open streams, prompts of {_OPEN_PROMPT_BYTES} bytes, {_OPEN.tokens} tokens delivered"
    _add(report, "memory_per_stream", "KiB", kib, 0.4, what, reason)
    grown: dict[str, float] = {}
    for one in proxies:
        before = one.memory_bytes()
        with gateway_load.stalled_clients(one.port, _STALLED, _STALLED_PACE):
            time.sleep(_STALLED_S)
            grown[one.name] = (one.memory_bytes() - before) / _MIB
    report.add(
        "memory_growth_stalled_clients",
        "MiB",
        [grown["gateway"]],
        target=MOST_STALLED_MIB,
        peer=NAME if NAME in grown else None,
        peer_runs=[grown[NAME]] if NAME in grown else (),
        note=_note(f"{_STALLED} clients that read nothing, {_STALLED_S:.0f} s", reason),
    )


async def _with_open_streams(one: Proxy) -> int:
    async with gateway_load.open_streams(one.port, _OPEN_STREAMS, _OPEN, _OPEN_PROMPT_BYTES):
        return one.memory_bytes()


def _add(
    report: Report, row: str, unit: str, runs: Mapping[str, Sequence[float]], most: float, what: str, reason: str
) -> None:
    """A figure with its peer's, and the ratio with its target."""
    ours, theirs = runs["gateway"], runs.get(NAME, ())
    note = _note(what, reason)
    report.add(row, unit, ours, peer=NAME if theirs else None, peer_runs=theirs, note=note)
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=False) if other > 0]
    report.add(f"{row}_ratio", "x", ratios, target=most, note=reason)


def _note(text: str, reason: str) -> str:
    return f"{text}; no peer: {reason}" if reason else text


if __name__ == "__main__":
    main()
