"""Latency that nobody measured, from published figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.placement.performance.architecture import ConfigError, architecture_of
from llmfleet.placement.performance.hardware import CATALOGUE, figures_of
from llmfleet.placement.performance.roofline import Roofline
from placement_testing.fleets import gpu_type
from placement_testing.shapes import LLAMA_8B

MIXTURE = LLAMA_8B | {"num_local_experts": 64, "num_experts_per_tok": 4, "intermediate_size": 2048}
LATENT = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def roofline(
    device: str = "h100-sxm", tensor_parallel: int = 1, config: Mapping[str, object] | None = None
) -> Roofline:
    return Roofline(architecture_of(config or LLAMA_8B), CATALOGUE[device], tensor_parallel)


variants = st.builds(
    roofline,
    device=st.sampled_from(sorted(CATALOGUE)),
    tensor_parallel=st.sampled_from([1, 2, 4, 8]),
    config=st.sampled_from([LLAMA_8B, MIXTURE]),
)
sizes = st.tuples(st.integers(1, 32_768), st.integers(1, 8_192))
requests = st.integers(1, 512)


@given(variants, sizes, requests)
def test_a_longer_context_or_a_larger_batch_never_speeds_up_a_step(
    variant: Roofline, size: tuple[int, int], n: int
) -> None:
    batch, context = np.array([float(n), n + 1.0, n]), np.array([float(size[0]), size[0], size[0] + 1.0])
    alone, more, longer = variant.step_ms(batch, context)
    assert more >= alone
    assert longer >= alone


@given(variants, sizes, requests, st.integers(1, 64))
def test_latency_never_falls_with_concurrency(variant: Roofline, size: tuple[int, int], n: int, more: int) -> None:
    found = variant.predict(*size, [n, n + more])
    assert found.tpot_ms[1] >= found.tpot_ms[0] * (1 - 1e-12)
    assert found.ttft_ms[1] >= found.ttft_ms[0] * (1 - 1e-12)


@given(variants, sizes, requests)
def test_tpot_never_falls_with_the_prompt_while_everything_fits(
    variant: Roofline, size: tuple[int, int], n: int
) -> None:
    longer = size[0] + 64.0
    if variant.places(np.array(longer + size[1])) < n:
        return  # fewer run at once then: what is left of them is faster, and the rest waits
    found = variant.predict([size[0], longer], size[1], n)
    assert found.tpot_ms[1] >= found.tpot_ms[0]


@pytest.mark.parametrize(
    "slower",
    [
        {"memory_gb_per_second": 0.5},
        {"tflops_16bit": 0.5},
        {"link_gb_per_second": 0.5},
    ],
)
@given(variant=variants, size=sizes, n=requests)
def test_half_of_a_figure_never_speeds_anything_up(
    slower: dict[str, float], variant: Roofline, size: tuple[int, int], n: int
) -> None:
    changed = {name: factor * getattr(variant.device, name) for name, factor in slower.items()}
    before = variant.predict(*size, n)
    after = replace(variant, device=replace(variant.device, **changed)).predict(*size, n)
    assert after.tpot_ms >= before.tpot_ms * (1 - 1e-12)
    assert after.ttft_ms >= before.ttft_ms * (1 - 1e-12)


@given(variants, st.integers(1, 32_768))
def test_no_step_is_faster_than_reading_the_dense_weights_once(variant: Roofline, context: int) -> None:
    parameters = variant.architecture.dense_parameters_billion * 1e9
    read_ms = 1e3 * 2 * parameters / variant.tensor_parallel / (variant.device.memory_gb_per_second * 1e9)
    assert variant.step_ms(np.array(1.0), np.array(float(context))) > read_ms


def test_a_batch_touches_more_experts_but_never_more_than_all() -> None:
    mixture = roofline(config=MIXTURE)
    dense_like = replace(mixture, architecture=mixture.architecture.model_copy(update={"experts_per_token": 64}))
    context = np.array(100.0)
    one, many, all_of_them = (
        mixture.step_ms(np.array(1.0), context),
        mixture.step_ms(np.array(16.0), context),
        dense_like.step_ms(np.array(1.0), context),
    )
    assert one < many
    assert one < all_of_them
    assert many < 2 * all_of_them


@given(st.sampled_from(sorted(CATALOGUE)), st.integers(2, 512), st.floats(0.1, 50.0))
def test_an_uneven_router_touches_fewer_experts_but_one_token_as_many_as_it_chooses(
    device: str, batch: int, evenness: float
) -> None:
    uneven = roofline(device, config=MIXTURE)
    uneven = replace(uneven, constants=replace(uneven.constants, expert_evenness=evenness))
    even = replace(uneven, constants=replace(uneven.constants, expert_evenness=1e9))
    batches, context = np.array([1.0, float(batch)]), np.full(2, 100.0)
    (one, many), (one_even, many_even) = uneven.step_ms(batches, context), even.step_ms(batches, context)
    assert one == pytest.approx(one_even, rel=1e-9)
    assert many < many_even


def test_an_expert_that_all_tokens_share_costs_its_launches_besides_its_weights() -> None:
    shared = architecture_of(LATENT)
    assert shared.shared_expert
    assert not architecture_of(LATENT | {"n_shared_experts": 0}).shared_expert
    one = Roofline(shared, CATALOGUE["b200"], 8)
    without = replace(one, architecture=shared.model_copy(update={"shared_expert": False}))
    saved_ms = one.step_ms(np.array(1.0), np.array(100.0)) - without.step_ms(np.array(1.0), np.array(100.0))
    assert saved_ms == pytest.approx(61 * 1e-3 * one.constants.expert_shared_us)


@pytest.mark.parametrize(
    ("device", "bits", "converts"),
    [("b200", 16, False), ("b200", 8, True), ("b200", 4.5, False), ("h100-sxm", 4.25, True), ("a100", 8, True)],
)
def test_experts_are_converted_but_in_16_bits_or_where_the_device_multiplies_4(
    device: str, bits: float, converts: bool
) -> None:
    shape = architecture_of(MIXTURE, expert_bits=bits)
    found = figures_of(gpu_type(device, 1.0))
    assert found is not None
    one = Roofline(shape, found)
    free = replace(one, constants=replace(one.constants, expert_conversion_us=0.0))
    saved_ms = one.step_ms(np.array(1.0), np.array(100.0)) - free.step_ms(np.array(1.0), np.array(100.0))
    assert saved_ms == pytest.approx(converts * 32 * 1e-3 * one.constants.expert_conversion_us, abs=1e-9)


def test_a_request_that_fits_no_device_waits_for_ever_and_one_too_many_waits_for_a_place() -> None:
    small = roofline("l4")
    fits = float(small.places(np.array(2048.0)))
    assert 1 < fits < 64
    within, beyond = small.predict(2048 - 64, 128, [max(1, int(fits)), int(fits) + 32]).ttft_ms
    assert beyond > 5 * within
    assert roofline("t4").predict(1024, 128, 1).ttft_ms == np.inf


def test_a_load_below_one_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"output_tokens has 0; accepted are finite numbers of at least 1"):
        roofline().predict(10, 0, 1)
    with pytest.raises(ValueError, match=r"concurrency has nan"):
        roofline().predict(10, 10, [1.0, float("nan")])


def test_an_architecture_counts_what_the_published_model_has() -> None:
    llama = architecture_of(LLAMA_8B)
    assert llama.dense_parameters_billion == pytest.approx(8.03 - 0.525, abs=0.01)
    assert (llama.kv_values_per_token, llama.key_value_heads) == (2048, 8)
    deepseek = architecture_of(LATENT, dense_bits=8)
    total = deepseek.dense_parameters_billion + deepseek.expert_parameters_billion
    assert total == pytest.approx(671 - 0.93, abs=1.0)
    assert (deepseek.kv_values_per_token, deepseek.key_value_heads, deepseek.expert_bits) == (576, 1, 8)
    assert deepseek.decode_attention_width > 3 * deepseek.prefill_attention_width


def test_windows_and_linear_layers_keep_no_full_context() -> None:
    kinds = ["sliding_attention", "full_attention"] * 16
    windowed = architecture_of(LLAMA_8B | {"layer_types": kinds, "sliding_window": 128})
    assert (windowed.attention_layers, windowed.windowed_layers, windowed.window_tokens) == (16, 16, 128)
    linear = {
        "layer_types": ["linear_attention", "full_attention"] * 16,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_value_head_dim": 128,
        "linear_num_value_heads": 32,
    }
    recurrent = architecture_of(LLAMA_8B | linear)
    assert recurrent.attention_layers == 16
    assert recurrent.state_kib_per_request == 16 * 32 * 128 * 128 * 4 / 1024


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"hidden_size": None}, "hidden_size: required, a whole number of at least 1"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers: got '32'"),
        ({"layer_types": ["mamba"] * 32}, r"layer_types: got \['mamba'\]"),
        ({"num_local_experts": 8}, "num_experts_per_tok or experts_per_token: required"),
    ],
)
def test_a_configuration_that_is_not_understood_names_the_field(broken: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture_of(LLAMA_8B | broken)


def test_no_figure_of_the_catalogue_is_the_one_with_sparsity() -> None:
    for device in CATALOGUE.values():
        if device.tflops_8bit is not None:
            assert 1.9 < device.tflops_8bit / device.tflops_16bit < 2.1, device.name
        assert device.source
    assert CATALOGUE["l4"].tflops_16bit == 121
    assert CATALOGUE["h100-sxm"].tflops_16bit == 989


def test_weights_are_computed_with_at_the_width_the_device_has() -> None:
    assert CATALOGUE["h100-sxm"].tflops(8) == 1979
    assert CATALOGUE["a100-sxm-80gb"].tflops(4.5) == 312
    assert CATALOGUE["b200"].tflops(4.5) == 9000
    assert CATALOGUE["b200"].tflops(16) == 2250


def test_a_gpu_type_is_known_by_its_own_figures_else_by_its_name() -> None:
    known = figures_of(gpu_type("h100-sxm-spot", 1.0))
    assert known is not None
    assert known.memory_gb_per_second == 3350
    assert figures_of(gpu_type("cpu-small", 1.0)) is None
    own = gpu_type("h100-sxm", 1.0, hardware={"memoryBandwidthGbPerSecond": 100, "denseTflops": 2})
    found = figures_of(own)
    assert found is not None
    assert (found.memory_gb_per_second, found.tflops(8), found.link_gb_per_second) == (100, 2, 450)


def test_memory_is_what_the_gpu_type_says_and_the_catalogues_is_what_drivers_report() -> None:
    """An H100 of 80 "GB" has 85.5 * 10^9 bytes."""
    assert CATALOGUE["h100-sxm"].memory_gb == pytest.approx(81559 * 2**20 / 1e9, rel=1e-3)
    assert CATALOGUE["l4"].memory_gb == pytest.approx(23034 * 2**20 / 1e9, rel=1e-3)
    found = figures_of(gpu_type("h100-sxm-slice", 1.0, memory_gib=40))
    assert found is not None
    assert found.memory_gb == pytest.approx(42.95, rel=1e-3)
    assert found.memory_gb_per_second == 3350
