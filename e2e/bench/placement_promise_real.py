"""Is the promise kept by real engines? `python -m e2e.bench.placement_promise_real`; eight minutes.

    two vLLM on unlike CPUs --llmfleet profile--> ModelProfile --plan()--> routing table
    Poisson arrivals at the planned rate --the gateway's policy with that table--> the same engines -> TTFT, TPOT

One engine has a core of its own, the other 45 % of one, as in the demo; both are profiled at once, because both serve
at once. The rate is the highest that a plan with these two devices still serves, so neither is idle. Requests are sent
at their time whether or not earlier ones are answered, and their latency counts from that time: what the client is late
by is no excuse. Attainment may be two points below the promise. Nothing is corrected for what else the machine did
meanwhile; the notes say how much that was.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx

from e2e.bench.engine_model_quiet import disturbed, go_first
from e2e.bench.placement_promise_fleets import KEY, TRACES, objective
from e2e.bench.report import Report
from e2e.engine import EngineOptions, EngineServer
from e2e.engine.command import KV_CACHE_BYTES, MAX_MODEL_LEN_TOKENS
from e2e.engine.cpu_quota import cpu_quota
from e2e.engine.tiny_model import KV_BYTES_PER_TOKEN, MODEL_NAME
from llmfleet.api import Buckets, GPUType, LLMService, Measurement, ModelProfile, Plan
from llmfleet.cli.profiling.engine import MeasuredEngine
from llmfleet.cli.profiling.measure import profile_engine
from llmfleet.cli.profiling.prompts import SAMPLE_TEXT, Prompts
from llmfleet.cli.profiling.settings import ProfileSettings
from llmfleet.gateway.fleet import Engine as Address
from llmfleet.gateway.fleet import Fleet, Service
from llmfleet.gateway.policy import RequestShape, Router, Usage
from llmfleet.placement import Demand, PlanInputs, plan
from llmfleet.simulator import Arrival, Served, attainment, routing_table
from llmfleet.simulator.arrivals import renewal
from llmfleet.simulator.traces import read_trace

FAST, SLOW = "cpu-fast", "cpu-slow"
PRICES = {FAST: 0.30, SLOW: 0.10}
SLOW_CORES = 0.45
BUCKETS = Buckets(input_tokens=[128, 512], output_tokens=[16, 64])
OBJECTIVE = objective(500, 50, 95, 95)
ALLOWED_POINTS = 2.0
_CONCURRENCIES = (1, 4, 16, 32)
_SHRINK = 8  # the tiny model's requests are an eighth as long as the traces'
_MOST_RPS = 200.0
_BISECTIONS = 9
_MINUTE_S = 60.0
_WARM_UP_S = 5.0
_ANSWER_DEADLINE_S = 120.0

Url = str


@dataclass(frozen=True)
class Offered:
    """A run: what became of every request."""

    served: list[Served]
    latest_s: float
    """Longest time by which the client sent a request late."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="how long the load is offered")
    parser.add_argument("--seconds-per-point", type=float, default=3.0, help="window of each point of the profile")
    arguments = parser.parse_args()
    # SIGTERM unwinds the stack too, which ends the engines.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = Report("placement_promise_real")
    with engines() as servers:
        sessions = [os.getsid(0), *(server.process.pid for server in servers.values())]
        first = go_first(sessions)
        urls = {name: server.url for name, server in servers.items()}
        asyncio.run(measured(report, urls, sessions, arguments.seconds, arguments.seconds_per_point, first))
    report.write()


