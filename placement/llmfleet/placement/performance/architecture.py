"""A model's shape out of its Hugging Face `config.json`: how many numbers a step reads, keeps and multiplies.

    architecture_of(config, dense_bits, expert_bits, kv_bits) -> Architecture

Understood are the decoders that are served today: grouped-query attention (Llama, Qwen, Mistral), latent attention
(DeepSeek, Kimi, GLM), mixtures of experts with and without shared experts, sliding windows (gpt-oss), sparse
attention with an indexer (GLM-5) and layers of linear attention (Qwen3.5). Counted is what matters for speed: matrices.
Norms, biases and positions are not. Fields of a kind that is not understood are refused rather than ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmfleet.api import Architecture


class ConfigError(ValueError):
    """A config.json that cannot be understood; says which field."""


def architecture_of(
    config: Mapping[str, Any], *, dense_bits: float = 16.0, expert_bits: float | None = None, kv_bits: float = 16.0
) -> Architecture:
    """The shape of a model. `expert_bits`: those of the dense weights where absent.

    Raises ConfigError naming a field that is missing or is no positive whole number.
    """
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise ConfigError("text_config: accepted is an object")
    shape = _Shape(text)
    experts = shape.optional("num_local_experts", "n_routed_experts", "num_experts")
    sparse_layers = shape.layers - (shape.optional("first_k_dense_replace") if experts else shape.layers)
    dense = shape.head + shape.attention + (shape.layers - sparse_layers) * shape.feed_forward("intermediate_size")
    expert_parameters, shared = 0, 0
    if experts:
        width = shape.optional("moe_intermediate_size") or shape.required("intermediate_size")
        shared = shape.optional("n_shared_experts") * width + shape.optional("shared_expert_intermediate_size")
        dense += sparse_layers * (3 * shape.hidden * shared + shape.hidden * experts)
        expert_parameters = sparse_layers * experts * 3 * shape.hidden * width
    return Architecture(
        layers=shape.layers,
        hidden_size=shape.hidden,
        dense_parameters_billion=dense / 1e9,
        expert_parameters_billion=expert_parameters / 1e9,
        experts=experts,
        experts_per_token=shape.required("num_experts_per_tok", "experts_per_token") if experts else 0,
        shared_expert=shared > 0,
        dense_bits=dense_bits,
        expert_bits=dense_bits if expert_bits is None else expert_bits,
        attention_layers=shape.attention_layers,
        windowed_layers=shape.windowed_layers,
        window_tokens=shape.required("sliding_window") if shape.windowed_layers else 0,
        attended_tokens=shape.optional("index_topk") or None,
        key_value_heads=1 if shape.latent else shape.key_value_heads,
        kv_values_per_token=shape.kv_values,
        kv_bits=kv_bits,
        prefill_attention_width=shape.prefill_width,
        decode_attention_width=shape.decode_width,
        state_kib_per_request=shape.state_bytes / 1024,
    )


class _Shape:
    """The parts of one configuration, each computed where it is understood."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.layers = self.required("num_hidden_layers")
        self.hidden = self.required("hidden_size")
        self.heads = self.required("num_attention_heads")
        self.key_value_heads = self.optional("num_key_value_heads") or self.heads
        self.latent = "kv_lora_rank" in config
        self.head_size = self.optional("head_dim") or self.hidden // self.heads
        self.head = self.hidden * self.required("vocab_size")
        kinds = config.get("layer_types") or ["full_attention"] * self.layers
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention", "linear_attention"})
        if unknown or len(kinds) != self.layers:
            raise ConfigError(
                f"layer_types: got {unknown or len(kinds)}; accepted are num_hidden_layers ({self.layers}) of "
                "full_attention, sliding_attention, linear_attention"
            )
        self.windowed_layers = kinds.count("sliding_attention")
        self.linear_layers = kinds.count("linear_attention")
        self.attention_layers = self.layers - self.windowed_layers - self.linear_layers

    def required(self, *names: str) -> int:
        """The first of these fields that is there."""
        value = self.optional(*names)
        if not value:
            raise ConfigError(f"{' or '.join(names)}: required, a whole number of at least 1")
        return value

    def optional(self, *names: str) -> int:
        """The same, 0 where none is there."""
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}: got {value!r}; accepted is a whole number of at least 0")
            return value
        return 0

    def feed_forward(self, name: str) -> int:
        """Parameters of one gated feed-forward block; 0 where every layer has experts only."""
        return 3 * self.hidden * self.optional(name)

    @property
    def attention(self) -> int:
        """Parameters of all attention, linear layers included."""
        softmax = (self.layers - self.linear_layers) * self._attention_layer
        return softmax + (self.linear_layers * self._linear_layer if self.linear_layers else 0)

    @property
    def _attention_layer(self) -> int:
        if self.latent:
            rank, rope = self.required("kv_lora_rank"), self.required("qk_rope_head_dim")
            nope, value = self.required("qk_nope_head_dim"), self.required("v_head_dim")
            query = self.optional("q_lora_rank")
            into_heads = self.heads * (nope + rope)
            queries = self.hidden * query + query * into_heads if query else self.hidden * into_heads
            return queries + self.hidden * (rank + rope) + self.heads * (rank * (nope + value) + value * self.hidden)
        gate = self.heads if self._config.get("attn_output_gate") else 0
        return self.hidden * self.head_size * (2 * self.heads + 2 * self.key_value_heads + gate)

    @property
    def _linear_layer(self) -> int:
        key = self.required("linear_key_head_dim") * self.required("linear_num_key_heads")
        value = self.required("linear_value_head_dim") * self.required("linear_num_value_heads")
        return self.hidden * (2 * key + 3 * value)

    @property
    def state_bytes(self) -> int:
        """Recurrent state of one request, in 32-bit numbers."""
        if not self.linear_layers:
            return 0
        heads, value = self.required("linear_num_value_heads"), self.required("linear_value_head_dim")
        return 4 * self.linear_layers * heads * value * self.required("linear_key_head_dim")

    @property
    def kv_values(self) -> int:
        """Numbers that a token leaves in one layer's cache."""
        if self.latent:
            return self.required("kv_lora_rank") + self.required("qk_rope_head_dim")
        return 2 * self.key_value_heads * self.head_size

    @property
    def prefill_width(self) -> int:
        """Multiply-adds for a query and a token of context."""
        if self.latent:
            sizes = self.required("qk_nope_head_dim") + self.required("qk_rope_head_dim") + self.required("v_head_dim")
            return self.heads * sizes
        return 2 * self.heads * self.head_size

    @property
    def decode_width(self) -> int:
        """The same in decode: latent attention then works on the compressed cache itself."""
        if self.latent:
            return self.heads * (2 * self.required("kv_lora_rank") + self.required("qk_rope_head_dim"))
        return self.prefill_width
