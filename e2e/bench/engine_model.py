"""`python -m e2e.bench.engine_model`: fits the engine model to real vLLM on a core of this machine, and says how well.

    real engine --closed loops, Poisson arrivals--> TTFT and TPOT
        one half of the closed loops -> fit -> coefficients
        the rest, which the fit has not seen -> model's figures beside the measured ones

The engine is `EngineServer`, the client that of `llmfleet profile`, on the other core where there is one. The result
goes to `simulator/llmfleet/simulator/data/` with where it comes from. About five minutes on a machine that has nothing
else to do; disturbed measurements are repeated, and the file says how much others used of the machine in each.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from e2e.bench.engine_model_loop import modelled_window
from e2e.bench.engine_model_quiet import QUIET_CORES, Measured, go_first, least_disturbed
from e2e.bench.report import Report, commit, cpu_model
from e2e.engine import EngineServer
from e2e.engine.command import KV_CACHE_BYTES, MAX_NUM_SEQS
from e2e.engine.tiny_model import KV_BYTES_PER_TOKEN, MODEL_NAME
from llmfleet.cli.profiling.engine import Completed, MeasuredEngine
from llmfleet.cli.profiling.load import Send, closed_loop
from llmfleet.cli.profiling.prompts import SAMPLE_TEXT, Prompts
from llmfleet.simulator import Arrival, Engine, EngineSpec, Job, StepTime
from llmfleet.simulator.arrivals import renewal
from llmfleet.simulator.engine import FOREVER_PS
from llmfleet.simulator.fit import fit
from llmfleet.simulator.spec import PS_PER_S

DATA = Path(__file__).parents[2] / "simulator" / "llmfleet" / "simulator" / "data" / "tiny_llama_vllm_cpu.json"

Load = tuple[int, int, int]
"""Input tokens, output tokens, requests in flight."""

SEEN: tuple[Load, ...] = (
    (32, 64, 1),
    (32, 64, 8),
    (32, 64, 32),
    (512, 64, 1),
    (512, 64, 8),
    (2048, 32, 1),
    (2048, 32, 4),
    (3584, 128, 1),
    (3584, 256, 6),
)
UNSEEN: tuple[Load, ...] = (
    (128, 128, 4),
    (128, 128, 16),
    (1024, 64, 2),
    (1024, 64, 16),
    (256, 400, 24),
    (3000, 64, 3),
    (1500, 700, 32),  # more than the KV cache holds: requests wait, and some are preempted
)
OPEN_SIZES = ((48, 32), (300, 96), (1200, 48), (2600, 24))
OPEN_LOADS = (0.4, 0.7)
"""Shares of the highest rate of these sizes that the fitted model completes."""
SECONDS_PER_POINT = 4.0
OPEN_SECONDS = 30.0
BLOCK_TOKENS = 32
_BEGIN = EngineSpec(
    step=StepTime(overhead_ms=3, token_ms=0.03, sequence_ms=0.1, context_token_ms=1e-4, pair_ms=2e-5),
    frontend_ms=3,
    max_num_batched_tokens=2048,
    max_num_seqs=MAX_NUM_SEQS,
    # vLLM keeps one block for itself.
    kv_blocks=KV_CACHE_BYTES // (KV_BYTES_PER_TOKEN * BLOCK_TOKENS) - 1,
    block_tokens=BLOCK_TOKENS,
)


@dataclass(frozen=True)
class Figures:
    """Medians over requests, in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    @classmethod
    def of(cls, completed: Sequence[Completed]) -> Figures:
        return cls(
            statistics.median(one.ttft_ms for one in completed), statistics.median(one.tpot_ms for one in completed)
        )


