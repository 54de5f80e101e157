"""Latency out of measured kernels: the database of `aiconfigurator-core`, where it has the pair.

    kernel_prior(model, roofline) -> KernelPrior | None

The package (Apache-2.0, code and database; an 82 MB wheel, with pandas, pyarrow and scipy some 500 MB installed) is the
extra `llmfleet[prior]`, imported only here and only when asked for. It is asked for two things: the time of a decode
step and of a prefill of one model on one system, precision and engine. Places in memory and what requests see of the
steps are those of the roofline beside it. Nothing is fetched: a model whose configuration is not in the package has no
prior, nor has a GPU or engine that it has no measurements of (L4, A10G, H100 PCIe, MI300X, ... in 0.12.0).

A step's time is asked for on a grid of batch and context, powers of two, and interpolated between; beyond the grid
there is no answer.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from llmfleet.placement.performance.closed_loop import closed_loop, computed
from llmfleet.placement.performance.model import FloatArray, Prediction, Source, loads
from llmfleet.placement.performance.roofline import Roofline

SYSTEMS = {
    "a100-sxm-80gb": "a100_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "gb200": "gb200",
    "h100-sxm": "h100_sxm",
    "h200-sxm": "h200_sxm",
    "l40s": "l40s",
}
"""Names of catalogue devices in the package, as far as it has measurements of them."""

TTFT_ERROR, TPOT_ERROR = 0.5, 0.2
"""Relative error of the medians: `prediction_*_mape_database` of `make bench-placement`."""

_BATCHES = 2.0 ** np.arange(0, 11)
_CONTEXTS = 2.0 ** np.arange(5, 18)
_PACKAGE = "aiconfigurator_core"


class PriorMissingError(RuntimeError):
    """The optional package is not installed; the message says how to install it."""


class Kernels(Protocol):
    """The two questions that the package answers, in ms."""

    def decode_step_latency(self, gen_tokens: int, isl: int, osl: int) -> float:
        """One step of `gen_tokens` requests at a context of `isl`."""
        ...

    def predict_prefill_latency(self, bs: int, isl: int) -> float:
        """A batch of `bs` prompts of `isl` tokens."""
        ...


def installed() -> bool:
    """Whether the optional package is there; an empty folder of its name, which Python takes for one, is not it."""
    spec = importlib.util.find_spec(_PACKAGE)
    return spec is not None and spec.origin is not None


def kernel_prior(model: str, roofline: Roofline) -> KernelPrior | None:
    """The prior of a variant, None where the database does not have it.

    `model`: name on the Hugging Face hub. Raises PriorMissingError if the package is not installed.
    """
    try:
        sdk: Any = importlib.import_module(f"{_PACKAGE}.sdk")
    except ImportError as error:
        raise PriorMissingError(
            f"{_PACKAGE} is not installed: measured kernels as a prior need `pip install llmfleet[prior]`"
        ) from error
    system = SYSTEMS.get(roofline.device.name)
    bundled = resources.files(_PACKAGE) / "model_configs" / f"{model.replace('/', '--')}_config.json"
    if system is None or not bundled.is_file():
        return None
    shape = roofline.architecture
    options: dict[str, Any] = {
        "tp_size": roofline.tensor_parallel,
        "gemm_quant_mode": _quantization(shape.dense_bits),
        "kvcache_quant_mode": "fp8" if shape.kv_bits <= 8 else "bfloat16",
        "fmha_quant_mode": "bfloat16",
    }
    if shape.experts:
        options |= {"moe_tp_size": roofline.tensor_parallel, "moe_quant_mode": _quantization(shape.expert_bits)}
    try:
        kernels = sdk.EngineHandle.compile(model, system, roofline.engine, **options)
        return tabulated(kernels, roofline)
    except Exception as error:  # its own errors share no base class; every one of them means: not in the database
        logging.getLogger(__name__).info("no prior for %s on %s: %s", model, system, error)
        return None


def tabulated(kernels: Kernels, roofline: Roofline) -> KernelPrior:
    """The prior of a variant out of its kernels: the longer and larger never faster, as a few cells claim."""
    steps = [[kernels.decode_step_latency(int(b), int(c), 2) for c in _CONTEXTS] for b in _BATCHES]
    prefills = [kernels.predict_prefill_latency(1, int(c)) for c in _CONTEXTS]
    return KernelPrior(
        steps_ms=np.maximum.accumulate(np.maximum.accumulate(np.array(steps), axis=0), axis=1),
        prefills_ms=np.maximum.accumulate(np.array(prefills)),
        roofline=roofline,
    )


def _quantization(bits: float) -> str:
    if bits > 9:
        return "bfloat16"
    return "fp8" if bits >= 7 else "nvfp4"


@dataclass(frozen=True)
class KernelPrior:
    """A PerformanceModel of one variant."""

    steps_ms: FloatArray
    """Decode steps on the grid, shape (batches, contexts)."""
    prefills_ms: FloatArray
    """Prefills on the grid, shape (contexts,)."""
    roofline: Roofline
    """The same variant: its places in memory, and how prefills disturb decodes."""

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """See `PerformanceModel.predict`; NaN beyond the grid."""
        inputs, outputs, concurrencies = loads(input_tokens, output_tokens, concurrency)
        k = self.roofline.constants
        ttft_ms, tpot_ms = closed_loop(
            self,
            inputs,
            outputs,
            concurrencies,
            interference=k.interference,
            queueing=k.queueing,
            admission_ms=k.admission_ms,
        )
        return computed(ttft_ms, tpot_ms, ttft_error=TTFT_ERROR, tpot_error=TPOT_ERROR, source="prior")

    @property
    def trusted(self) -> tuple[float, float, Source]:
        """Relative errors of the median TTFT and TPOT, and what they rest on."""
        return TTFT_ERROR, TPOT_ERROR, "prior"

    @property
    def admission_ms(self) -> float:
        """Tokenizing, admitting and answering one request."""
        return self.roofline.constants.admission_ms

    def step_ms(self, batch: FloatArray, context: FloatArray) -> FloatArray:
        """One decode step, interpolated; NaN beyond the grid."""
        rows = np.stack([np.interp(context, _CONTEXTS, row, right=np.nan) for row in self.steps_ms])
        where = np.log2(batch)
        low = np.clip(np.floor(where).astype(int), 0, len(_BATCHES) - 2)
        share = (batch - _BATCHES[low]) / _BATCHES[low]
        blended = (1 - share) * np.take_along_axis(rows, low[None], 0) + share * np.take_along_axis(
            rows, low[None] + 1, 0
        )
        return np.where(batch > _BATCHES[-1], np.nan, blended[0])

    def prefill_ms(self, prompt: FloatArray) -> FloatArray:
        """What one prompt adds, interpolated; NaN beyond the grid."""
        return np.interp(prompt, _CONTEXTS, self.prefills_ms, right=np.nan)

    def places(self, context: FloatArray) -> FloatArray:
        """Those of the roofline: memory is no kernel."""
        return self.roofline.places(context)
