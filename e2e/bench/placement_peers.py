"""Our solver beside Mélange's program: the `peers_*` rows of `make bench-placement`.

    add_rows(report)                                measures; FULL=1 for all rates and both objectives
    python -m e2e.bench.placement_peers             only these rows

One service, sixty buckets, four GPU types, the same load matrix for all (`placement_melange.py`), our headroom off. The
peers are the solver that the PyPI package `aibrix` 0.8.0 ships (which is Mélange's published code) and the paper's
program; both run in an environment of their own, installed from `locks/bench-placement-peer.txt` (`make lock` writes
it). A peer is ended after sixty seconds, which then count as its time; the paper's program is asked for what it has by
then.

Every answer is verified by a routing program that belongs to neither side; the answer of ours also by its bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from uv import find_uv_bin

from e2e.bench.placement_melange import (
    PRICES,
    TPOT_MS,
    TRACES,
    Instance,
    Trace,
    cost,
    histogram,
    instance,
    proven,
    solved,
)
from e2e.bench.report import Report
from e2e.cluster.state import cache_directory, exclusive

LOCK = Path(__file__).resolve().parents[2] / "locks" / "bench-placement-peer.txt"
Peer = Literal["aibrix", "paper"]
PEERS: tuple[Peer, ...] = ("aibrix", "paper")
RATES = tuple(float(2**power) for power in range(11))
LIMIT_S = 60.0
BUDGET_S = 240.0
"""Of the default run. Peers take between a tenth of a second and their limit, and nobody knows before; cells for which
the time might not suffice are left out, and the rows say how many."""
_GRACE_S = 15.0
_OUR_RUNS = 5
_INSTALL_DEADLINE_S = 300


@dataclass(frozen=True)
class Answer:
    """What a peer said."""

    counts: list[int] | None
    """Devices by type; None where it had none in time."""
    seconds: float
    cpu_seconds: float
    """Of all its processes; for one that was ended, its seconds."""


@dataclass(frozen=True)
class Compared:
    """One cell."""

    name: str
    ours_s: float
    """Median of a few runs."""
    ours_cpu_s: float
    ours_cost: float
    theirs: dict[Peer, Answer]
    sound: dict[Peer, bool]
    """Whether a peer's devices serve everything."""


def add_rows(report: Report) -> None:
    """Runs every cell and adds the rows of docs/benchmarks.md."""
    python, why_not = installed_peers()
    if python is None:
        for name, unit, target, at_most in _ROWS:
            report.add(name, unit, [], target=target, at_most=at_most, note=why_not)
        return
    full = bool(os.environ.get("FULL"))
    cells = cells_of(full=full)
    began = time.monotonic()
    found = []
    for trace, tpot_ms, rps in cells:
        if not full and time.monotonic() - began > BUDGET_S - len(PEERS) * LIMIT_S:
            break
        found.append(compared(python, trace, tpot_ms, rps))
        print(_line(found[-1]), flush=True)
    times = [one.ours_s for one in found]
    note = f"{len(found)} of {len(cells)} cells, each a proven optimum"
    report.add("peers_our_seconds_max", "s", [max(times)], note=note)
    for peer in PEERS:
        ratios = [one.theirs[peer].seconds / one.ours_s for one in found]
        ended = sum(one.theirs[peer].seconds >= LIMIT_S for one in found)
        report.add(
            f"peers_{peer}_speedup",
            "x",
            ratios,
            target=50,
            at_most=False,
            note=f"{len(found)} cells, {ended} ended at {LIMIT_S:.0f} s",
        )
        ratios = [one.theirs[peer].cpu_seconds / one.ours_cpu_s for one in found]
        report.add(f"peers_{peer}_speedup_cpu", "x", ratios, note="by CPU time, which a busy machine disturbs less")
        sound = [one for one in found if one.sound[peer]]
        excess = [one.ours_cost - cost(one.theirs[peer].counts or []) for one in sound]
        dearer = sum(value < -1e-6 for value in excess)
        without = sum(one.theirs[peer].counts is None for one in found)
        report.add(
            f"peers_{peer}_cost_excess_max",
            "$/h",
            [max(excess)] if excess else [],
            target=1e-6,
            note=f"{len(sound)} sound answers, {dearer} of them dearer than ours; {without} without one, "
            f"{len(found) - len(sound) - without} that do not serve everything",
        )


_ROWS = (
    ("peers_our_seconds_max", "s", None, True),
    *((f"peers_{peer}_speedup", "x", 50.0, False) for peer in PEERS),
    *((f"peers_{peer}_speedup_cpu", "x", None, False) for peer in PEERS),
    *((f"peers_{peer}_cost_excess_max", "$/h", 1e-6, True) for peer in PEERS),
)


