"""The modelled engines of the promise row, in two families that serve a model each.

`gpus`: an 8-billion-parameter model on three GPUs. Hardware figures are the vendors': memory bandwidth and dense 16-bit
TFLOPS of the NVIDIA L4, A100 80GB SXM and H100 SXM data sheets. How much of them an engine gets is assumed once for
all: 75 % of the bandwidth and 55 % of the operations. These engines need not be any particular product; they need to be
unlike each other in the way real ones are, and to batch, chunk, queue and preempt.

`cpus`: the tiny model on one core, with the coefficients that `python -m e2e.bench.engine_model` fitted to real vLLM,
and on a core at 45 % of its speed, as in the demo. Its requests are an eighth as long, its objective four times as
strict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from e2e.bench.engine_model import DATA
from e2e.engine.tiny_model import KV_BYTES_PER_TOKEN as TINY_KV_BYTES_PER_TOKEN
from llmfleet.api import Buckets
from llmfleet.simulator import EngineSpec, StepTime

_PARAMETERS, _LAYERS, _HIDDEN = 8.03e9, 32, 4096
"""Llama 3.1 8B (config.json of the model): 8 key-value heads of 128, everything in 16 bits."""
_WEIGHT_BYTES, _KV_BYTES_PER_TOKEN = 2 * _PARAMETERS, _LAYERS * 2 * 8 * 128 * 2
_BLOCK_TOKENS = 16
_BANDWIDTH_SHARE, _OPERATIONS_SHARE = 0.75, 0.55
_MEMORY_SHARE, _OVERHEAD_GIB = 0.9, 1.5

_INPUT_EDGES = (128, 512, 1024, 2048, 4096, 8192, 16384)
_OUTPUT_EDGES = (32, 128, 512, 2048)
_SLOW_CORE = 0.45


@dataclass(frozen=True)
class Device:
    """An engine on one device, the device's memory and its price."""

    engine: EngineSpec
    memory_gib: float
    price_per_hour: float


@dataclass(frozen=True)
class Family:
    """A model and the devices that serve it."""

    name: str
    devices: Mapping[str, Device]
    weights_gib: float
    kv_kib_per_token: float
    shrink: int = 1
    """Requests are this many times shorter than the traces'."""
    stricter: float = 1.0
    """Targets are this many times shorter than the objectives'."""
    buckets: Buckets = field(init=False)

    def __post_init__(self) -> None:
        edges = [[edge // self.shrink for edge in edges] for edges in (_INPUT_EDGES, _OUTPUT_EDGES)]
        object.__setattr__(self, "buckets", Buckets(input_tokens=edges[0], output_tokens=edges[1]))

    @property
    def context_length(self) -> int:
        """Of the largest bucket."""
        return self.buckets.input_tokens[-1] + self.buckets.output_tokens[-1]

    @property
    def engines(self) -> dict[str, EngineSpec]:
        """Models by device."""
        return {name: device.engine for name, device in self.devices.items()}


def gpus() -> Family:
    """See above. Batch limits are vLLM's defaults of the API server on each device; prices those of a common cloud."""
    return Family(
        "gpus",
        {
            "l4": _gpu(22.5, 300, 121, 0.70, max_num_batched_tokens=2048, max_num_seqs=256),
            "a100": _gpu(80, 2039, 312, 3.67, max_num_batched_tokens=2048, max_num_seqs=256),
            "h100": _gpu(80, 3350, 989, 7.52, max_num_batched_tokens=8192, max_num_seqs=1024),
        },
        weights_gib=_WEIGHT_BYTES / 2**30,
        kv_kib_per_token=_KV_BYTES_PER_TOKEN / 2**10,
    )


def cpus() -> Family:
    """See above."""
    fitted = EngineSpec.model_validate(json.loads(DATA.read_text())["spec"])
    slow = fitted.model_copy(
        update={"step": fitted.step.scaled(1 / _SLOW_CORE), "frontend_ms": fitted.frontend_ms / _SLOW_CORE}
    )
    return Family(
        "cpus",
        {"core": Device(fitted, 4, 0.30), "slow-core": Device(slow, 4, 0.10)},
        weights_gib=0.01,
        kv_kib_per_token=TINY_KV_BYTES_PER_TOKEN / 2**10,
        shrink=8,
        stricter=4.0,
    )


def _gpu(
    memory_gib: float,
    gb_per_s: float,
    dense_tflops: float,
    price_per_hour: float,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
) -> Device:
    bytes_per_ms = gb_per_s * 1e6 * _BANDWIDTH_SHARE
    operations_per_ms = dense_tflops * 1e9 * _OPERATIONS_SHARE
    kv_bytes = (memory_gib * _MEMORY_SHARE - _OVERHEAD_GIB) * 2**30 - _WEIGHT_BYTES
    engine = EngineSpec(
        step=StepTime(
            overhead_ms=2.0,
            weights_ms=_WEIGHT_BYTES / bytes_per_ms,
            token_ms=2 * _PARAMETERS / operations_per_ms,
            sequence_ms=0.01,
            context_token_ms=_KV_BYTES_PER_TOKEN / bytes_per_ms,
            pair_ms=4 * _LAYERS * _HIDDEN / operations_per_ms,
        ),
        frontend_ms=5.0,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        kv_blocks=int(kv_bytes / (_KV_BYTES_PER_TOKEN * _BLOCK_TOKENS)),
        block_tokens=_BLOCK_TOKENS,
    )
    return Device(engine, memory_gib, price_per_hour)
