"""The closed loop, in a time that jumps from event to event, and what becomes of its numbers."""

from __future__ import annotations

import asyncio
import itertools
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.cli.profiling.engine import Completed
from llmfleet.cli.profiling.load import FEWEST_REQUESTS, Window, closed_loop
from llmfleet.cli.profiling.statistics import measured_point, percentiles
from llmfleet.cli.refused import RefusedError

T = TypeVar("T")

PREFILL_S = 0.05
TOKEN_S = 0.01


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self._now_s = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None = None) -> list[Any]:
            self._now_s += timeout or 0
            ready: list[Any] = select(0)
            return ready

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now_s


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main())


async def steady(output_tokens: int) -> Completed:
    """An engine whose speed does not depend on its load."""
    clock = asyncio.get_running_loop().time
    started = clock()
    await asyncio.sleep(PREFILL_S)
    first = clock()
    await asyncio.sleep(TOKEN_S * (output_tokens - 1))
    return Completed(started, first, clock(), output_tokens)


@pytest.mark.parametrize("concurrency", [1, 3, 16])
@pytest.mark.parametrize("seconds", [1.0, 30.0])
def test_the_rate_is_exact_however_few_requests_finish(concurrency: int, seconds: float) -> None:
    window = run(lambda: closed_loop(steady, 101, concurrency, seconds))
    duration_s = PREFILL_S + 100 * TOKEN_S
    assert window.requests_per_second == pytest.approx(concurrency / duration_s, rel=0.02)
    assert window.seconds >= seconds
    assert len(window.completed) >= max(FEWEST_REQUESTS, concurrency)


def test_latencies_are_those_of_the_requests() -> None:
    point = measured_point((64, 101), 4, run(lambda: closed_loop(steady, 101, 4, 20)))
    assert (point.input_tokens, point.output_tokens, point.concurrency) == (64, 101, 4)
    assert point.ttft_ms.p50 == point.ttft_ms.max == pytest.approx(PREFILL_S * 1000)
    assert point.tpot_ms.p50 == point.tpot_ms.max == pytest.approx(TOKEN_S * 1000)


def test_the_first_request_of_a_client_is_not_counted() -> None:
    calls = 0

    async def cold_start(output_tokens: int) -> Completed:
        nonlocal calls
        calls += 1
        if calls <= 4:
            await asyncio.sleep(3)
            started = asyncio.get_running_loop().time() - 3
            request = await steady(output_tokens)
            return Completed(started, request.first_token_s, request.finished_s, output_tokens)
        return await steady(output_tokens)

    window = run(lambda: closed_loop(cold_start, 50, 4, 10))
    assert max(request.ttft_ms for request in window.completed) < 3000


def test_clients_run_out_of_step() -> None:
    window = run(lambda: closed_loop(steady, 101, 4, 60))
    finished = sorted(request.finished_s for request in window.completed)
    gaps = [b - a for a, b in itertools.pairwise(finished)]
    assert min(gaps) > (PREFILL_S + 100 * TOKEN_S) / 4 / 2


def test_one_failed_request_ends_the_measurement_and_cancels_the_others() -> None:
    running = 0
    calls = 0

    async def fails_once(output_tokens: int) -> Completed:
        nonlocal running, calls
        calls += 1
        if calls == 9:
            raise RefusedError("engine died")
        running += 1
        try:
            return await steady(output_tokens)
        finally:
            running -= 1

    with pytest.raises(RefusedError, match="engine died"):
        run(lambda: closed_loop(fails_once, 50, 4, 1000))
    assert running == 0


@given(st.lists(st.floats(min_value=0.01, max_value=1e5), min_size=1, max_size=300))
def test_percentiles_are_values_that_enough_of_the_sample_stays_below(values: list[float]) -> None:
    found = percentiles(values)
    rounded = [round(value, 2) for value in values]
    levels = {50: found.p50, 90: found.p90, 95: found.p95, 99: found.p99, 100: found.max}
    for percent, value in levels.items():
        assert value in rounded
        assert sum(other <= value for other in rounded) >= math.floor(percent / 100 * len(values))
        assert sum(other < value for other in rounded) < percent / 100 * len(values)
    assert list(levels.values()) == sorted(levels.values())


def test_a_rate_keeps_four_digits_however_small_it_is() -> None:
    window = Window([Completed(0, 1, 2, 11)] * 8, seconds=70_000)
    assert measured_point((1, 11), 1, window).requests_per_second == 0.0001143
