"""A stream that comes from several engines is one answer, wherever it was cut and however its bytes arrive."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.gateway.moving.recorder import Recorder
from llmfleet.gateway.moving.told import Told
from llmfleet.gateway.transport.splice import SplicedTap

FORMS = ("text", "content", "arguments", "reasoning", "logprobs", "token_ids")


def choice(form: str, piece: str, place: int) -> dict[str, Any]:
    match form:
        case "text":
            return {"index": 0, "text": piece, "logprobs": None}
        case "arguments":
            call: dict[str, Any] = {"index": 0, "function": {"arguments": piece}}
            if place == 0:
                call |= {"id": f"call-{id(piece)}", "type": "function"}
                call["function"]["name"] = "measure"
            return {"index": 0, "delta": {"tool_calls": [call]}, "logprobs": None}
        case "logprobs":
            logprobs = {"content": [{"token": c, "logprob": -0.5 * place} for c in piece]}
            return {"index": 0, "delta": {"content": piece}, "logprobs": logprobs}
        case "token_ids":
            return {"index": 0, "text": piece, "token_ids": [ord(c) for c in piece]}
    return {"index": 0, "delta": {form: piece}, "logprobs": None}


class Leg:
    """An engine's answer: one event for each piece, with the role before them and finish, usage and [DONE] behind."""

    def __init__(self, number: int, form: str, pieces: Sequence[str], *, compact: bool = True, escape: bool = False):
        self.base = {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion.chunk",
            "created": 100 + number,
            "model": "m",
        }
        self.form, self.pieces = form, pieces
        self.separators = (",", ":") if compact else (", ", ": ")
        self.escape = escape

    def event(self, **document: Any) -> bytes:
        said = json.dumps(self.base | document, separators=self.separators, ensure_ascii=self.escape)
        return f"data: {said}\n\n".encode()

    def events(self) -> list[bytes]:
        said = []
        if self.form not in ("text", "token_ids"):
            delta = {"role": "assistant", "content": ""}
            said.append(self.event(choices=[{"index": 0, "delta": delta, "finish_reason": None}]))
        for place, piece in enumerate(self.pieces):
            end = "length" if place == len(self.pieces) - 1 else None
            said.append(self.event(choices=[choice(self.form, piece, place) | {"finish_reason": end}]))
        said.append(self.event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": len(self.pieces)}))
        return [*said, b"data: [DONE]\n\n"]


def documents(stream: bytes) -> Iterator[dict[str, Any]]:
    *events, rest = stream.split(b"\n\n")
    assert rest == b"", "a client never sees half an event"
    assert events.count(b"data: [DONE]") == 1
    assert events[-1] == b"data: [DONE]"
    for event in events[:-1]:
        yield json.loads(event.removeprefix(b"data: "))


def answer_of(stream: bytes) -> tuple[Told, dict[str, int], list[Any]]:
    """All that was said; how often roles and finish reasons were; what events say of themselves."""
    said = Told()
    times = {"role": 0, "finish_reason": 0, "name": 0, "usage": 0}
    identities: list[Any] = []
    for document in documents(stream):
        said.add(document)
        times["usage"] += document.get("usage") is not None
        identities.append((document["id"], document["created"]))
        for one in document["choices"]:
            times["role"] += "role" in one.get("delta", {})
            times["finish_reason"] += one.get("finish_reason") is not None
            for call in one.get("delta", {}).get("tool_calls", ()):
                times["name"] += "name" in call["function"]
    return said, times, identities


def text_of(chance: random.Random) -> str:
    return "".join(chance.choices('ab "\\\n\t,:{}[]éß€漢😀', k=chance.randrange(1, 120)))


def pieces_of(text: str, chance: random.Random) -> list[str]:
    edges = [0, *sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(40))), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def reads_of(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """The bytes in reads that end anywhere, or mostly with an event, as engines' do."""
    at = 0
    while at < len(data):
        whole = data.find(b"\n\n", at) + 2
        end = whole if chance.random() < 0.8 and whole > 1 else min(len(data), at + chance.randrange(1, 400))
        yield data[at:end]
        at = end


SEEDS = st.integers(0, 2**32).map(random.Random)


@given(SEEDS, st.sampled_from(FORMS))
def test_a_stream_that_does_not_move_passes_byte_for_byte(chance: random.Random, form: str) -> None:
    data = b"".join(Leg(1, form, pieces_of(text_of(chance), chance)).events())
    tap = SplicedTap(strip_usage=False)
    assert b"".join(tap.feed(read) for read in reads_of(data, chance)) + tap.end() == data
    assert tap.done
    assert tap.usage is not None


@given(SEEDS, st.sampled_from(FORMS), st.booleans(), st.booleans(), st.integers(1, 3))
def test_what_moves_is_one_answer_wherever_it_was_cut(
    chance: random.Random, form: str, compact: bool, escape: bool, moves: int
) -> None:
    text = text_of(chance)
    legs = [Leg(n, form, pieces_of(text, chance), compact=compact, escape=escape) for n in range(moves + 1)]
    expected, times, identities = answer_of(b"".join(legs[0].events()))
    tap = SplicedTap(strip_usage=False)
    got = b""
    for leg in legs[:-1]:
        events = leg.events()
        told = chance.randrange(1, max(2, len(events) - 1))
        half = events[told][: chance.randrange(len(events[told]))]
        for read in reads_of(b"".join(events[:told]) + half, chance):
            got += tap.feed(read)
        got += tap.next_leg(keep_texts=True)
    for read in reads_of(b"".join(legs[-1].events()), chance):
        got += tap.feed(read)
    got += tap.end()
    assert tap.failed is None
    said, counted, identity = answer_of(got)
    assert (said.texts, said.lists) == (expected.texts, expected.lists)
    assert counted == times
    assert set(identity) == set(identities)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep_texts", [True, False])
def test_the_end_that_a_cut_looks_like_is_not_told(form: str, keep_texts: bool) -> None:
    pieces = [f"p{number} " for number in range(30)]
    expected, times, _ = answer_of(b"".join(Leg(1, form, pieces).events()))
    tap = SplicedTap(strip_usage=False)
    tap.guard()
    got = b"".join(map(tap.feed, Leg(1, form, pieces[:12]).events()))
    assert b'"length"' not in got
    assert b"[DONE]" not in got
    got += tap.next_leg(keep_texts=keep_texts)
    assert (b"p11" in got) == keep_texts
    got += b"".join(map(tap.feed, Leg(2, form, pieces).events()))
    said, counted, _ = answer_of(got)
    assert (said.texts, said.lists, counted) == (expected.texts, expected.lists, times)


def test_an_end_that_was_no_cut_is_told_once_that_is_known() -> None:
    data = Leg(1, "content", ["a", "b", "c"]).events()
    tap = SplicedTap(strip_usage=False)
    tap.guard()
    before = b"".join(map(tap.feed, data))
    assert before == b"".join(data[:3])
    assert before + tap.thaw() == b"".join(data)
    assert tap.done


def test_usage_that_the_client_did_not_ask_for_is_taken_out_of_the_last_leg_too() -> None:
    pieces = [f"{number}" for number in range(20)]
    tap = SplicedTap(strip_usage=True)
    got = b"".join(map(tap.feed, Leg(1, "text", pieces).events()[:7]))
    got += tap.next_leg(keep_texts=True)
    got += b"".join(map(tap.feed, Leg(2, "text", pieces).events()))
    said, counted, _ = answer_of(got)
    assert said.texts == {(0, "text"): "".join(pieces)}
    assert counted["usage"] == 0
    assert tap.usage is not None


def test_a_leg_that_repeats_another_text_is_no_continuation() -> None:
    tap = SplicedTap(strip_usage=False)
    for event in Leg(1, "content", ["one", "two", "three"]).events()[:3]:
        tap.feed(event)
    tap.next_leg(keep_texts=True)
    got = b"".join(map(tap.feed, Leg(2, "content", ["on", "e?", "tree"]).events()))
    assert got == b""
    assert tap.parted
    assert tap.failed == "repeated another 0/content than was told"


def test_an_error_that_an_engine_reports_in_its_stream_is_a_failure_of_the_engine() -> None:
    tap = SplicedTap(strip_usage=False)
    first, second, *_ = Leg(1, "text", ["a", "b", "c"]).events()
    error = b'data: {"error":{"message":"EngineCore died","code":500}}\n\ndata: [DONE]\n\n'
    assert tap.feed(first + second + error) == first + second
    assert tap.failed is not None
    assert "EngineCore died" in tap.failed


@given(SEEDS, st.integers(1, 5))
def test_the_form_of_a_long_stream_is_learnt(chance: random.Random, at_once: int) -> None:
    pieces = ["".join(chance.choices('ab"\\é😀', k=3)) for _ in range(60)]
    events = Leg(1, "content", pieces).events()[:-3]
    recorder, told = Recorder(), Told()
    for start in range(0, len(events), at_once):
        read = b"".join(events[start : start + at_once])
        taken = recorder.take(read)
        if start > 4 * at_once:
            assert taken == read.count(b"\n\n")
        elif not taken:
            recorder.keep(read, told)
    recorder.settle(told)
    assert told.texts == {(0, "content"): "".join(pieces[:-1])}
