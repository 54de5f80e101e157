"""The event loop's lag: what is seen of a stall, and for how long it is remembered."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import LLMService, ModelProfile
from llmfleet.operator.loop_lag import INTERVAL_S, WINDOW_S, Lag, SlidingMaximum, delayed_s, watch_lag
from llmfleet.operator.metrics import Metrics

STALL_S = 0.2


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Standby:
    """A replica that knows of nothing yet."""

    leading = False
    queue_depth = 0
    planning = None
    newest_plan = None

    def services(self) -> Iterator[LLMService]:
        return iter(())

    def profiles(self) -> Iterator[ModelProfile]:
        return iter(())


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[list[Lag]]:
    """Lags of the running loop as they are recorded."""
    lags: list[Lag] = []
    task = asyncio.create_task(watch_lag(lags.append))
    await asyncio.sleep(0)
    try:
        yield lags
    finally:
        task.cancel()


async def test_work_that_keeps_the_loop_is_seen_with_its_length() -> None:
    async with watched() as lags:
        asyncio.get_running_loop().call_soon(time.sleep, STALL_S)
        await asyncio.sleep(STALL_S + 2 * INTERVAL_S)
    # Above it a busy machine's own delays come on top.
    assert STALL_S - INTERVAL_S <= max(lag.seconds for lag in lags) < 5 * STALL_S


async def test_a_stall_says_how_much_of_it_was_computing_in_the_loop_and_how_much_in_the_process() -> None:
    async with watched() as lags:
        # More than once: on a busy machine another thread of this process may wait for a core, and explain it.
        for _ in range(10):
            lags.clear()
            asyncio.get_running_loop().call_soon(time.sleep, STALL_S)
            await asyncio.sleep(STALL_S + 2 * INTERVAL_S)
            waited = max(lags, key=lambda lag: lag.seconds)
            if waited.own_s > STALL_S / 2:
                break
        lags.clear()
        asyncio.get_running_loop().call_soon(_compute, STALL_S)
        await asyncio.sleep(STALL_S + 2 * INTERVAL_S)
        computed = max(lags, key=lambda lag: lag.seconds)
    assert waited.loop_cpu_s < STALL_S / 2
    assert waited.own_s > STALL_S / 2, "it slept, and wanted no core"
    assert computed.loop_cpu_s > STALL_S / 2
    for lag in (waited, computed):
        assert lag.loop_cpu_s <= lag.process_cpu_s + 1e-3
        assert lag.process_cpu_s <= lag.seconds


def _compute(cpu_s: float) -> None:
    end = time.thread_time() + cpu_s
    while time.thread_time() < end:
        pass


@pytest.fixture
def crowded_core() -> Iterator[None]:
    """This thread shares one core with a process that never rests."""
    everywhere = os.sched_getaffinity(0)
    core = min(everywhere)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            os.sched_setaffinity(other.pid, {core})
            os.sched_setaffinity(0, {core})
            yield
        finally:
            os.sched_setaffinity(0, everywhere)
            other.kill()


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="Linux tells for how long threads wait for a core"
)
@pytest.mark.usefixtures("crowded_core")
async def test_a_stall_for_want_of_a_core_is_not_our_own() -> None:
    async with watched() as lags:
        asyncio.get_running_loop().call_soon(_compute, STALL_S)
        await asyncio.sleep(STALL_S + 2 * INTERVAL_S)
    crowded = max(lags, key=lambda lag: lag.seconds)
    assert crowded.delayed_s > STALL_S / 4
    assert STALL_S / 2 < crowded.own_s < crowded.seconds


seconds = st.floats(0.0, 10.0)


@given(seconds, seconds, seconds, seconds)
def test_what_is_our_own_of_a_lag_is_what_was_computed_and_what_no_wait_for_a_core_explains(
    late_s: float, loop_cpu_s: float, loop_delay_s: float, others_delay_s: float
) -> None:
    delayed = delayed_s(late_s, loop_cpu_s, loop_delay_s, others_delay_s)
    assert 0 <= delayed <= late_s
    # Waits of other threads explain nothing while the loop computes or waits for a core itself.
    unexplained_s = max(0.0, late_s - loop_cpu_s - loop_delay_s)
    assert delayed <= loop_delay_s + unexplained_s
    assert delayed == delayed_s(late_s, loop_cpu_s, loop_delay_s, max(others_delay_s, unexplained_s)) or (
        others_delay_s < unexplained_s
    )


async def test_a_loop_that_only_waits_is_not_late() -> None:
    async with watched() as lags:
        await asyncio.sleep(STALL_S)
    assert len(lags) > 3
    # The best sample, since a busy machine may be late at any one of them.
    assert min(lag.seconds for lag in lags) < INTERVAL_S


@given(st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 5.0)), max_size=60), st.floats(0.0, 20.0))
def test_the_maximum_is_that_of_the_values_within_the_window(steps: list[tuple[float, float]], wait_s: float) -> None:
    clock = Clock()
    maximum = SlidingMaximum(10.0, clock)
    added: list[tuple[float, float]] = []
    for pause_s, value in steps:
        clock.now_s += pause_s
        maximum.add(value)
        added.append((clock.now_s, value))
    clock.now_s += wait_s
    assert maximum.get() == max((value for at_s, value in added if at_s >= clock.now_s - 10.0), default=0.0)


def test_the_metrics_tell_what_was_observed() -> None:
    metrics = Metrics(Standby())
    for lag_s in (0.002, 0.3, 0.004):
        metrics.observe_loop_lag(Lag(lag_s, lag_s / 4, lag_s / 2, 0.25))
    samples = dict(line.rsplit(" ", 1) for line in metrics.exposition().decode().splitlines() if line[:1] != "#")
    assert float(samples["llmfleet_operator_event_loop_lag_max_seconds"]) == 0.3
    assert float(samples["llmfleet_operator_event_loop_lag_own_max_seconds"]) == pytest.approx(0.05)
    assert float(samples['llmfleet_operator_event_loop_lag_cpu_max_seconds{threads="loop"}']) == 0.075
    assert float(samples['llmfleet_operator_event_loop_lag_cpu_max_seconds{threads="all"}']) == 0.15
    assert float(samples["llmfleet_operator_event_loop_lag_seconds_count"]) == 3
    assert float(samples['llmfleet_operator_event_loop_lag_seconds_bucket{le="0.25"}']) == 2
    assert WINDOW_S >= 30.0, "an ordinary scrape interval must not fall through"
