"""Latency of a variant that nobody measured, from what a step must read, compute and send.

One decode step of b requests at c tokens of context takes the sum of

    weights     max of reading them once and multiplying b tokens with them; of the experts only those are read that
                b tokens are expected to touch
    cache       b c KV values read, or multiplied where attention is latent and that takes longer
    exchange    two all-reduces per layer of b hidden vectors over the replica's devices: a latency and a bandwidth
    launch      a time per layer (kernels too small to fill the device), longer with experts, with one that all tokens
                share, where numbers are converted for them, with latent or sparse attention; and a time per request
                (scheduling, sampling)

Every device of the replica does 1/tp of the first two; KV heads can be shared by no more devices than there are heads.
"Max" is a norm of order four: where both roofs are near, neither is reached.

Of E experts with k per token, chosen evenly, b tokens would leave a share of (1 - k/E)^b untouched. Routers do not
choose evenly: with popularity gamma-distributed around its mean, of shape s, the first token leaves 1 - k/E and the
others (1 + (b - 1) k / (s E))^-s of that (the mean of a Poisson chance of no hit over the distribution).

A prefill is bound by arithmetic: two operations per parameter and token, attention quadratic in the prompt.

What requests see of it is in `closed_loop.py`.

The constants are efficiencies against published figures. They start from physical expectations (a large copy reaches
85 % of the bandwidth, a large multiplication 60 % of the dense peak, ...) and are fitted, under that prior, to a set
of measured (model, GPU) groups; `e2e/bench/placement_prediction.py` does it, says which groups, and reports the error
on the others. They are not fitted to what is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from llmfleet.api import Architecture
from llmfleet.placement.performance.closed_loop import closed_loop, computed
from llmfleet.placement.performance.hardware import Device
from llmfleet.placement.performance.model import FloatArray, Prediction, Source, loads

Engine = Literal["vllm", "trtllm", "sglang"]
"""Engines that constants are known for; an engine of another name is taken for vLLM."""

USABLE_MEMORY_FRACTION = 0.9
"""Share of a device's memory that an engine takes: vLLM's default `--gpu-memory-utilization`."""
ENGINE_OVERHEAD_GB = 2.0
"""Activations, graphs and communication buffers per device."""
_LATENT_ATTENTION_EFFICIENCY = 0.4
_NORM = 4.0


@dataclass(frozen=True)
class Constants:
    """Efficiencies (shares of a published figure) and times of small things."""

    memory: float = 0.85
    """Of the memory bandwidth, reading weights."""
    cache: float = 0.75
    """Of the memory bandwidth, reading the KV cache."""
    arithmetic: float = 0.60
    """Of the dense peak, multiplying with a decode batch."""
    prefill: float = 0.60
    """Of the dense peak, multiplying with a prompt."""
    link: float = 0.50
    """Of the link's bandwidth, exchanging hidden vectors."""
    layer_us: float = 60.0
    """Launching one layer, before the engine's factor."""
    vllm_layer: float = 1.15
    """Factor on `layer_us`."""
    trtllm_layer: float = 0.95
    """Factor on `layer_us`."""
    sglang_layer: float = 0.90
    """Factor on `layer_us`."""
    request_us: float = 20.0
    """Scheduling and sampling one request in one step."""
    exchange_us: float = 5.0
    """Latency of one all-reduce."""
    interference: float = 0.85
    """Share of the other requests' prefill time that a decode waits for."""
    queueing: float = 0.15
    """Share of the other requests' prefills that a prefill waits for."""
    admission_ms: float = 40.0
    """Tokenizing, admitting and answering one request."""
    expert_memory: float = 0.60
    """Of the memory bandwidth, reading experts."""
    expert_arithmetic: float = 0.35
    """Of the dense peak, multiplying a decode batch with experts."""
    expert_prefill: float = 0.35
    """Of the dense peak, multiplying a prompt with experts."""
    expert_evenness: float = 2.0
    """How alike popular experts are: shape of the gamma distribution of popularity."""
    expert_layer_us: float = 20.0
    """Routing tokens to experts and back, per layer."""
    expert_conversion_us: float = 20.0
    """Quantizing what goes into experts of 8 bits, or widening weights of fewer, per layer; not where a device
    multiplies 4 bits itself: kernels for those do both at once."""
    expert_shared_us: float = 20.0
    """The small multiplications of the expert that every token passes, per layer."""
    latent_layer_us: float = 15.0
    """The further small multiplications of latent attention, per layer."""
    indexer_layer_us: float = 30.0
    """Scoring and selecting the tokens that sparse attention reads, per layer."""


