"""The interface of everything that predicts latency, and the order in which predictions are believed.

A **load** is a triple: prompt length, answer length, and the requests in flight in one replica (closed loop: as one
ends, the next begins). A model answers with the *median* TTFT and TPOT there, how widely single requests scatter
around it, how wrong the answer may be, and where it comes from. A model that knows nothing about a load answers NaN:
it never guesses beyond its shapes. `Layered` asks one model after the other until one knows the size.

All functions take arrays that broadcast against each other and answer in their common shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

Source = Literal["measured", "prior", "roofline", "none"]
"""Where a prediction comes from; `none` where no model knows the load."""


@dataclass(frozen=True)
class Prediction:
    """Latency at loads. All arrays have one shape, that of the loads; NaN where the load is not known."""

    ttft_ms: FloatArray
    """Median time to first token."""
    tpot_ms: FloatArray
    """Median time per output token after the first."""
    ttft_spread: FloatArray
    """Scatter of single requests at this load: standard deviation of the logarithm of TTFT, at least zero."""
    tpot_spread: FloatArray
    """The same of TPOT."""
    ttft_error: FloatArray
    """Relative standard error of the median TTFT: 0.2 means that the truth lies within 20 % two times in three."""
    tpot_error: FloatArray
    """The same of TPOT."""
    source: NDArray[np.str_]
    """Where each answer comes from, one of `Source`."""

    @property
    def known(self) -> BoolArray:
        """Where there is an answer; a request that never gets a place has one, an infinite TTFT."""
        return ~(np.isnan(self.ttft_ms) | np.isnan(self.tpot_ms))

    def rows(self, index: slice | NDArray[np.intp]) -> Prediction:
        """Some of the loads, along the first axis."""
        return Prediction(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def where(self, condition: BoolArray, other: Prediction) -> Prediction:
        """This prediction where `condition` holds, the other elsewhere."""
        return Prediction(
            *(np.where(condition, getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        )


class PerformanceModel(Protocol):
    """Whatever can say how fast one replica of one variant is."""

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """Latency with `concurrency` requests in flight, each of this size. Raises ValueError for a load below one."""
        ...


def loads(
    input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The three as float arrays of one shape. Raises ValueError naming the argument that is not finite or below one."""
    given = {"input_tokens": input_tokens, "output_tokens": output_tokens, "concurrency": concurrency}
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in given.items()}
    for name, array in arrays.items():
        wrong = array[~(np.isfinite(array) & (array >= 1))]
        if wrong.size:
            raise ValueError(f"{name} has {wrong.flat[0]:g}; accepted are finite numbers of at least 1")
    inputs, outputs, concurrencies = np.broadcast_arrays(*arrays.values())
    return inputs, outputs, concurrencies


def unknown(shape: tuple[int, ...]) -> Prediction:
    """The answer of a model that knows nothing."""
    nan = np.full(shape, np.nan)
    return Prediction(nan, nan, nan, nan, nan, nan, np.full(shape, "none", dtype="<U8"))


@dataclass(frozen=True)
class Layered:
    """Several models, the most trusted first. A size is answered by the first that knows it with one request in flight:
    where a measured size ends at some load, a model that was not measured does not go on."""

    models: Sequence[PerformanceModel]

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """See `PerformanceModel.predict`; NaN where no model knows the size, or the one that does not the load."""
        inputs, outputs, concurrencies = loads(input_tokens, output_tokens, concurrency)
        answer, decided = unknown(inputs.shape), np.zeros(inputs.shape, dtype=np.bool_)
        for model in self.models:
            if decided.all():
                break
            found = model.predict(inputs, outputs, concurrencies)
            knows = found.known | model.predict(inputs, outputs, 1.0).known
            answer = answer.where(decided | ~knows, found)
            decided = decided | knows
        return answer
