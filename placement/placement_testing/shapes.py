"""Shapes of published models, as their `config.json` says them, for whatever predicts latency from a shape."""

from __future__ import annotations

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
