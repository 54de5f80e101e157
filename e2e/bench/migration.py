"""`make bench-migration`: live migration between two real vLLMs on CPU, one core each, and what else could be done.

    bfloat16 pair   gap by context beside replay and stop-and-copy; identity of a request alone; other requests' speed
    float32 pair    identity in batches, chains of ten, a hundred at once
    two engines     with and without the plug-in, cores swapped once

In flow the tiny chaotic model; out flow the rows of `docs/benchmarks.md`. FULL=1 makes five hundred migrations of the
identity rows and more rounds of all others.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from e2e.bench import migration_gap, migration_identity, migration_load
from e2e.bench.migration_identity import Tally
from e2e.bench.report import Report
from e2e.engine import EngineServer
from e2e.migration.pair import engine_options, peer_key, start_pair
from e2e.migration.rig import Rig
from llmfleet.migration.engine_arguments import EngineSettings

_FULL = os.environ.get("FULL") == "1"
_GAP_ROUNDS = 30 if _FULL else 8
_IDENTITY_PASSES = 4 if _FULL else 1
_BATCHES = 12 if _FULL else 3
_CHAINS = 9 if _FULL else 3
_UNSEEDED = 25 if _FULL else 5
_COPIES = 20 if _FULL else 8
_TURNS = 30 if _FULL else 12


def main() -> None:
    report = Report("migration")
    leaks: list[float] = []
    asyncio.run(_bfloat16(report, leaks))
    asyncio.run(_float32(report, leaks))
    _leaks(report, leaks)
    _plug_in(report)
    report.write()


async def _bfloat16(report: Report, leaks: list[float]) -> None:
    with start_pair("bfloat16") as pair:
        async with Rig.of(pair) as rig:
            migration_gap.report(await migration_gap.measure(rig, _GAP_ROUNDS), report)
            _identity(report, "identical_alone_bfloat16", await migration_identity.alone(rig, _IDENTITY_PASSES))
            _batches(
                report,
                await migration_identity.in_batches(rig, _BATCHES, migrate=True),
                await migration_identity.in_batches(rig, _BATCHES, migrate=False),
            )
            _identity(report, "unseeded_whole", await migration_identity.unseeded(rig, _UNSEEDED))
            _others(report, await migration_load.others_while_copying(rig, _COPIES))
            leaks.append(await _leaked(rig))


async def _float32(report: Report, leaks: list[float]) -> None:
    with start_pair("float32") as pair:
        async with Rig.of(pair) as rig:
            batches = await migration_identity.in_batches(rig, _BATCHES, migrate=True)
            _identity(report, "identical_in_batches_float32", batches)
            _identity(report, "identical_chains_of_10", await migration_identity.chains(rig, _CHAINS))
            tally, ended = await migration_identity.hundred_at_once(rig)
            words = ", ".join(f"{count} {word}" for word, count in sorted(ended.items()))
            report.add(
                "hundred_at_once_ended", "%", [100.0 * sum(ended.values()) / 100], target=100, at_most=False, note=words
            )
            same = [100 * (1 - tally.answers_differing / tally.answers)]
            report.add("hundred_at_once_identical", "%", same, target=100, at_most=False, note=tally.note)
            leaks.append(await _leaked(rig))


async def _leaked(rig: Rig) -> float:
    """Blocks that are not free when nothing runs, both engines together."""
    return float(sum(load.blocks_total - load.blocks_free for load in (await rig.settled()).values()))


def _leaks(report: Report, leaks: Sequence[float]) -> None:
    report.add("blocks_leaked", "blocks", [sum(leaks)], target=0, note="after all of the above, both pairs")


def _identity(report: Report, name: str, tally: Tally) -> None:
    report.add(name, "%", tally.identical_percent, target=100, at_most=False, note=tally.note)


def _batches(report: Report, moved: Tally, stayed: Tally) -> None:
    mine, control = (100 * one.answers_differing / one.answers for one in (moved, stayed))
    report.add(
        "differing_in_batches_bfloat16",
        "%",
        [mine],
        target=control,
        peer="no migration",
        peer_runs=[control],
        note=f"answers that are not those of the request alone; {moved.migrations} migrations, {moved.answers} answers",
    )


def _others(report: Report, others: migration_load.Others) -> None:
    note = ", ".join(
        f"{name}: {others.during[name]} tokens while copying, {others.before[name]} before" for name in ("a", "b")
    )
    report.add(
        "others_speed_while_copying",
        "%",
        others.shares,
        target=migration_load.LEAST_OTHERS_PERCENT,
        at_most=False,
        note=f"{note}; copies of {sum(others.copying_s):.1f} s in all",
    )


def _plug_in(report: Report) -> None:
    throughput: list[float] = []
    ttft: list[float] = []
    cores = sorted(os.sched_getaffinity(0))
    for one, other in ((cores[0], cores[-1]), (cores[-1], cores[0])):
        with peer_key() as key:
            settings = EngineSettings(listen="127.0.0.1:0", peer_key_file=str(key))
            options = engine_options(one, "bfloat16", settings), engine_options(other, "bfloat16", None)
            with EngineServer.start_together(*options) as (with_it, without):
                found = asyncio.run(migration_load.in_turns({"with": with_it, "without": without}, _TURNS))
        mine, plain = found["with"], found["without"]
        throughput += [100 * a / b for a, b in zip(mine.tokens_per_s, plain.tokens_per_s, strict=True)]
        ttft += [100 * b / a for a, b in zip(mine.ttft_ms, plain.ttft_ms, strict=True)]
    least = migration_load.LEAST_IDLE_PERCENT
    note = "with the plug-in over without, turn by turn, on both cores; median"
    report.add("idle_plug_in_throughput", "%", throughput, target=least, at_most=False, note=note)
    report.add("idle_plug_in_ttft", "%", ttft, target=least, at_most=False, note="without over with; " + note)


if __name__ == "__main__":
    main()
