"""Latency out of measured kernels, as the optional package tells their times."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from llmfleet.placement.performance import Layered
from llmfleet.placement.performance.architecture import architecture_of
from llmfleet.placement.performance.hardware import CATALOGUE
from llmfleet.placement.performance.prior import PriorMissingError, installed, kernel_prior, tabulated
from llmfleet.placement.performance.roofline import Roofline
from placement_testing.shapes import LLAMA_8B

ROOFLINE = Roofline(
    architecture_of(LLAMA_8B),
    CATALOGUE["h200-sxm"],
)


class LinearKernels:
    """Steps of 5 ms, 0.1 ms for each request and 1 ms for every 1,024 tokens of context; prompts 50 us a token."""

    def decode_step_latency(self, gen_tokens: int, isl: int, osl: int) -> float:
        return 5 + 0.1 * gen_tokens + isl / 1024

    def predict_prefill_latency(self, bs: int, isl: int) -> float:
        return 0.05 * bs * isl


class BumpyKernels(LinearKernels):
    """One cell claims that four requests are faster than two."""

    def decode_step_latency(self, gen_tokens: int, isl: int, osl: int) -> float:
        return 1.0 if gen_tokens == 4 else super().decode_step_latency(gen_tokens, isl, osl)


def test_between_the_cells_of_the_grid_times_are_interpolated() -> None:
    prior = tabulated(LinearKernels(), ROOFLINE)
    batch, context = np.array([1.0, 3.0, 100.0]), np.array([100.0, 3000.0, 48.0])
    assert prior.step_ms(batch, context) == pytest.approx(5 + 0.1 * batch + context / 1024)
    assert prior.prefill_ms(np.array([777.0])) == pytest.approx([0.05 * 777])


def test_what_requests_see_is_a_step_and_their_share_of_the_others_prefills() -> None:
    prior, k = tabulated(LinearKernels(), ROOFLINE), ROOFLINE.constants
    found = prior.predict(1024, 128, [1, 9])
    assert str(found.source[0]) == "prior"
    alone = 5 + 0.1 + (1024 + 64) / 1024
    assert found.tpot_ms[0] == pytest.approx(alone)
    assert found.tpot_ms[1] == pytest.approx(alone + 0.8 + k.interference * 8 * 51.2 / 128)
    assert found.ttft_ms[1] - found.ttft_ms[0] == pytest.approx(k.queueing * 8 * 51.2)


def test_beyond_the_grid_another_model_answers() -> None:
    prior = tabulated(LinearKernels(), ROOFLINE)
    assert not prior.predict(32, 32, 2000).known
    both = Layered([prior, ROOFLINE]).predict([1024, 200_000], 128, 1)
    assert both.source.tolist() == ["prior", "roofline"]


def test_a_cell_that_contradicts_a_smaller_one_does_not_count() -> None:
    steps = tabulated(BumpyKernels(), ROOFLINE).step_ms(np.array([2.0, 4.0, 8.0]), np.array([1024.0] * 3))
    assert steps.tolist() == pytest.approx([6.2, 6.2, 6.8])


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    with pytest.raises(PriorMissingError, match=r"pip install llmfleet\[prior\]"):
        kernel_prior("Qwen/Qwen3-32B", ROOFLINE)


def test_an_empty_folder_of_the_packages_name_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aiconfigurator_core").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "aiconfigurator_core", raising=False)
    importlib.invalidate_caches()
    assert not installed()
    (tmp_path / "aiconfigurator_core" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert installed()
