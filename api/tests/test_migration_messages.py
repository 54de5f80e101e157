"""Messages of live migration: what is said is read, and what is no message is refused by field, value and limit."""

from __future__ import annotations

import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import DestinationPhase, Feature, Fingerprint, Reason, SourcePhase, TailFate
from llmfleet.api.document_schema import document_schema
from llmfleet.api.migration_messages import (
    MESSAGES,
    MOST_REQUESTS,
    AnyAnswer,
    AnyAsk,
    Cancel,
    Capabilities,
    Cause,
    Destination,
    DestinationStatus,
    EngineCapabilities,
    EngineLimits,
    Freeze,
    GetLoad,
    Journal,
    JournalEntry,
    ListRequests,
    Load,
    MessageError,
    Precopy,
    Prepare,
    Prepared,
    Refused,
    Release,
    RequestList,
    Resume,
    RunningRequest,
    SourceStatus,
    Status,
    Subscribe,
    Subscribed,
    Unsubscribe,
    parse_answer,
    parse_ask,
    parse_journal,
    to_payload,
)

MIGRATION, INSTANCE = "a" * 32, "b" * 32
FINGERPRINT = Fingerprint(
    vllm_version="0.32.0", model="tiny", model_hash="1234", dtype="bfloat16", kv_dtype="auto", block_size=32,
    layout="2x32x64", attention_backend="CPU_ATTN", instruction_set="avx512", tp=1,
)  # fmt: skip
DESTINATION = Destination(instance=INSTANCE, data=["10.0.0.1:7001", "[fd00::1]:7002"])
SUBJECT: dict[str, Any] = {"migration": MIGRATION, "epoch": 2}
ASKS: list[AnyAsk] = [
    Capabilities(),
    GetLoad(),
    ListRequests(request="r-1"),
    Prepare(**SUBJECT, fingerprint=FINGERPRINT, tokens=100, most_tokens=200, features=[Feature.SEED]),
    Precopy(**SUBJECT, request="r-1", destination=DESTINATION),
    Status(**SUBJECT, seen=3, wait_s=1),
    Freeze(**SUBJECT, wait_s=0.5),
    Release(**SUBJECT),
    Cancel(**SUBJECT, reason=Reason.LAGGING),
    Resume(**SUBJECT, tokens=[1, 2, 3]),
    Subscribe(requests=["r-1"]),
    Unsubscribe(requests=["r-1"]),
]
ANSWERS: list[AnyAnswer] = [
    EngineCapabilities(
        instance=INSTANCE, fingerprint=FINGERPRINT, transports=["tcp"], data=["engine-0.engines:7001"],
        limits=EngineLimits(lease_s=5, incoming=4, outgoing=4, incoming_tokens=10_000, incoming_kv_share=0.5),
    ),
    Load(
        blocks_total=100, blocks_free=50, blocks_reserved=10, blocks_held=5, running=3, waiting=0, step_ms=12.5,
        incoming=1, outgoing=0,
    ),
    RequestList(
        requests=[
            RunningRequest(
                request="r-1", prompt_tokens=10, output_tokens=5, most_tokens=100, blocks=1, features=[],
                refusal=Cause(reason=Reason.UNSUPPORTED, field="multimodal"),
            )
        ]
    ),
    Prepared(**SUBJECT, lease_s=5, destination=DESTINATION),
    SourceStatus(
        **SUBJECT, revision=1, phase=SourcePhase.HELD, full_blocks=3, sent_blocks=3, acknowledged_blocks=2,
        caught_up=True, tail=TailFate.TAKEN, output_tokens=7, bytes_sent=1000, stages=2,
    ),
    DestinationStatus(
        **SUBJECT, revision=1, phase=DestinationPhase.EXPIRED, blocks=2, parked=False, complete=False,
        reason=Reason.EXPIRED,
    ),
    Subscribed(requests=1),
    Refused(reason=Reason.INCOMPATIBLE, field="dtype", detail="dtype: bfloat16 here, float32 there"),
]  # fmt: skip


