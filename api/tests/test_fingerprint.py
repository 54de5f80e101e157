"""What differs between two engines decides whether KV, tokens or nothing of a request can go to the other."""

from __future__ import annotations

from typing import Any

import pytest

from llmfleet.api import Adapter, Compatibility, Fingerprint, compatibility, differences

HERE = Fingerprint(
    vllm_version="0.32.0", model="tiny", model_hash="1234", dtype="bfloat16", kv_dtype="auto", block_size=32,
    layout="2x32x64", attention_backend="CPU_ATTN", instruction_set="avx512", tp=1,
    lora=[Adapter(name="poet", digest="1"), Adapter(name="clerk", digest="2")],
)  # fmt: skip


def other(**changes: Any) -> Fingerprint:
    return Fingerprint.model_validate(HERE.model_dump() | changes)


def test_the_same_engine_differs_in_nothing() -> None:
    assert differences(HERE, other(), "poet") == ()
    assert compatibility(()) is Compatibility.COPY


@pytest.mark.parametrize(
    ("changes", "what_is_left"),
    [
        ({"vllm_version": "0.33.0"}, Compatibility.REPLAY),
        ({"dtype": "float32"}, Compatibility.REPLAY),
        ({"kv_dtype": "fp8"}, Compatibility.REPLAY),
        ({"block_size": 16}, Compatibility.REPLAY),
        ({"layout": "32x2x64"}, Compatibility.REPLAY),
        ({"attention_backend": "FLASH_ATTN"}, Compatibility.REPLAY),
        ({"instruction_set": "avx2"}, Compatibility.REPLAY),
        ({"tp": 2}, Compatibility.REPLAY),
        ({"model": "small"}, Compatibility.NEVER),
        ({"model_hash": "5678"}, Compatibility.NEVER),
        ({"quantization": "awq"}, Compatibility.NEVER),
    ],
)
def test_a_difference_is_named_and_judged(changes: dict[str, Any], what_is_left: Compatibility) -> None:
    differing = differences(HERE, other(**changes))
    assert differing == tuple(changes)
    assert compatibility(differing) is what_is_left


def test_every_field_of_the_fingerprint_is_tried_above() -> None:
    [mark] = [m for m in test_a_difference_is_named_and_judged.pytestmark if m.name == "parametrize"]
    assert {name for changes, _ in mark.args[1] for name in changes} | {"lora"} == set(Fingerprint.model_fields)


def test_what_makes_another_model_is_named_first() -> None:
    assert differences(HERE, other(vllm_version="0.33.0", quantization="awq"))[0] == "quantization"


def test_other_adapters_than_the_requests_own_do_not_count() -> None:
    only_clerk = other(lora=[Adapter(name="clerk", digest="2")])
    assert differences(HERE, only_clerk, "clerk") == ()
    assert differences(HERE, only_clerk) == ()
    assert differences(HERE, only_clerk, "poet") == ("lora",)
    assert compatibility(("lora",)) is Compatibility.NEVER


def test_an_adapter_of_the_same_name_with_other_weights_is_another_one() -> None:
    assert differences(HERE, other(lora=[Adapter(name="poet", digest="9")]), "poet") == ("lora",)


def test_an_adapter_that_nobody_knows_is_not_the_same() -> None:
    assert differences(HERE, HERE, "painter") == ("lora",)