PRIOR = Constants()
"""What physics and common experience suggest; the starting point of every fit."""

FITTED = Constants(
    memory=0.87,
    cache=0.758,
    arithmetic=0.598,
    prefill=0.62,
    link=0.5,
    layer_us=55.9,
    vllm_layer=1.15,
    trtllm_layer=0.947,
    sglang_layer=0.893,
    request_us=23.5,
    exchange_us=4.64,
    interference=0.843,
    queueing=0.116,
    admission_ms=59.5,
    expert_memory=0.73,
    expert_arithmetic=0.35,
    expert_prefill=0.237,
    expert_evenness=1.58,
    expert_layer_us=11.0,
    expert_conversion_us=25.4,
    expert_shared_us=26.9,
    latent_layer_us=14.9,
    indexer_layer_us=36.9,
)
"""`PRIOR` fitted to the measured rows; `python -m e2e.bench.placement_prediction --fit` prints it."""

TTFT_ERROR, TPOT_ERROR = 0.6, 0.2
"""Relative error of the medians, as found on groups that the constants were not fitted to."""


@dataclass(frozen=True)
class Roofline:
    """One model on `tensor_parallel` devices of one kind."""

    architecture: Architecture
    """The model's shape."""
    device: Device
    """One device's figures."""
    tensor_parallel: int = 1
    """Devices of the replica."""
    engine: str = "vllm"
    """Engine that serves it."""
    constants: Constants = FITTED
    """Efficiencies."""

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """See `PerformanceModel.predict`. Knows every load; a prompt that alone fills the memory waits for ever."""
        inputs, outputs, concurrencies = loads(input_tokens, output_tokens, concurrency)
        k = self.constants
        ttft_ms, tpot_ms = closed_loop(
            self,
            inputs,
            outputs,
            concurrencies,
            interference=k.interference,
            queueing=k.queueing,
            admission_ms=k.admission_ms,
        )
        return computed(ttft_ms, tpot_ms, ttft_error=TTFT_ERROR, tpot_error=TPOT_ERROR, source="roofline")

    @property
    def trusted(self) -> tuple[float, float, Source]:
        """Relative errors of the median TTFT and TPOT, and what they rest on."""
        return TTFT_ERROR, TPOT_ERROR, "roofline"

    @property
    def admission_ms(self) -> float:
        """Tokenizing, admitting and answering one request."""
        return self.constants.admission_ms

    def step_ms(self, batch: FloatArray, context: FloatArray) -> FloatArray:
        """One decode step of `batch` requests at `context` tokens each."""
        shape, device, k = self.architecture, self.device, self.constants
        bandwidth = device.memory_gb_per_second * 1e9
        dense = shape.dense_parameters_billion * 1e9 / self.tensor_parallel
        seconds = _roof(
            dense * shape.dense_bits / 8 / (bandwidth * k.memory),
            2 * batch * dense / (device.tflops(shape.dense_bits) * 1e12 * k.arithmetic),
        )
        layer_us = k.layer_us * self._engine_factor
        if shape.experts:
            share = shape.experts_per_token / shape.experts
            evenness = k.expert_evenness
            touched = 1 - (1 - share) * (1 + (batch - 1) * share / evenness) ** -evenness
            experts = shape.expert_parameters_billion * 1e9 / self.tensor_parallel
            seconds = seconds + _roof(
                experts * touched * shape.expert_bits / 8 / (bandwidth * k.expert_memory),
                2 * batch * experts * share / (device.tflops(shape.expert_bits) * 1e12 * k.expert_arithmetic),
            )
            layer_us += k.expert_layer_us + k.expert_shared_us * shape.shared_expert
            layer_us += k.expert_conversion_us * self._converts
        if self._latent:
            layer_us += k.latent_layer_us
        if shape.attended_tokens is not None:
            layer_us += k.indexer_layer_us
        seconds = seconds + self._attention_seconds(batch, context) + self._exchange_seconds(batch, with_latency=True)
        return 1e3 * (seconds + 1e-6 * (shape.layers * layer_us + k.request_us * batch))

    def prefill_ms(self, prompt: FloatArray) -> FloatArray:
        """The arithmetic and exchange of one prompt."""
        shape, device, k = self.architecture, self.device, self.constants
        share = shape.experts_per_token / shape.experts if shape.experts else 0.0
        dense = 2e9 * shape.dense_parameters_billion / (device.tflops(shape.dense_bits) * 1e12 * k.prefill)
        expert = 2e9 * shape.expert_parameters_billion * share
        expert /= device.tflops(shape.expert_bits) * 1e12 * k.expert_prefill
        pairs = shape.attention_layers * prompt**2 / 2
        pairs = pairs + shape.windowed_layers * prompt * np.minimum(prompt, shape.window_tokens or 1)
        attention = 2 * shape.prefill_attention_width * pairs / (device.tflops_16bit * 1e12 * k.prefill)
        seconds = (prompt * (dense + expert) + attention) / self.tensor_parallel
        return 1e3 * (seconds + self._exchange_seconds(prompt, with_latency=False))

    def places(self, context: FloatArray) -> FloatArray:
        """Requests of this context that fit into the cache; below one where not even a single one does."""
        shape = self.architecture
        parameters = shape.dense_parameters_billion * shape.dense_bits
        parameters += shape.expert_parameters_billion * shape.expert_bits
        room_gb = self.device.memory_gb * USABLE_MEMORY_FRACTION - ENGINE_OVERHEAD_GB
        room_gb -= parameters / 8 / self.tensor_parallel
        tokens = shape.attention_layers * context
        tokens = tokens + shape.windowed_layers * np.minimum(context, shape.window_tokens or 1)
        request_gb = tokens * self._kv_bytes_per_device / 1e9
        request_gb = request_gb + shape.state_kib_per_request * 1024e-9 / self.tensor_parallel
        places: FloatArray = max(room_gb, 0.0) / np.maximum(request_gb, 1e-12)
        return places

    @property
    def _kv_bytes_per_device(self) -> float:
        """Of one token in one layer."""
        shape = self.architecture
        return shape.kv_values_per_token * shape.kv_bits / 8 / min(self.tensor_parallel, shape.key_value_heads)

    @property
    def _latent(self) -> bool:
        return self.architecture.decode_attention_width > self.architecture.prefill_attention_width

    @property
    def _converts(self) -> bool:
        """Whether activations or weights are converted on the way into the experts."""
        bits = self.architecture.expert_bits
        return bits < 16 and not (bits <= 5 and self.device.tflops_4bit is not None)

    @property
    def _engine_factor(self) -> float:
        k = self.constants
        return {"trtllm": k.trtllm_layer, "sglang": k.sglang_layer}.get(self.engine, k.vllm_layer)

    def _attention_seconds(self, batch: FloatArray, context: FloatArray) -> FloatArray:
        shape, k = self.architecture, self.constants
        attended = context if shape.attended_tokens is None else np.minimum(context, shape.attended_tokens)
        tokens = shape.attention_layers * attended
        tokens = tokens + shape.windowed_layers * np.minimum(context, shape.window_tokens or 1)
        state_bytes = 2 * shape.state_kib_per_request * 1024 / self.tensor_parallel
        read = batch * (tokens * self._kv_bytes_per_device + state_bytes)
        seconds = read / (self.device.memory_gb_per_second * 1e9 * k.cache)
        if self._latent:
            operations = 2 * batch * tokens * shape.decode_attention_width / self.tensor_parallel
            seconds = np.maximum(seconds, operations / (self.device.tflops_16bit * 1e12 * _LATENT_ATTENTION_EFFICIENCY))
        return np.asarray(seconds)

    def _exchange_seconds(self, tokens: FloatArray, *, with_latency: bool) -> FloatArray:
        """Two all-reduces per layer; a ring sends 2 (tp - 1) / tp of the 16-bit vectors over every link."""
        if self.tensor_parallel == 1:
            return np.zeros_like(tokens)
        shape, k = self.architecture, self.constants
        sent = 2 * (self.tensor_parallel - 1) / self.tensor_parallel * 2 * shape.hidden_size * tokens
        each = sent / (self.device.link_gb_per_second * 1e9 * k.link) + (1e-6 * k.exchange_us if with_latency else 0)
        return np.asarray(2 * shape.layers * each)


def _roof(reading: ArrayLike, computing: FloatArray) -> FloatArray:
    roofs = np.stack(np.broadcast_arrays(np.asarray(reading, dtype=np.float64), computing))
    both: FloatArray = np.linalg.norm(roofs, ord=_NORM, axis=0)
    return both