def cells_of(*, full: bool) -> list[tuple[Trace, float, float]]:
    """Trace, objective and rate: all of them, or eight at fixed steps, which is no choice by result."""
    if full:
        return [(trace, tpot_ms, rps) for trace in TRACES for tpot_ms in TPOT_MS for rps in RATES]
    pairs = list(zip(TRACES, TPOT_MS, strict=True))
    return [(trace, tpot_ms, rps) for rps in RATES[::3] for trace, tpot_ms in pairs]


def compared(python: Path, trace: Trace, tpot_ms: float, rps: float) -> Compared:
    """One cell, by everybody. Raises RuntimeError where our own answer is not sound."""
    cell = instance(trace, rps, tpot_ms)
    name = f"{trace}, {tpot_ms:.0f} ms, {rps:.0f} req/s"
    times, cpu_times = [], []
    for _ in range(_OUR_RUNS):
        problem = cell.problem()
        began, began_cpu = time.perf_counter(), time.process_time()
        ours = solved(problem)
        times.append(time.perf_counter() - began)
        cpu_times.append(time.process_time() - began_cpu)
    if not proven(ours) or not cell.serves_all(ours.replicas[0]):
        raise RuntimeError(f"{name}: our answer {ours.replicas[0]} is no proven optimum that serves everything")
    theirs = {peer: asked(python, peer, cell, trace, rps) for peer in PEERS}
    return Compared(
        name=name,
        ours_s=median(times),
        ours_cpu_s=median(cpu_times),
        ours_cost=cost(ours.replicas[0]),
        theirs=theirs,
        sound={peer: answer.counts is not None and cell.serves_all(answer.counts) for peer, answer in theirs.items()},
    )


def asked(python: Path, peer: Peer, cell: Instance, trace: Trace, rps: float) -> Answer:
    """A peer's answer. It and the solver that it starts are ended when the time is over."""
    possible = (cell.throughput > 0).any(axis=1)
    document: dict[str, Any] = {
        "program": peer,
        "shares": histogram(trace)[possible].tolist(),
        "rps": rps,
        "throughput": cell.throughput[possible].tolist(),
        "prices": list(PRICES.values()),
        "limit_s": LIMIT_S,
    }
    program = Path(__file__).with_name("placement_peer_program.py")
    with subprocess.Popen(
        [python, "-I", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        limit_s = LIMIT_S + (_GRACE_S if peer == "paper" else 0.0)
        began = time.perf_counter()
        try:
            said, _ = process.communicate(json.dumps(document), timeout=limit_s)
        except subprocess.TimeoutExpired:
            return Answer(None, LIMIT_S, LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        raise RuntimeError(f"{peer} ended with {process.returncode} after {time.perf_counter() - began:.1f} s")
    answer = json.loads(said.splitlines()[-1])
    return Answer(answer["counts"], min(answer["seconds"], LIMIT_S), answer["cpu_seconds"])


def installed_peers() -> tuple[Path | None, str]:
    """The peers' interpreter, installed first if needed, and nothing; or None and why there is none."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    environment = cache_directory() / f"placement-peers-{digest}"
    python, done = environment / "bin" / "python", environment / "installed"
    environment.mkdir(exist_ok=True)
    with exclusive(environment):
        if not done.exists():
            try:
                _install(environment, python)
            except (OSError, subprocess.SubprocessError) as error:
                said = getattr(error, "stderr", None) or str(error)
                return None, f"aibrix does not install here: {said.strip().splitlines()[-1][:200]}"
            done.touch()
    return python, ""


def _install(environment: Path, python: Path) -> None:
    """The solver needs neither the clouds' clients nor the web servers that the package depends on."""
    uv = find_uv_bin()
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, "--allow-existing", str(environment)],
        [uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), "--require-hashes", "-r", str(LOCK)],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_DEADLINE_S)


def _line(one: Compared) -> str:
    said = [
        f"{peer} {answer.seconds:.2f} s (cpu {answer.cpu_seconds:.2f}) "
        + ("no answer" if answer.counts is None else f"${cost(answer.counts):.3f}")
        + ("" if one.sound[peer] or answer.counts is None else " (does not serve everything)")
        for peer, answer in one.theirs.items()
    ]
    return f"{one.name}: ours {one.ours_s:.4f} s (cpu {one.ours_cpu_s:.4f}) ${one.ours_cost:.3f}, {', '.join(said)}"


def main() -> None:
    """These rows alone."""
    report = Report("placement_peers")
    add_rows(report)
    report.write()


if __name__ == "__main__":
    main()
