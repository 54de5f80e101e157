"""The realised split follows the fractions at every prefix, whatever the fractions are."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.gateway.policy.split import CREDIT_LIMIT, Split

weights = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.floats(0.001, 1.0), min_size=1, max_size=8)


@given(weights, st.integers(1, 400))
def test_every_prefix_is_within_one_request_of_the_fractions(shares: dict[str, float], requests: int) -> None:
    split: Split[str] = Split()
    total = sum(shares.values())
    counts: Counter[str] = Counter()
    for n in range(1, requests + 1):
        counts[split.pick(shares)] += 1
        for option, share in shares.items():
            assert abs(counts[option] - n * share / total) <= 1.0 + 1e-6


@given(weights.filter(lambda w: len(w) > 1), st.data())
def test_an_option_that_returns_is_not_flooded_with_what_it_missed(
    shares: dict[str, float], data: st.DataObject
) -> None:
    away = data.draw(st.sampled_from(sorted(shares)))
    rest = {option: share for option, share in shares.items() if option != away}
    split: Split[str] = Split()
    for _ in range(200):
        assert split.pick(rest) != away
    share = shares[away] / sum(shares.values())
    taken = sum(split.pick(shares) == away for _ in range(50))
    assert taken <= 50 * share + CREDIT_LIMIT + 2


def test_what_is_taken_instead_is_charged_for_it() -> None:
    split: Split[str] = Split()
    for _ in range(2):
        assert split.pick({"a": 0.9, "b": 0.1}) == "a"
        split.instead("a", "b")
    assert split.credit("a") > 1.0 > -1.0 > split.credit("b")
    assert {split.pick({"a": 0.9, "b": 0.1}) for _ in range(20)} == {"a"}


def test_the_debt_of_passing_an_option_over_is_bounded() -> None:
    split: Split[str] = Split()
    for _ in range(1000):
        split.instead(split.pick({"a": 0.5, "b": 0.5}), "b")
    run = [split.pick({"a": 0.5, "b": 0.5}) for _ in range(20)]
    assert 10 <= run.count("a") <= 10 + 2 * CREDIT_LIMIT


def test_an_option_that_is_not_in_the_split_is_not_charged() -> None:
    split: Split[str] = Split()
    first = split.pick({"a": 0.5, "b": 0.5})
    before = split.credit(first)
    split.instead(first, "c")
    assert (split.credit(first), split.credit("c")) == (before, 0.0)


def test_forgetting_an_option_leaves_the_others_alone() -> None:
    split: Split[str] = Split()
    for _ in range(7):
        split.pick({"a": 0.6, "b": 0.4})
    split.forget(["a", "b"])
    remembered = [split.pick({"a": 0.6, "b": 0.4}) for _ in range(10)]
    assert abs(remembered.count("a") - 6) <= 1


def test_no_option_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one option"):
        Split[str]().pick({})
