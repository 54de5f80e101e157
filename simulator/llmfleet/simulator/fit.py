"""The spec under which the model shows what a real engine showed.

In: figures observed on the engine (TTFT and TPOT at some loads, say), and a function that gives the same figures for
any spec, by simulation. Out: the spec whose figures are closest, in the sum of squared *logarithms* of their ratios,
so that being twice too fast counts like being twice too slow, and milliseconds like seconds.

Levenberg and Marquardt's method (Marquardt, SIAM Journal 11, 1963) over the logarithms of the coefficients, which
keeps them positive. Derivatives are differences over steps of a few percent: a simulation is only nearly smooth. What
the figures do not determine stays where it began, held by a weak pull.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmfleet.simulator.spec import EngineSpec

Predict = Callable[[EngineSpec], Sequence[float]]
"""The figures of a spec, all positive, in the order of the observed ones."""

_DIFFERENCE = 0.04
_PULL = 0.01
_FIRST_DAMPING = 0.01
_MOST_DAMPING = 1e6
_ROUNDS = 30
_WORTH_GOING_ON = 1e-4


@dataclass(frozen=True)
class Fit:
    """The spec found, and how far its figures are from the observed ones: root mean square of log ratios."""

    spec: EngineSpec
    error: float


def fit(start: EngineSpec, predict: Predict, observed: Sequence[float]) -> Fit:
    """The spec near `start` whose figures are closest to the observed ones. Coefficients that are zero stay zero.

    Raises ValueError for figures that are not positive, and where there are fewer of them than coefficients.
    """
    names = [name for name, value in _coefficients(start).items() if value > 0]
    if len(observed) < len(names):
        raise ValueError(f"observed: got {len(observed)} figures; {len(names)} coefficients need at least as many")
    for place, value in enumerate(observed):
        if not (0 < value < math.inf):
            raise ValueError(f"observed[{place}]: got {value:g}; accepted are positive numbers")
    wanted = np.log(np.array(observed))
    begin = np.log([_coefficients(start)[name] for name in names])

    def residuals(point: NDArray[np.float64]) -> NDArray[np.float64]:
        figures = np.log(np.array(predict(_with(start, names, point))))
        return np.concatenate([figures - wanted, _PULL * (point - begin)])

    point, damping = begin, _FIRST_DAMPING
    here = residuals(point)
    for _ in range(_ROUNDS):
        slopes = np.column_stack(
            [(residuals(point + _DIFFERENCE * axis) - here) / _DIFFERENCE for axis in np.eye(len(names))]
        )
        normal, gradient = slopes.T @ slopes, slopes.T @ here
        before = float(here @ here)
        while damping < _MOST_DAMPING:
            step = np.linalg.solve(normal + damping * (np.diag(np.diag(normal)) + 1e-9 * np.eye(len(names))), -gradient)
            tried = residuals(point + np.clip(step, -1.0, 1.0))
            if float(tried @ tried) < before:
                point, here, damping = point + np.clip(step, -1.0, 1.0), tried, damping / 5
                break
            damping *= 5
        if before - float(here @ here) <= _WORTH_GOING_ON * before:
            break
    figures = here[: len(wanted)]
    return Fit(_with(start, names, point), float(np.sqrt(np.mean(figures**2))))


def _coefficients(spec: EngineSpec) -> dict[str, float]:
    values: dict[str, float] = {**spec.step.model_dump(), "frontend_ms": spec.frontend_ms}
    return values


def _with(spec: EngineSpec, names: Sequence[str], point: NDArray[np.float64]) -> EngineSpec:
    changed: dict[str, Any] = dict(zip(names, np.exp(point).tolist(), strict=True))
    frontend_ms = changed.pop("frontend_ms", spec.frontend_ms)
    return spec.model_copy(
        update={"step": spec.step.model_copy(update=changed), "frontend_ms": frontend_ms},
    )