@contextlib.contextmanager
def engines() -> Iterator[dict[str, EngineServer]]:
    """One engine on a core of its own, one that gets less of its core as soon as it is up; this process beside it."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(cpu_quota(SLOW_CORES))
        started = EngineServer.start_together(EngineOptions(core=cores[0]), EngineOptions(core=cores[-1]))
        servers = dict(zip((SLOW, FAST), stack.enter_context(started), strict=True))
        for pid in servers[SLOW].pids():
            group.write_text(str(pid))
        if len(cores) > 1:
            os.sched_setaffinity(0, set(cores[:-1]))
        yield servers


async def measured(
    report: Report, urls: Mapping[str, Url], sessions: Sequence[int], seconds: float, per_point: float, first: bool
) -> None:
    """Profiles, plans, offers the load, and adds the rows."""
    started = time.monotonic()
    profile = await profiled(urls, per_point)
    profiling_s = time.monotonic() - started
    sizes = [
        (-(-one.input_tokens // _SHRINK), -(-one.output_tokens // _SHRINK))
        for one in read_trace(TRACES / "azure_conv_2023.csv")
    ]
    fitting = [s for s in sizes if s[0] <= BUCKETS.input_tokens[-1] and s[1] <= BUCKETS.output_tokens[-1]]
    rps, decided = fullest(profile, fitting)
    (service,) = decided.services
    print(f"profiled in {profiling_s:.0f} s; {rps:.1f} requests/s on {service.replicas}: {service.routes}", flush=True)
    arrivals = renewal(fitting, rps, round(rps * (seconds + _WARM_UP_S)), seed=11)
    run = await disturbed(lambda: offered(decided, urls, arrivals), sessions)
    served = [one for one in run.value.served if one.at_s >= _WARM_UP_S]
    found = attainment(served, OBJECTIVE)
    minutes = [
        attainment([one for one in served if int(one.at_s // _MINUTE_S) == minute], OBJECTIVE)
        for minute in range(int(served[-1].at_s // _MINUTE_S) + 1)
    ]
    variants = {name: attainment([one for one in served if one.variant == name], OBJECTIVE) for name in urls}
    noise = (
        f"others used {run.others_cores:.2f} cores, client at most {1000 * run.value.latest_s:.0f} ms late"
        f"{'' if first else ', no precedence over others'}"
    )
    for name, total, parts, each in (
        ("ttft", found.ttft, [one.ttft for one in minutes], {key: one.ttft for key, one in variants.items()}),
        ("tpot", found.tpot, [one.tpot for one in minutes], {key: one.tpot for key, one in variants.items()}),
    ):
        engines_note = ", ".join(f"{key} {one.percent:.1f} % of {one.requests}" for key, one in each.items())
        percents = [one.percent for one in parts]
        report.add(
            f"promise_real_{name}",
            "%",
            [total.percent],
            target=total.target.percentile - ALLOWED_POINTS,
            at_most=False,
            note=f"{engines_note}; by minute {min(percents):.1f}..{max(percents):.1f} %; {noise}",
        )
    planned = " and ".join(f"{count} {name}" for name, count in service.replicas.items())
    report.add("promise_real_rps", "requests/s", [rps], note=f"on {planned}, profiled in {profiling_s:.0f} s")


async def profiled(urls: Mapping[str, Url], per_point: float) -> ModelProfile:
    """All engines' measurements, taken at the same time."""

    async def one(name: str, url: Url) -> Measurement:
        settings = ProfileSettings(
            url=url,
            gpu_type=name,
            buckets=BUCKETS,
            concurrencies=_CONCURRENCIES,
            seconds_per_point=per_point,
        )
        return await profile_engine(settings, lambda line: print(f"{name}: {line}", flush=True))

    return profile_of(await asyncio.gather(*(one(name, url) for name, url in urls.items())))


def profile_of(measurements: Sequence[Measurement]) -> ModelProfile:
    """The tiny model's profile."""
    return ModelProfile.parse(
        {
            "metadata": {"name": MODEL_NAME, "namespace": "bench"},
            "spec": {
                "model": f"bench/{MODEL_NAME}",
                "weightsGib": 0.01,
                "kvKibPerToken": KV_BYTES_PER_TOKEN / 2**10,
                "buckets": BUCKETS.to_wire(),
                "measurements": [one.to_wire() for one in measurements],
            },
        },
        strict=True,
    )


def fullest(profile: ModelProfile, sizes: Sequence[tuple[int, int]]) -> tuple[float, Plan]:
    """The highest rate of Poisson arrivals of these sizes that one device of each type serves, and its plan.

    Raises SystemExit where not even a thousandth of the highest rate tried can be planned.
    """
    low, high = _MOST_RPS / 1000, _MOST_RPS
    best: Plan | None = None
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        decided, _ = plan(inputs_for(profile, sizes, middle), None)
        if decided.refusals or decided.status == "partial":
            high = middle
        else:
            low, best = middle, decided
    if best is None:
        raise SystemExit(f"nothing can be planned: {[one.message for one in decided.refusals]}")
    return low, best


