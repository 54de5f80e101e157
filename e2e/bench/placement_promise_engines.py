"""The modelled engines of the promise row: one 8-billion-parameter model on three GPUs.

Hardware figures are the vendors': memory bandwidth and dense 16-bit TFLOPS of the NVIDIA L4, A100 80GB SXM and H100 SXM
data sheets. How much of them an engine gets is assumed once for all: 75 % of the bandwidth and 55 % of the operations.
These engines need not be any particular product; they need to be unlike each other in the way real ones are, and to
batch, chunk, queue and preempt.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmfleet.simulator import EngineSpec, StepTime

PARAMETERS = 8.03e9
"""Llama 3.1 8B, with its layers, hidden size and KV cache in 16 bits (config.json of the model)."""
WEIGHT_BYTES = 2 * PARAMETERS
LAYERS, HIDDEN, KV_BYTES_PER_TOKEN = 32, 4096, 32 * 2 * 8 * 128 * 2
BLOCK_TOKENS = 16

_BANDWIDTH_SHARE, _OPERATIONS_SHARE = 0.75, 0.55
_MEMORY_SHARE, _OVERHEAD_GIB = 0.9, 1.5


@dataclass(frozen=True)
class Device:
    """Published figures, and the price per hour of a common cloud."""

    memory_gib: float
    gb_per_s: float
    dense_tflops: float
    price_per_hour: float
    max_num_batched_tokens: int
    """vLLM's default for the API server on it."""
    max_num_seqs: int
    """The same."""


DEVICES = {
    "l4": Device(22.5, 300, 121, 0.70, 2048, 256),
    "a100": Device(80, 2039, 312, 3.67, 2048, 256),
    "h100": Device(80, 3350, 989, 7.52, 8192, 1024),
}


def modelled(device: Device) -> EngineSpec:
    """The model of one engine on one device."""
    bytes_per_ms = device.gb_per_s * 1e6 * _BANDWIDTH_SHARE
    operations_per_ms = device.dense_tflops * 1e9 * _OPERATIONS_SHARE
    kv_bytes = (device.memory_gib * _MEMORY_SHARE - _OVERHEAD_GIB) * 2**30 - WEIGHT_BYTES
    return EngineSpec(
        step=StepTime(
            overhead_ms=2.0,
            weights_ms=WEIGHT_BYTES / bytes_per_ms,
            token_ms=2 * PARAMETERS / operations_per_ms,
            sequence_ms=0.01,
            context_token_ms=KV_BYTES_PER_TOKEN / bytes_per_ms,
            pair_ms=4 * LAYERS * HIDDEN / operations_per_ms,
        ),
        frontend_ms=5.0,
        max_num_batched_tokens=device.max_num_batched_tokens,
        max_num_seqs=device.max_num_seqs,
        kv_blocks=int(kv_bytes / (KV_BYTES_PER_TOKEN * BLOCK_TOKENS)),
        block_tokens=BLOCK_TOKENS,
    )
