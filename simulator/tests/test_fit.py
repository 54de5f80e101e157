"""A fit finds the engine that was observed, from what a client sees of it."""

from __future__ import annotations

import pytest

from llmfleet.simulator import Engine, EngineSpec, Job, StepTime
from llmfleet.simulator.engine import FOREVER_PS
from llmfleet.simulator.fit import fit
from llmfleet.simulator.spec import PS_PER_MS

TRUTH = EngineSpec(
    step=StepTime(overhead_ms=4, token_ms=0.03, sequence_ms=0.2, context_token_ms=3e-4, pair_ms=2e-5),
    frontend_ms=3,
    kv_blocks=5000,
)
START = EngineSpec(
    step=StepTime(overhead_ms=1, token_ms=0.1, sequence_ms=1, context_token_ms=1e-4, pair_ms=1e-4),
    frontend_ms=1,
    kv_blocks=5000,
)
LOADS = [(20, 50, 1), (20, 50, 16), (1000, 20, 1), (1000, 20, 8), (4000, 100, 1), (4000, 100, 4), (8000, 40, 3)]


def figures(spec: EngineSpec) -> list[float]:
    """TTFT of the first and TPOT of the last of some requests that arrive together, in milliseconds."""
    found = []
    for inputs, outputs, count in LOADS:
        engine = Engine(spec)
        jobs = [Job(number, inputs, outputs) for number in range(count)]
        for job in jobs:
            engine.submit(job, 0)
        engine.advance(FOREVER_PS)
        found.append(jobs[0].first_token_ps / PS_PER_MS)
        found.append((jobs[-1].finished_ps - jobs[-1].first_token_ps) / (outputs - 1) / PS_PER_MS)
    return found


def test_the_coefficients_come_back_from_what_a_client_sees() -> None:
    found = fit(START, figures, figures(TRUTH))
    assert found.error < 0.01
    assert found.spec.frontend_ms == pytest.approx(TRUTH.frontend_ms, rel=0.15)
    for name, value in TRUTH.step.model_dump().items():
        assert getattr(found.spec.step, name) == pytest.approx(value, rel=0.15), name


def test_a_fit_is_no_better_than_what_it_was_shown() -> None:
    noisy = [value * (1.2 if place // 2 % 2 else 0.8) for place, value in enumerate(figures(TRUTH))]
    assert 0.05 < fit(START, figures, noisy).error < 0.25


def test_what_is_zero_stays_zero_and_limits_are_kept() -> None:
    found = fit(START, figures, figures(TRUTH)).spec
    assert found.step.weights_ms == 0
    assert (found.kv_blocks, found.max_num_seqs) == (START.kv_blocks, START.max_num_seqs)


def test_too_little_or_impossible_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 figures; 6 coefficients need"):
        fit(START, figures, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"observed\[3\]: got 0"):
        fit(START, figures, [1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
