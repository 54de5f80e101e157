"""The closed loop of `llmfleet profile`, against an engine model: the same code, in simulated time.

`closed_loop` knows of the engine only a coroutine that sends a request. Here it hands the request to the model and
waits; when all clients wait, the model runs until one of them has its answer. So nothing sleeps, and the numbers are
what the command would have written had it measured this engine.
"""

from __future__ import annotations

import asyncio

from llmfleet.api import Buckets, MeasuredPoint, Measurement
from llmfleet.cli.profiling.engine import Completed
from llmfleet.cli.profiling.load import Window, closed_loop
from llmfleet.cli.profiling.measure import GROWTH
from llmfleet.cli.profiling.settings import DEFAULT_CONCURRENCIES, DEFAULT_SECONDS_PER_POINT
from llmfleet.cli.profiling.statistics import measured_point
from llmfleet.simulator import Engine, EngineSpec, Job
from llmfleet.simulator.spec import PS_PER_S


class ModelledEngine:
    """An engine model with `concurrency` clients, each of which sends a request when it has the last one's answer."""

    def __init__(self, spec: EngineSpec, concurrency: int) -> None:
        self._engine = Engine(spec)
        self._concurrency = concurrency
        self._waiting: dict[Job, asyncio.Future[None]] = {}
        self._now_ps = 0
        self._sent = 0

    async def complete(self, input_tokens: int, output_tokens: int) -> Completed:
        """One answer."""
        job = Job(self._sent, input_tokens, output_tokens)
        self._sent += 1
        self._engine.submit(job, self._now_ps)
        loop = asyncio.get_running_loop()
        answered = self._waiting[job] = loop.create_future()
        if len(self._waiting) == self._concurrency:
            loop.call_soon(self._run)
        await answered
        return Completed(
            job.arrived_ps / PS_PER_S, job.first_token_ps / PS_PER_S, job.finished_ps / PS_PER_S, output_tokens
        )

    def _run(self) -> None:
        finished = False
        while not finished:
            for event in self._engine.next_events():
                self._now_ps = event.at_ps
                if event.finished:
                    finished = True
                    answered = self._waiting.pop(event.job)
                    if not answered.cancelled():
                        answered.set_result(None)


def modelled_window(spec: EngineSpec, corner: tuple[int, int], concurrency: int, seconds: float) -> Window:
    """What a closed loop of requests of one size (input tokens, output tokens) shows."""

    async def load() -> Window:
        engine = ModelledEngine(spec, concurrency)
        return await closed_loop(
            lambda output_tokens: engine.complete(corner[0], output_tokens), corner[1], concurrency, seconds
        )

    return asyncio.run(load())


def profile_model(
    spec: EngineSpec, gpu_type: str, buckets: Buckets, seconds: float = DEFAULT_SECONDS_PER_POINT
) -> Measurement:
    """Every bucket's corner at rising concurrency until more of it brings nothing, as `profile_engine` does."""
    points: list[MeasuredPoint] = []
    for corner in map(buckets.edges, range(buckets.count)):
        best = 0.0
        for concurrency in DEFAULT_CONCURRENCIES:
            point = measured_point(corner, concurrency, modelled_window(spec, corner, concurrency, seconds))
            points.append(point)
            if point.requests_per_second < best * GROWTH:
                break
            best = point.requests_per_second
    return Measurement(gpu_type=gpu_type, engine="llmfleet engine model", points=points)
