"""Trace files: three forms, and an error for whatever does not say when and how large."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.placement.workload import Request, TraceError, requests_of

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
OWN = "arrival_s,input_tokens,output_tokens\n"


def read(text: str) -> list[Request]:
    return list(requests_of(text.splitlines(keepends=True), "t"))


def test_an_azure_trace_has_dates_with_seven_decimals() -> None:
    first, second = read(AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    assert (first.input_tokens, first.output_tokens) == (374, 44)
    assert second.at_s - first.at_s == pytest.approx(4.314579, abs=1e-5)


def test_an_azure_trace_of_2024_has_dates_with_a_zone() -> None:
    first, second = read(AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 02:00:01.009930+02:00,9,5\n")
    assert second.at_s - first.at_s == pytest.approx(1.0, abs=1e-5)


def test_a_mooncake_trace_has_milliseconds_and_keys_that_are_ignored() -> None:
    text = (
        '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
        '\n{"timestamp": 2500, "input_length": 7322, "output_length": 490, "hash_ids": []}\n'
    )
    assert read(text) == [Request(0.0, 6758, 500), Request(2.5, 7322, 490)]


def test_our_own_form_has_seconds_and_columns_that_are_ignored_in_any_order() -> None:
    text = "output_tokens, user,arrival_s,input_tokens\r\n2,a,0.5,10\r\n1,b,0.5,11\r\n\r\n3,c,7,12"
    assert read(text) == [Request(0.5, 10, 2), Request(0.5, 11, 1), Request(7.0, 12, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t: line 1: got ''; accepted are the columns TIMESTAMP,ContextTokens,GeneratedTokens or arrival_s,"),
        ("when,in,out\n1,2,3\n", "t: line 1: got 'when,in,out'; accepted are the columns TIMESTAMP"),
        ("arrival_s,input_tokens\n1,2\n", "t: line 1: no column output_tokens; accepted are arrival_s, input_tokens"),
        ("TIMESTAMP,ContextTokens\n1,2\n", "t: line 1: no column GeneratedTokens; accepted are TIMESTAMP"),
        (OWN, "t: no rows; accepted is at least one request"),
        (OWN + "1,2,3\nnan,2,3\n", "t: line 3: arrival_s: got 'nan'; accepted is a number of seconds from 0"),
        (OWN + "-1,2,3\n", "t: line 2: arrival_s: got '-1'"),
        (OWN + "1,2,3\n\n0.5,2,3\n", "t: line 4: arrival_s: got '0.5', 0.5 s before the row above it"),
        (OWN + "1,2.5,3\n", "t: line 2: input_tokens: got '2.5'; accepted are whole numbers from 1 to 16777216"),
        (OWN + "1,2,0\n", "t: line 2: output_tokens: got '0'"),
        (OWN + "1,2,16777217\n", "t: line 2: output_tokens: got '16777217'"),
        (OWN + f"1,2,{'9' * 5000}\n", "t: line 2: output_tokens: got '999"),
        (OWN + "1,2\n", "t: line 2: output_tokens: got nothing"),
        (OWN + f"1,2,{'9' * 200_000}\n", "t: line 2: not CSV: field larger than field limit"),
        (AZURE + "16 Nov,2,3\n", "t: line 2: TIMESTAMP: got '16 Nov'; accepted is a time such as 2023-11-16 18:15:46"),
        (AZURE + "2023-11-16 18:15:46,-4,3\n", "t: line 2: ContextTokens: got '-4'"),
        ('{"timestamp": 0, "input_length": 1}\n', "t: line 1: output_length: got nothing"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 2.5}\n', "t: line 1: output_length: got 2.5"),
        ('{"timestamp": 0, "input_length": true, "output_length": 2}\n', "t: line 1: input_length: got True"),
        ('{"timestamp": "0", "input_length": 1, "output_length": 2}\n', "t: line 1: timestamp: got '0'; accepted is a"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 2}\n', "t: line 1: timestamp: got nan"),
        (
            '{"timestamp": 0, "input_length": 1, "output_length": 2}\n[1]\n',
            "t: line 2: got [1]; accepted is a JSON",
        ),
        (
            '{"timestamp": 0, "input_length": 1, "output_length": 2}\n{"ti\n',
            "t: line 2: got '{\"ti'; accepted is a JSON",
        ),
    ],
)
def test_what_cannot_be_used_is_named(text: str, message: str) -> None:
    with pytest.raises(TraceError, match=re.escape(message)):
        read(text)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), st.integers(1, 16_777_216), st.integers(1, 16_777_216)),
        min_size=1,
        max_size=8,
    ).map(lambda rows: sorted(rows, key=lambda row: row[0]))
)
def test_the_same_requests_are_read_from_every_form(rows: list[tuple[int, int, int]]) -> None:
    begin = datetime(2023, 11, 16, tzinfo=UTC)
    forms = [
        OWN + "".join(f"{ms / 1000},{i},{o}\n" for ms, i, o in rows),
        AZURE + "".join(f"{begin + timedelta(milliseconds=ms)},{i},{o}\n" for ms, i, o in rows),
        "".join(f'{{"timestamp":{ms},"input_length":{i},"output_length":{o}}}\n' for ms, i, o in rows),
    ]
    for text in forms:
        found = read(text)
        assert [(one.input_tokens, one.output_tokens) for one in found] == [row[1:] for row in rows]
        gaps_s = [(one.at_s - found[0].at_s) for one in found]
        assert gaps_s == pytest.approx([(row[0] - rows[0][0]) / 1000 for row in rows], abs=1e-5)
