"""API keys: what an entry of a Secret opens, and that a bad one harms nobody and shows nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_testing.tables import table
from llmfleet.gateway.discovery.keys import read_keys
from llmfleet.gateway.fleet import Service
from llmfleet.gateway.keys import EVERYBODY, ApiKey, KeyRing, Priority, key_digest

SECRET = "sk-0123456789-do-not-show"


def entries(**values: str | dict[str, Any]) -> dict[str, str]:
    """`data` of a Secret."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}


def opened(ring: KeyRing, key: str) -> ApiKey | None:
    return ring.find(key_digest(key.encode()))


def test_a_plain_value_is_a_key_with_the_default_rights() -> None:
    ring, complaints = read_keys(entries(a="one\n", b=" two "))
    assert (opened(ring, "one"), opened(ring, "two")) == (ApiKey("a"), ApiKey("b"))
    assert [opened(ring, key) for key in ("a", "", "one\n")] == [None, None, None]
    assert complaints == []


@pytest.mark.parametrize(
    "entry",
    [
        {
            "key": SECRET,
            "models": ["m"],
            "requestsPerSecond": 2,
            "tokensPerMinute": 600.5,
            "concurrentRequests": 7,
            "maxPriority": "high",
            "decisions": True,
        },
        f"key: {SECRET}\nmodels: [m]\nrequestsPerSecond: 2\ntokensPerMinute: 600.5\n"
        "concurrentRequests: 7\nmaxPriority: high\ndecisions: true",
        f"sha256: {hashlib.sha256(SECRET.encode()).hexdigest()}\nmodels:\n- m\nrequestsPerSecond: 2.0\n"
        "tokensPerMinute: 600.5\nconcurrentRequests: 7\nmaxPriority: high\ndecisions: true\n",
    ],
    ids=["json", "yaml", "hashed"],
)
def test_an_object_says_what_its_key_may_do(entry: str | dict[str, Any]) -> None:
    ring, complaints = read_keys(entries(gold=entry))
    assert opened(ring, SECRET) == ApiKey(
        tenant="gold",
        models=frozenset({"m"}),
        requests_per_second=2.0,
        tokens_per_minute=600.5,
        concurrent_requests=7,
        max_priority=Priority.HIGH,
        decisions=True,
    )
    assert complaints == []


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("", "is empty"),
        (f"{SECRET} {SECRET}", "neither a key without white space nor an object"),
        (f"{{{SECRET}", "neither a key without white space nor an object"),
        ({"models": ["m"]}, "must have either key or sha256"),
        ({"key": SECRET, "sha256": "0" * 64}, "must have either key or sha256"),
        ({"sha256": SECRET}, "sha256: String should match pattern"),
        ({"key": f"{SECRET} x"}, "key: String should match pattern"),
        ("key: 12345\nmodels: [m]", "must have key as text: put it in quotes"),
        ({"key": SECRET, "requestsPerSecond": 0}, "requestsPerSecond: Input should be greater than 0, got 0"),
        (
            {"key": SECRET, "concurrentRequests": 0},
            "concurrentRequests: Input should be greater than or equal to 1, got 0",
        ),
        ({"key": SECRET, "tokensPerMinute": "many"}, "tokensPerMinute: Input should be a valid number"),
        ({"key": SECRET, "maxPriority": "urgent"}, "maxPriority: Input should be 'high', 'standard' or 'batch'"),
        ({"key": SECRET, "models": []}, "models: List should have at least 1 item"),
        ({"key": SECRET, "rate": 3}, "accepted are key, sha256, models, requestsPerSecond, tokensPerMinute"),
        ({SECRET: "x"}, "has a field that is not known"),
    ],
)
def test_a_bad_entry_opens_nothing_shows_nothing_and_leaves_the_others(entry: str | dict[str, Any], says: str) -> None:
    ring, [complaint] = read_keys(entries(bad=entry, good="other"))
    assert (len(ring), opened(ring, "other")) == (1, ApiKey("good"))
    assert complaint.startswith("entry 'bad' ")
    assert says in complaint
    assert SECRET not in complaint


def test_what_is_not_base64_of_text_is_left_out() -> None:
    binary = base64.b64encode(b"\xff\xfe").decode()
    ring, complaints = read_keys({"a": "%", "b": binary} | entries(c="one"))
    assert (len(ring), len(complaints)) == (1, 2)


def test_of_two_entries_with_one_key_the_first_counts_and_the_second_is_named() -> None:
    ring, [complaint] = read_keys(entries(b={"key": "one", "maxPriority": "high"}, a="one"))
    assert opened(ring, "one") == ApiKey("a")
    assert "'b'" in complaint


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=80), max_size=4))
def test_whatever_a_secret_holds_each_entry_opens_one_key_or_is_complained_about(data: dict[str, str]) -> None:
    for given_data in (data, entries(**data)):
        ring, complaints = read_keys(given_data)
        assert len(ring) + len(complaints) == len(given_data)


def test_a_key_opens_only_the_models_that_it_names() -> None:
    ring, _ = read_keys(entries(a={"key": "one", "models": ["m"]}, b={"key": "two", "models": ["other"]}))
    service = Service(table(), (), ring)
    assert [service.rights(key_digest(key), "m") for key in (b"one", b"two", None)] == [opened(ring, "one"), None, None]
    assert Service(table(), (), KeyRing()).rights(key_digest(b"one"), "m") is None
    assert Service(table(), ()).rights(None, "m") is EVERYBODY


def test_the_ring_holds_no_key() -> None:
    ring, _ = read_keys(entries(a=SECRET))
    assert SECRET not in repr(ring._keys)
