"""Two peers agree on keys only when both have the shared one, and nobody can make use of what they said."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Reason
from llmfleet.migration.handshake import (
    CONTROL,
    HELLO_BYTES,
    PROOF_BYTES,
    REPLY_BYTES,
    HandshakeError,
    Initiator,
    PeerKeyError,
    Responder,
    Session,
    read_peer_key,
)

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def shake(initiator: Initiator, responder: Responder) -> tuple[Session, Session]:
    reply = responder.reply(initiator.hello)
    proof, here = initiator.finish(reply)
    assert (len(initiator.hello), len(reply), len(proof)) == (HELLO_BYTES, REPLY_BYTES, PROOF_BYTES)
    return here, responder.finish(proof)


def test_both_sides_end_with_the_same_two_keys_the_other_way_round() -> None:
    here, there = shake(Initiator(KEY, CONTROL), Responder(KEY, CONTROL))
    assert (here.send_key, here.receive_key) == (there.receive_key, there.send_key)
    assert here.send_key != here.receive_key
    assert here.version == there.version == 1


def test_every_connection_has_keys_of_its_own() -> None:
    first, _ = shake(Initiator(KEY, 0), Responder(KEY, 0))
    second, _ = shake(Initiator(KEY, 0), Responder(KEY, 0))
    assert len({first.send_key, first.receive_key, second.send_key, second.receive_key}) == 4


def test_the_initiator_refuses_a_responder_with_another_key() -> None:
    initiator = Initiator(KEY, CONTROL)
    with pytest.raises(HandshakeError, match="another key") as refused:
        initiator.finish(Responder(OTHER_KEY, CONTROL).reply(initiator.hello))
    assert refused.value.reason is Reason.UNAUTHORIZED


def test_the_responder_refuses_an_initiator_with_another_key() -> None:
    responder = Responder(KEY, CONTROL)
    imposter = Initiator(OTHER_KEY, CONTROL)
    responder.reply(imposter.hello)
    accomplice = Responder(OTHER_KEY, CONTROL)
    proof, _ = imposter.finish(accomplice.reply(imposter.hello))
    with pytest.raises(HandshakeError, match="another key"):
        responder.finish(proof)


def test_a_recorded_initiator_is_refused() -> None:
    recorded = Initiator(KEY, CONTROL)
    proof, _ = recorded.finish(Responder(KEY, CONTROL).reply(recorded.hello))
    later = Responder(KEY, CONTROL)
    later.reply(recorded.hello)
    with pytest.raises(HandshakeError, match="another key"):
        later.finish(proof)


def test_a_recorded_responder_is_refused() -> None:
    first = Initiator(KEY, CONTROL)
    recorded = Responder(KEY, CONTROL).reply(first.hello)
    with pytest.raises(HandshakeError, match="another key"):
        Initiator(KEY, CONTROL).finish(recorded)


def test_a_proof_sent_back_to_its_maker_is_refused() -> None:
    responder = Responder(KEY, CONTROL)
    reply = responder.reply(Initiator(KEY, CONTROL).hello)
    with pytest.raises(HandshakeError, match="another key"):
        responder.finish(reply[-PROOF_BYTES:])


def test_a_hello_for_another_port_is_answered_without_a_proof() -> None:
    control, rank_0 = Initiator(KEY, CONTROL), Responder(KEY, 0)
    reply = rank_0.reply(control.hello)
    assert reply == bytes(REPLY_BYTES)
    with pytest.raises(HandshakeError) as refused:
        control.finish(reply)
    assert refused.value.reason is Reason.UNSUPPORTED_VERSION
    with pytest.raises(HandshakeError):
        rank_0.finish(bytes(PROOF_BYTES))


def test_another_protocol_is_refused() -> None:
    with pytest.raises(HandshakeError, match="another protocol"):
        Responder(KEY, CONTROL).reply(b"GET / HTTP/1.1\r\n".ljust(HELLO_BYTES))


def test_versions_without_a_common_one_are_refused() -> None:
    initiator = Initiator(KEY, CONTROL)
    newer = initiator.hello[:4] + bytes((2, 3)) + initiator.hello[6:]
    assert Responder(KEY, CONTROL).reply(newer) == bytes(REPLY_BYTES)


@given(place=st.integers(0, HELLO_BYTES + REPLY_BYTES - 1), flip=st.integers(1, 255))
def test_whatever_is_changed_on_the_way_no_session_comes_of_it(place: int, flip: int) -> None:
    initiator, responder = Initiator(KEY, CONTROL), Responder(KEY, CONTROL)

    def changed(data: bytes, first: int) -> bytes:
        at = place - first
        if not 0 <= at < len(data):
            return data
        return data[:at] + bytes((data[at] ^ flip,)) + data[at + 1 :]

    with pytest.raises(HandshakeError):
        initiator.finish(changed(responder.reply(changed(initiator.hello, 0)), HELLO_BYTES))


def test_no_key_is_shown() -> None:
    here, _ = shake(Initiator(KEY, CONTROL), Responder(KEY, CONTROL))
    assert repr(here) == "Session(version=1)"


def test_a_key_file_is_read_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef" * 4 + "\n")
    path.chmod(0o600)
    read = read_peer_key(path)
    assert (read.key, read.warning) == (b"0123456789abcdef" * 4, "")
    assert "0123" not in repr(read)


def test_a_key_file_that_everybody_may_read_is_told_and_used(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef" * 4)
    path.chmod(0o644)
    assert "open to every user" in read_peer_key(path).warning


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), (" \n", "is empty"), ("secret", "has 6 bytes where at least 32")]
)
def test_a_bad_key_file_is_told_without_its_content(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    with pytest.raises(PeerKeyError, match=message) as error:
        read_peer_key(path)
    assert "secret" not in str(error.value)


def test_a_missing_key_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(PeerKeyError, match="No such file"):
        read_peer_key(tmp_path / "none")
