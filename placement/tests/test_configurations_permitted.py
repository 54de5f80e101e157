"""Which ways to run a model a service may be given, and what their variants are called."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.api import LLMService, ModelProfile
from llmfleet.placement.configurations import LONGEST_NAME, VariantKey, permitted, variant_name
from placement_testing.fleets import corners, point, profile, service

POINTS = [point(corner, 1.0) for corner in corners((512, 4096), (128,))]
FP8: dict[str, Any] = {"name": "fp8", "quantization": "fp8", "weightsGib": 5}
ELSEWHERE: dict[str, Any] = {"name": "awq", "model": "org/model-awq", "weightsGib": 3}


def of(*configurations: dict[str, Any]) -> ModelProfile:
    return profile({"l4": POINTS}, configurations=list(configurations))


def test_only_what_the_service_names_is_permitted() -> None:
    assert list(permitted(service(), of(FP8, ELSEWHERE))[0]) == ["default"]
    found, refused = permitted(service(configurations=["fp8"]), of(FP8, ELSEWHERE))
    assert {name: view.spec.weights_gib for name, view in found.items()} == {"fp8": 5}
    assert refused == {}


def test_one_that_the_profile_does_not_have_is_said_with_those_that_it_has() -> None:
    found, refused = permitted(service(configurations=["fp9", "default"]), of(FP8))
    assert list(found) == ["default"]
    assert refused["fp9"].endswith("names fp9, which ModelProfile team/p does not have; it has default, fp8")


def test_a_fine_tuned_model_is_not_answered_by_its_base_model_s_other_weights() -> None:
    def tuned(model: str) -> LLMService:
        both = ["fp8", "awq"]
        return service(model={"name": model, "contextLength": 8192}, configurations=both)

    assert list(permitted(tuned("org/model"), of(FP8, ELSEWHERE))[0]) == ["fp8", "awq"]
    found, refused = permitted(tuned("org/tuned"), of(FP8, ELSEWHERE))
    assert list(found) == ["fp8"]
    assert "has other weights of org/model, but spec.model.name of team/s is org/tuned" in refused["awq"]


def test_a_service_that_sets_the_option_itself_is_not_given_the_configuration() -> None:
    own = service(configurations=["default", "fp8", "awq"], engine={"args": ["--quant=awq"]})
    found, refused = permitted(own, of(FP8, ELSEWHERE))
    assert list(found) == ["default", "awq"]
    assert "has --quant=awq, which configuration fp8" in refused["fp8"]


def test_ordinary_names_say_what_is_not_plain() -> None:
    assert variant_name(VariantKey("l4", 1)) == "l4"
    assert variant_name(VariantKey("l4", 2)) == "l4-tp2"
    assert variant_name(VariantKey("h100-sxm", 4, 2, "fp8")) == "h100-sxm-tp4-pp2-fp8"


KEYS = st.builds(
    VariantKey,
    st.from_regex(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True),
    st.integers(1, 64),
    st.integers(1, 64),
    st.from_regex(r"[a-z]([-a-z0-9]{0,18}[a-z0-9])?", fullmatch=True),
)


@settings(deadline=None)
@given(KEYS, KEYS)
def test_names_are_labels_and_those_of_one_type_stay_apart(one: VariantKey, other: VariantKey) -> None:
    name = variant_name(one)
    assert len(name) <= LONGEST_NAME
    assert name.strip("-") == name
    other = other._replace(gpu_type=one.gpu_type)
    plain = all(not key.configuration.startswith(("tp", "pp")) for key in (one, other))
    if plain and one != other:
        assert name != variant_name(other)
