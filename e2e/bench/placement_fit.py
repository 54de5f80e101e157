"""Fitting the roofline's constants to measured rows, under a prior.

    fit(rows, names, start) -> Constants

Minimised is the sum over rows of a soft absolute of the log error (Charbonnier: quadratic near zero, linear far out, so
that a row with wrong metadata pulls no more than its share) of TPOT and, with less weight, TTFT, plus the squared
distance of the logarithm of every constant from the prior in units of its scatter. Levenberg-Marquardt on the
logarithms with a numerical Jacobian: a dozen unknowns, a second. Deterministic.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np

from e2e.bench.placement_silicon import Silicon
from llmfleet.placement.performance.model import FloatArray
from llmfleet.placement.performance.roofline import PRIOR, Constants

SCATTER: dict[str, float] = {
    "memory": 0.1,
    "cache": 0.2,
    "arithmetic": 0.2,
    "prefill": 0.2,
    "link": 0.3,
    "layer_us": 0.3,
    "vllm_layer": 0.1,
    "trtllm_layer": 0.1,
    "sglang_layer": 0.1,
    "request_us": 0.7,
    "exchange_us": 0.5,
    "interference": 0.15,
    "queueing": 0.7,
    "admission_ms": 0.7,
    "expert_memory": 0.25,
    "expert_arithmetic": 0.4,
    "expert_prefill": 0.4,
    "expert_evenness": 1.0,
    "expert_layer_us": 1.0,
    "expert_conversion_us": 1.0,
    "expert_shared_us": 1.0,
    "latent_layer_us": 0.7,
    "indexer_layer_us": 0.7,
}
"""How well each constant is known before any measurement: relative standard deviation."""
EXPERT = [name for name in SCATTER if name.startswith(("expert", "latent", "indexer"))]
"""Constants that only mixtures of experts have; all models with latent attention so far are such."""
DENSE = [name for name in SCATTER if name not in EXPERT]
"""Those that every model has."""

_PRIOR_WEIGHT = 0.03  # a constant one scatter off costs as much as 3 % error on every row
_TTFT_WEIGHT = 0.3
_SOFTNESS = 0.1
_STEP = 1e-4
_ITERATIONS = 40


def fit(rows: Silicon, names: list[str], start: Constants = PRIOR) -> Constants:
    """The named constants fitted to the rows, the others as in `start`."""
    origin = np.log([asdict(start)[name] for name in names])
    prior = np.log([asdict(PRIOR)[name] for name in names])
    scatter = np.array([SCATTER[name] for name in names])
    strength = _PRIOR_WEIGHT * math.sqrt(len(rows))

    def residuals(logs: FloatArray) -> FloatArray:
        ttft_ms, tpot_ms = rows.predict(_constants(start, names, logs))
        ttft = np.where(np.isfinite(ttft_ms), np.log(ttft_ms / rows.ttft_ms), 0.0)
        errors = np.concatenate([np.log(tpot_ms / rows.tpot_ms), _TTFT_WEIGHT * ttft])
        soft = np.sign(errors) * _SOFTNESS * np.sqrt(2 * (np.sqrt(1 + (errors / _SOFTNESS) ** 2) - 1))
        return np.concatenate([soft, strength * (logs - prior) / scatter])

    logs = origin
    damping = 1e-2
    current = residuals(logs)
    for _ in range(_ITERATIONS):
        jacobian = np.stack([(residuals(logs + _STEP * unit) - current) / _STEP for unit in np.eye(len(names))], axis=1)
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -jacobian.T @ current)
        tried = residuals(logs + step)
        if tried @ tried < current @ current:
            gained = 1 - (tried @ tried) / (current @ current)
            logs, current, damping = logs + step, tried, damping / 3
            if gained < 1e-6:
                break
        else:
            damping *= 4
    return _constants(start, names, logs)


def _constants(start: Constants, names: list[str], logs: FloatArray) -> Constants:
    return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))
