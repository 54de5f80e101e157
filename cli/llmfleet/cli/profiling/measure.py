"""All points of a measurement: every bucket's corner, at rising concurrency until more of it brings nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from llmfleet.api import DEFAULT_CONFIGURATION, MeasuredPoint, Measurement
from llmfleet.cli.profiling.configured import require_configuration
from llmfleet.cli.profiling.engine import Completed, MeasuredEngine, ServedModel
from llmfleet.cli.profiling.load import closed_loop
from llmfleet.cli.profiling.prompts import SAMPLE_TEXT, Prompts
from llmfleet.cli.profiling.settings import ProfileSettings
from llmfleet.cli.profiling.statistics import measured_point
from llmfleet.cli.refused import RefusedError

GROWTH = 1.05
"""A higher concurrency must bring at least this much more throughput, or the bucket is done."""


async def profile_engine(
    settings: ProfileSettings,
    progress: Callable[[str], None],
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Measurement:
    """Measures a running engine; `progress` gets a line for each point.

    Raises RefusedError if the engine cannot be reached, does not run in the configuration as far as it says, cannot
    hold the largest bucket, or fails a single request.
    """
    async with MeasuredEngine(settings.url, settings.api_key) as engine:
        model = await engine.served_model(settings.model)
        _require_context(model, settings)
        configuration = settings.configuration
        if configuration is not None:
            require_configuration(configuration, model, await engine.cache_dtype())
        prompts = Prompts(await engine.tokenize(model.name, SAMPLE_TEXT), settings.seed)
        points: list[MeasuredPoint] = []
        for number, corner in enumerate(settings.corners, start=1):
            progress(f"bucket {number} of {settings.buckets.count}: {corner[0]} input, {corner[1]} output tokens")

            async def send(output_tokens: int, input_tokens: int = corner[0]) -> Completed:
                return await engine.complete(model.name, prompts.draw(input_tokens), output_tokens)

            best = 0.0
            for concurrency in settings.concurrencies:
                window = await closed_loop(send, corner[1], concurrency, settings.seconds_per_point)
                point = measured_point(corner, concurrency, window)
                points.append(point)
                progress(_line(point, window.seconds))
                if point.requests_per_second < best * GROWTH:
                    break
                best = point.requests_per_second
        return Measurement(
            gpu_type=settings.gpu_type,
            tensor_parallel=settings.tensor_parallel,
            pipeline_parallel=settings.pipeline_parallel,
            configuration=DEFAULT_CONFIGURATION if configuration is None else configuration.name,
            engine=await engine.version(),
            measured_at=now().isoformat(timespec="seconds").replace("+00:00", "Z"),
            points=points,
        )


def _require_context(model: ServedModel, settings: ProfileSettings) -> None:
    largest = settings.buckets.input_tokens[-1] + settings.buckets.output_tokens[-1]
    if model.max_tokens is not None and largest > model.max_tokens:
        raise RefusedError(
            f"buckets: the largest needs {settings.buckets.input_tokens[-1]} input and "
            f"{settings.buckets.output_tokens[-1]} output tokens, {largest} together; the engine's context holds "
            f"{model.max_tokens}"
        )


def _line(point: MeasuredPoint, seconds: float) -> str:
    return (
        f"  {point.concurrency} at once: {point.requests_per_second:.4g} requests/s, "
        f"TTFT p50 {point.ttft_ms.p50:.4g} p95 {point.ttft_ms.p95:.4g} ms, "
        f"TPOT p50 {point.tpot_ms.p50:.3g} p95 {point.tpot_ms.p95:.3g} ms "
        f"({point.requests} requests in {seconds:.0f} s)"
    )