def said(message: AnyAsk, **changes: Any) -> bytes:
    return json.dumps(json.loads(to_payload(message)) | changes).encode()


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask.kind)
def test_an_ask_is_read_as_it_was_said(ask: AnyAsk) -> None:
    assert parse_ask(to_payload(ask)) == ask


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.kind)
def test_an_answer_is_read_as_it_was_said(answer: AnyAnswer) -> None:
    assert parse_answer(to_payload(answer)) == answer


def test_an_event_is_read_as_it_was_said() -> None:
    journal = Journal(entries=[JournalEntry(request="r-1", index=0, ids=[5, 6])], lagging=True)
    assert parse_journal(to_payload(journal)) == journal


def test_every_ask_and_answer_is_tried_here() -> None:
    assert {type(ask) for ask in ASKS} == set(AnyAsk.__args__)
    assert {type(answer) for answer in ANSWERS} == set(AnyAnswer.__args__)


def test_everything_that_is_said_has_the_published_schema() -> None:
    schema = document_schema(MESSAGES)
    for message in [*ASKS, *ANSWERS, Journal(entries=[])]:
        jsonschema.validate(message.to_wire(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"kind": "load", "version": 1, "more": 1}, schema)


@pytest.mark.parametrize(
    ("payload", "field", "detail"),
    [
        (b"", "", "Invalid JSON"),
        (b"\xff\xfe", "", "Invalid JSON"),
        (b"[]", "", "a list of 0"),
        (b'{"kind":"dance"}', "", "'capabilities', 'load', 'requests'"),
        (said(ASKS[3], epoch=-1), "prepare.epoch", "greater than or equal to 1, got -1"),
        (said(ASKS[3], epoch="2"), "prepare.epoch", "valid integer, got '2'"),
        (said(ASKS[3], migration="A" * 32), "prepare.migration", "should match pattern"),
        (said(ASKS[3], tokens=10**9), "prepare.tokens", "less than or equal to 4194304, got 1000000000"),
        (said(ASKS[3], features=["telepathy"]), "prepare.features.0", "'grammar'"),
        (said(ASKS[3], tooMuch=1), "prepare.tooMuch", "Extra inputs are not permitted, got 1"),
        (said(ASKS[4], request="two words"), "precopy.request", "should match pattern"),
        (said(ASKS[4], destination=None), "precopy.destination", "got None"),
        (said(ASKS[5], waitS=1e9), "status.waitS", "less than or equal to 30"),
        (said(ASKS[5], waitS=float("nan")), "status.waitS", "finite number"),
        (said(ASKS[9], tokens=[1, -5]), "resume.tokens.1", "greater than or equal to 0, got -5"),
        (said(ASKS[10], requests=["r"] * (MOST_REQUESTS + 1)), "subscribe.requests", "at most 4096 items"),
    ],
)
def test_what_is_no_ask_is_refused_by_field_value_and_what_is_accepted(payload: bytes, field: str, detail: str) -> None:
    with pytest.raises(MessageError) as error:
        parse_ask(payload)
    refused = error.value.refused
    assert (refused.reason, refused.field) == (Reason.MALFORMED, field)
    assert detail in refused.detail


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_version_is_told_from_a_bad_message(version: object) -> None:
    with pytest.raises(MessageError) as error:
        parse_ask(said(ASKS[3], version=version, somethingNew=1))
    refused = error.value.refused
    expected = Reason.MALFORMED if version is None else Reason.UNSUPPORTED_VERSION
    assert refused.reason is expected
    if version is not None:
        assert refused.detail == f"version: accepted is 1, got {version!r}"


def test_a_refusal_shows_no_list_of_tokens() -> None:
    with pytest.raises(MessageError) as error:
        parse_ask(said(ASKS[9], epoch=[31337, 31338]))
    assert "got a list of 2" in error.value.refused.detail
    assert "31337" not in str(error.value)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(MessageError):
        parse_ask(b'{"a":' * 100_000)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(
    lambda value: json.dumps(value).encode()
))  # fmt: skip
def test_what_is_no_ask_leads_to_a_refusal_that_can_be_sent(payload: bytes) -> None:
    with pytest.raises(MessageError) as error:
        parse_ask(payload)
    assert parse_answer(to_payload(error.value.refused)) == error.value.refused


def test_nothing_of_a_message_can_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ASKS[0].version = 1  # type: ignore[misc]