def inputs_for(profile: ModelProfile, sizes: Sequence[tuple[int, int]], rps: float) -> PlanInputs:
    """One service, one device of each type."""
    rates = [0.0] * BUCKETS.count
    for size in sizes:
        rates[BUCKETS.index(*size)] += rps / len(sizes)
    service = LLMService.parse(
        {
            "metadata": {"name": "chat", "namespace": "bench"},
            "spec": {
                "model": {"name": f"bench/{MODEL_NAME}", "contextLength": MAX_MODEL_LEN_TOKENS},
                "profile": MODEL_NAME,
                "objective": OBJECTIVE.to_wire(),
            },
        },
        strict=True,
    )
    types = [
        GPUType.parse(
            {
                "metadata": {"name": name},
                "spec": {
                    "resourceName": f"example.com/{name}",
                    "memoryGib": 4 + KV_CACHE_BYTES / 2**30,
                    "pricePerHour": {"onDemand": price},
                },
            },
            strict=True,
        )
        for name, price in PRICES.items()
    ]
    return PlanInputs(
        services=[service],
        profiles=[profile],
        gpu_types=types,
        inventory=dict.fromkeys(PRICES, 1),
        demand={KEY: Demand(rps=rates)},
    )


async def offered(decided: Plan, urls: Mapping[str, Url], arrivals: Sequence[Arrival]) -> Offered:
    """Sends every request at its time to the engine that the gateway's policy names. Raises what a request raises."""
    clock = asyncio.get_running_loop().time
    table = routing_table(decided, KEY, context_length=MAX_MODEL_LEN_TOKENS)
    addresses = tuple(
        Address(id=name, host="127.0.0.1", port=httpx.URL(urls[name]).port or 0, variant=name)
        for name, count in decided.services[0].replicas.items()
        if count > 0
    )
    router = Router(clock, instance_id="bench")
    service = Service(table, addresses)
    router.update(Fleet([service]))
    served: list[Served] = []
    latest_s = 0.0
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
    async with contextlib.AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(
                httpx.AsyncClient(base_url=url, timeout=_ANSWER_DEADLINE_S, limits=limits)
            )
            for name, url in urls.items()
        }
        sampled = await stack.enter_async_context(MeasuredEngine(next(iter(urls.values())), None))
        prompts = Prompts(await sampled.tokenize(MODEL_NAME, SAMPLE_TEXT), seed=5)
        bodies = [_body(prompts.draw(one.input_tokens), one.output_tokens) for one in arrivals]
        started = clock()

        async def one(arrival: Arrival, body: bytes) -> None:
            # Users do not say how long the answer will be, so the policy is not told either.
            ticket = router.admit(service.key, RequestShape(prompt_bytes=0, prompt_tokens=arrival.input_tokens))
            address = router.assign(ticket)
            assert address is not None
            first_s = last_s = 0.0
            async for at_s in _tokens(clients[address.id], body, arrival.output_tokens, clock):
                last_s = at_s
                if not first_s:
                    first_s = at_s
                    router.started(ticket)
            router.completed(ticket, Usage(arrival.input_tokens, arrival.output_tokens))
            later = arrival.output_tokens - 1
            served.append(
                Served(
                    at_s=arrival.at_s,
                    input_tokens=arrival.input_tokens,
                    output_tokens=arrival.output_tokens,
                    variant=address.variant,
                    engine=address.id,
                    ttft_ms=1000 * (first_s - started - arrival.at_s),
                    tpot_ms=1000 * (last_s - first_s) / later if later else None,
                    preemptions=0,
                )
            )

        async with asyncio.TaskGroup() as group:
            for arrival, body in zip(arrivals, bodies, strict=True):
                await asyncio.sleep(max(0.0, started + arrival.at_s - clock()))
                latest_s = max(latest_s, clock() - started - arrival.at_s)
                group.create_task(one(arrival, body))
    served.sort(key=lambda one: one.at_s)
    return Offered(served, latest_s)


def _body(prompt: list[int], output_tokens: int) -> bytes:
    return json.dumps(
        {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def _tokens(
    client: httpx.AsyncClient, body: bytes, output_tokens: int, clock: Callable[[], float]
) -> AsyncIterator[float]:
    """Times at which parts of the answer come, on the clock. Raises RuntimeError for an answer of another length."""
    completed = 0
    headers = {"content-type": "application/json"}
    async with client.stream("POST", "/v1/completions", content=body, headers=headers) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = clock()
            event = json.loads(line.removeprefix("data: "))
            if event.get("choices"):
                yield now
            completed = (event.get("usage") or {}).get("completion_tokens", completed)
    if completed != output_tokens:
        raise RuntimeError(f"an engine gave {completed} tokens of {output_tokens}")


if __name__ == "__main__":
    main()
