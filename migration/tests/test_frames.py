"""What was sent is read, and nothing else is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.migration.frames import (
    CONTROL_HEADER_BYTES,
    DATA_HEADER_BYTES,
    MAC_BYTES,
    ControlFrame,
    ControlKind,
    ControlReader,
    ControlWriter,
    DataKind,
    FrameError,
    Header,
    TooLarge,
    Verifier,
    encode,
)

KEY = b"k" * 32
MOST_BYTES = 1000

control_frames = st.builds(
    ControlFrame, st.sampled_from(ControlKind), st.integers(0, 2**64 - 1), st.binary(max_size=100)
)
headers = st.builds(
    Header,
    kind=st.sampled_from(DataKind),
    rank=st.integers(0, 2**16 - 1),
    migration=st.binary(min_size=16, max_size=16),
    epoch=st.integers(0, 2**32 - 1),
    first_block=st.integers(0, 2**32 - 1),
    blocks=st.integers(0, 2**32 - 1),
)


def read(reader: ControlReader, sent: bytes) -> ControlFrame:
    header, rest = sent[:CONTROL_HEADER_BYTES], sent[CONTROL_HEADER_BYTES:]
    assert reader.rest(header) == len(rest)
    return reader.frame(header, rest)


def with_length(header: Header, payload: list[bytes]) -> Header:
    return Header(
        header.kind, header.rank, header.migration, header.epoch, header.first_block, header.blocks,
        sum(map(len, payload)),
    )  # fmt: skip


def read_data(sent: bytes, counter: int = 0) -> tuple[Header, bytes]:
    """As a receiver does: the header first, then a payload of the length it says, then the MAC over it."""
    header = Header.parse(sent[:DATA_HEADER_BYTES], KEY, counter)
    payload, mac = sent[DATA_HEADER_BYTES:][: header.length], sent[DATA_HEADER_BYTES + header.length :]
    if header.length:
        verifier = Verifier(KEY, counter, header)
        verifier.update(memoryview(payload))
        verifier.check(mac)
    return header, payload


@given(st.lists(control_frames, max_size=5))
def test_control_frames_are_read_as_they_were_written(frames: list[ControlFrame]) -> None:
    writer, reader = ControlWriter(KEY), ControlReader(KEY, MOST_BYTES)
    assert [read(reader, writer.frame(frame)) for frame in frames] == frames


@given(control_frames, st.data())
def test_a_changed_control_frame_is_refused(frame: ControlFrame, data: st.DataObject) -> None:
    sent = bytearray(ControlWriter(KEY).frame(frame))
    at = data.draw(st.integers(4, len(sent) - 1))
    sent[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameError, match="changed"):
        read(ControlReader(KEY, MOST_BYTES), bytes(sent))


def test_a_control_frame_said_twice_or_left_out_is_refused() -> None:
    writer = ControlWriter(KEY)
    first, second = (writer.frame(ControlFrame(ControlKind.ASK, number, b"{}")) for number in (1, 2))
    reader = ControlReader(KEY, MOST_BYTES)
    read(reader, first)
    with pytest.raises(FrameError):
        read(reader, first)
    with pytest.raises(FrameError):
        read(ControlReader(KEY, MOST_BYTES), second)


def test_a_frame_of_the_other_direction_is_refused() -> None:
    sent = ControlWriter(KEY).frame(ControlFrame(ControlKind.ASK, 1, b"{}"))
    with pytest.raises(FrameError):
        read(ControlReader(b"o" * 32, MOST_BYTES), sent)


def test_a_control_frame_beyond_the_limit_is_refused_before_it_is_read() -> None:
    sent = ControlWriter(KEY).frame(ControlFrame(ControlKind.ASK, 1, bytes(MOST_BYTES + 1)))
    with pytest.raises(TooLarge, match="1001 bytes; at most 1000") as refused:
        ControlReader(KEY, MOST_BYTES).rest(sent[:CONTROL_HEADER_BYTES])
    assert refused.value.number == 1


def test_a_control_frame_of_an_unknown_kind_is_refused() -> None:
    frame = ControlFrame(ControlKind.ASK, 1, b"{}")
    object.__setattr__(frame, "kind", 9)
    with pytest.raises(FrameError, match="kind 9; accepted are 1 to 3"):
        read(ControlReader(KEY, MOST_BYTES), ControlWriter(KEY).frame(frame))


@given(headers, st.lists(st.binary(min_size=1, max_size=50), max_size=4), st.integers(0, 2**32))
def test_data_frames_are_read_as_they_were_written(header: Header, payload: list[bytes], counter: int) -> None:
    header = with_length(header, payload)
    sent = encode(header, payload, KEY, counter)
    assert all(one is other for one, other in zip(sent[1:], payload, strict=False)), "a payload was copied"
    assert read_data(b"".join(sent), counter) == (header, b"".join(payload))


@given(headers, st.binary(max_size=50), st.data())
def test_a_changed_data_frame_is_refused(header: Header, payload: bytes, data: st.DataObject) -> None:
    header = with_length(header, [payload])
    sent = bytearray(b"".join(encode(header, [payload], KEY, 0)))
    at = data.draw(st.integers(0, len(sent) - 1))
    sent[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameError, match="changed"):
        read_data(bytes(sent))


def test_a_payload_under_the_header_of_another_frame_is_refused() -> None:
    first = Header(DataKind.BLOCKS, 0, bytes(16), 2, first_block=0, blocks=1, length=4)
    second = Header(DataKind.BLOCKS, 0, bytes(16), 2, first_block=1, blocks=1, length=4)
    header_of_second = encode(second, [b"2222"], KEY, 0)[0]
    with pytest.raises(FrameError, match="payload"):
        read_data(b"".join([header_of_second, *encode(first, [b"1111"], KEY, 0)[1:]]))


def test_a_data_frame_said_twice_is_refused() -> None:
    header = Header(DataKind.ENDED, 0, bytes(16), 2)
    sent = b"".join(encode(header, [], KEY, 0))
    assert len(sent) == DATA_HEADER_BYTES
    assert read_data(sent, 0)[0] == header
    with pytest.raises(FrameError, match="repeated"):
        read_data(sent, 1)


@pytest.mark.parametrize(("length", "message"), [(3, "1 bytes longer"), (5, "1 bytes shorter")])
def test_a_payload_of_another_length_than_the_header_says_is_not_sent(length: int, message: str) -> None:
    header = Header(DataKind.TAIL, 0, bytes(16), 2, length=length)
    with pytest.raises(FrameError, match=message):
        encode(header, [b"1234"], KEY, 0)


def test_a_payload_may_be_any_memory() -> None:
    floats = memoryview(bytearray(struct.pack("4f", 1, 2, 3, 4))).cast("f")
    header = Header(DataKind.BLOCKS, 0, bytes(16), 2, blocks=1, length=16)
    sent = encode(header, [floats], KEY, 0)
    assert sent[1] is floats
    assert len(sent[2]) == MAC_BYTES
    assert read_data(b"".join(map(bytes, sent)))[0] == header


def test_a_data_frame_of_an_unknown_kind_is_refused() -> None:
    header = Header(DataKind.ENDED, 0, bytes(16), 2)
    object.__setattr__(header, "kind", 8)
    with pytest.raises(FrameError, match="kind 8; accepted are 1 to 7"):
        read_data(header.pack(KEY, 0))