def main() -> None:
    # SIGTERM unwinds the stack too, which ends the engine.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = Report("engine_model")
    cores = sorted(os.sched_getaffinity(0))
    with EngineServer.start(core=cores[-1]) as server:
        first = go_first((server.process.pid, os.getsid(0)))
        if len(cores) > 1:
            os.sched_setaffinity(0, set(cores[:-1]))
        version, quietest = asyncio.run(_measure_closed(server, (*SEEN, *UNSEEN)))
        measured = [one.value for one in quietest]
        found = fit(_BEGIN, lambda spec: _flat([modelled(spec, load) for load in SEEN]), _flat(measured[: len(SEEN)]))
        print(f"fitted, error {100 * found.error:.1f} %: {found.spec.step}, frontend {found.spec.frontend_ms:.2f} ms")
        highest = _highest_rate(found.spec)
        opened = [
            _open_arrivals(share * highest, round(share * highest * OPEN_SECONDS), seed)
            for seed, share in enumerate(OPEN_LOADS)
        ]
        quietest += [asyncio.run(_measure_open(server, arrivals)) for arrivals in opened]
        measured_open = [one.value for one in quietest[len(measured) :]]
    closed = [modelled(found.spec, load) for load in (*SEEN, *UNSEEN)]
    modelled_open = [_modelled_open(found.spec, arrivals) for arrivals in opened]

    table = []
    names = [f"input {i} output {o} at {n}" for i, o, n in (*SEEN, *UNSEEN)]
    names += [f"Poisson at {share:.0%} of {highest:.1f}/s" for share in OPEN_LOADS]
    for name, one, model in zip(names, quietest, (*closed, *modelled_open), strict=True):
        real, others = one.value, round(one.others_cores, 2)
        table.append({"load": name, "measured": vars(real), "model": vars(model), "othersCores": others})
        print(
            f"{name:32} TTFT measured {real.ttft_ms:8.1f} model {model.ttft_ms:8.1f}"
            f"   TPOT measured {real.tpot_ms:7.2f} model {model.tpot_ms:7.2f}   others {others:.2f} cores"
        )
    disturbed = sum(one.others_cores > QUIET_CORES for one in quietest)
    cut = len(SEEN)
    for prefix, real_part, model_part, target in (
        ("fitted", measured[:cut], closed[:cut], None),
        ("unseen_closed", measured[cut:], closed[cut:], 15.0),
        ("unseen_open", measured_open, modelled_open, 20.0),
    ):
        for metric in ("ttft", "tpot"):
            errors = [
                100 * _error(getattr(m, f"{metric}_ms"), getattr(r, f"{metric}_ms"))
                for m, r in zip(model_part, real_part, strict=True)
            ]
            report.add(
                f"{prefix}_{metric}_error",
                "%",
                [statistics.fmean(errors)],
                target=target,
                note=f"over {len(errors)} loads, largest {max(errors):.0f} %; {disturbed} of all loads disturbed",
            )
    report.write()
    document = {
        "spec": found.spec.to_wire(),
        "provenance": {
            "engine": version,
            "model": MODEL_NAME,
            "cpu": cpu_model(),
            "cores": 1,
            "measuredAt": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "commit": commit(),
            "loadAverageBefore": round(report.load_average[0], 2),
            "beforeOthers": first,
            "by": "python -m e2e.bench.engine_model",
        },
        "loads": table,
    }
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {DATA}")


async def _measure_closed(server: EngineServer, loads: Sequence[Load]) -> tuple[str, list[Measured[Figures]]]:
    async with MeasuredEngine(server.url, None) as engine:
        prompts = Prompts(await engine.tokenize(server.model, SAMPLE_TEXT), seed=1)
        figures: list[Measured[Figures]] = []
        for inputs, outputs, concurrency in loads:

            async def send(output_tokens: int, inputs: int = inputs) -> Completed:
                return await engine.complete(server.model, prompts.draw(inputs), output_tokens)

            async def measure(send: Send = send, outputs: int = outputs, concurrency: int = concurrency) -> Figures:
                window = await closed_loop(send, outputs, concurrency, SECONDS_PER_POINT)
                return Figures.of(window.completed)

            figures.append(await least_disturbed(measure, server.process.pid))
            print(f"input {inputs} output {outputs} at {concurrency}: {figures[-1]}", flush=True)
        return await engine.version(), figures


async def _measure_open(server: EngineServer, arrivals: Sequence[Arrival]) -> Measured[Figures]:
    async with MeasuredEngine(server.url, None) as engine:
        prompts = Prompts(await engine.tokenize(server.model, SAMPLE_TEXT), seed=2)
        clock = asyncio.get_running_loop().time

        async def one(arrival: Arrival, started: float) -> Completed:
            prompt = prompts.draw(arrival.input_tokens)
            await asyncio.sleep(max(0.0, started + arrival.at_s - clock()))
            return await engine.complete(server.model, prompt, arrival.output_tokens)

        async def measure() -> Figures:
            started = clock() + 1.0  # the prompts are drawn before the first is sent
            return Figures.of(await asyncio.gather(*(one(arrival, started) for arrival in arrivals)))

        return await least_disturbed(measure, server.process.pid)


def _open_arrivals(requests_per_second: float, count: int, seed: int) -> list[Arrival]:
    return renewal(OPEN_SIZES, requests_per_second, count, seed=seed)


def modelled(spec: EngineSpec, load: Load) -> Figures:
    """What the model shows in a closed loop."""
    return Figures.of(modelled_window(spec, load[:2], load[2], SECONDS_PER_POINT).completed)


def _modelled_open(spec: EngineSpec, arrivals: Sequence[Arrival]) -> Figures:
    engine = Engine(spec)
    jobs = [Job(number, one.input_tokens, one.output_tokens) for number, one in enumerate(arrivals)]
    for job, arrival in zip(jobs, arrivals, strict=True):
        engine.submit(job, round(arrival.at_s * PS_PER_S))
    engine.advance(FOREVER_PS)
    return Figures.of(
        [
            Completed(
                job.arrived_ps / PS_PER_S, job.first_token_ps / PS_PER_S, job.finished_ps / PS_PER_S, job.output_tokens
            )
            for job in jobs
        ]
    )


def _highest_rate(spec: EngineSpec) -> float:
    """Requests per second that the model completes when all are there at once."""
    engine = Engine(spec)
    count = 400
    for number, arrival in enumerate(_open_arrivals(1e9, count, 0)):
        engine.submit(Job(number, arrival.input_tokens, arrival.output_tokens), 0)
    return count * PS_PER_S / engine.advance(FOREVER_PS)[-1].at_ps


def _flat(figures: Sequence[Figures]) -> list[float]:
    return [value for one in figures for value in (one.ttft_ms, one.tpot_ms)]


def _error(model: float, real: float) -> float:
    return abs(model / real - 1.0)


if __name__ == "__main__":
    main()
