"""What the gateway expects of a request follows what earlier requests have shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_testing.tables import BUCKETS
from llmfleet.gateway.policy.sizes import INITIAL_BYTES_PER_TOKEN, RequestShape, SizeModel, Usage


def test_bytes_per_token_are_learnt_from_usage() -> None:
    sizes = SizeModel(BUCKETS)
    assert sizes.prompt_tokens(RequestShape(400)) == 400 / INITIAL_BYTES_PER_TOKEN
    for _ in range(1000):
        sizes.learn(RequestShape(300), Usage(100, 5))
    assert sizes.bytes_per_token == pytest.approx(3.0, rel=0.01)


def test_a_prompt_of_token_ids_is_not_estimated() -> None:
    sizes = SizeModel(BUCKETS)
    assert sizes.predict(RequestShape(0, prompt_tokens=777)).prompt_tokens == 777
    sizes.learn(RequestShape(0, prompt_tokens=777), Usage(777, 5))
    assert sizes.bytes_per_token == INITIAL_BYTES_PER_TOKEN


def test_the_clients_bound_limits_the_expected_answer() -> None:
    sizes = SizeModel(BUCKETS)
    for _ in range(100):
        sizes.learn(RequestShape(40), Usage(10, 90))
    assert sizes.predict(RequestShape(40)).output_tokens == 100
    assert sizes.predict(RequestShape(40, max_output_tokens=7)).output_tokens == 7


def test_what_one_input_bucket_shows_does_not_change_another() -> None:
    sizes = SizeModel(BUCKETS)
    for _ in range(100):
        sizes.learn(RequestShape(40), Usage(10, 3))
        sizes.learn(RequestShape(2000), Usage(500, 90))
    assert sizes.predict(RequestShape(0, prompt_tokens=10)).output_tokens == 10
    assert sizes.predict(RequestShape(0, prompt_tokens=500)).output_tokens == 100


@given(st.integers(1, 9))
def test_predictions_occur_as_often_as_what_was_seen(short_of_ten: int) -> None:
    sizes = SizeModel(BUCKETS)
    for round_ in range(2000):
        sizes.learn(RequestShape(40), Usage(10, 5 if round_ % 10 < short_of_ten else 50))
    predicted = [sizes.predict(RequestShape(40)).output_tokens for _ in range(100)]
    assert predicted.count(10) == pytest.approx(10 * short_of_ten, abs=4)


def test_several_answers_to_one_prompt_count_each_by_its_own_length() -> None:
    sizes = SizeModel(BUCKETS)
    for _ in range(100):
        sizes.learn(RequestShape(40, sequences=10), Usage(10, 50))
    assert sizes.predict(RequestShape(40)).output_tokens == 10
