"""How two peers prove to each other that they have the same key, and agree on keys for the connection.

In flow the shared key, fresh nonces of both and the other side's bytes; out flow three messages of fixed size and a
`Session` with one key for each direction. No sockets: whoever owns one reads exactly so many bytes and passes them on.

    initiator                                  responder
        ├─ hello: magic, versions, purpose, nonce ─►│
        │◄── reply: version, nonce, proof ──────────┤     version 0: none in common, or the purpose is another
        ├─ proof ──────────────────────────────────►│

A proof is an HMAC by the shared key over the role and everything said before, so that neither a recording (nonces), nor
the other side's own proof sent back (roles), nor a connection to another port (purpose), nor a changed version is
accepted. The session's keys come from the same by HKDF (RFC 5869).
"""

from __future__ import annotations

import hmac
import secrets
import stat
import struct
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from llmfleet.api import Reason

MAGIC = b"LLMF"
VERSIONS = (1, 1)
"""Lowest and highest version of handshake and frames that this side speaks."""
CONTROL = 0xFFFF
"""Purpose of a connection for asks and answers; any other purpose is the rank whose blocks the connection carries."""
LEAST_KEY_BYTES = 32

_HELLO = struct.Struct("!4sBBH32s")
_REPLY = struct.Struct("!B32s32s")
HELLO_BYTES = _HELLO.size
REPLY_BYTES = _REPLY.size
PROOF_BYTES = 32
_INITIATOR, _RESPONDER = b"llmfleet initiator", b"llmfleet responder"


class HandshakeError(Exception):
    """The peer is none. `reason` is UNAUTHORIZED, UNSUPPORTED_VERSION or MALFORMED."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class PeerKeyError(Exception):
    """The file of the shared key cannot be used. Says why, never what is in it."""


@dataclass(frozen=True)
class PeerKey:
    """The key that all engines, gateways and coordinators of a fleet share."""

    key: bytes = field(repr=False)
    warning: str = ""
    """What is not as it should be, though it works."""


@dataclass(frozen=True)
class Session:
    """What a handshake ends in."""

    version: int
    send_key: bytes = field(repr=False)
    receive_key: bytes = field(repr=False)


def read_peer_key(path: Path) -> PeerKey:
    """The key in a file, without white space around it. Raises PeerKeyError."""
    try:
        key = path.read_bytes().strip()
        mode = path.stat().st_mode
    except OSError as error:
        raise PeerKeyError(f"peer key file {path}: {error.strerror or error}") from None
    if not key:
        raise PeerKeyError(f"peer key file {path} is empty; make one with `openssl rand -hex 32`")
    if len(key) < LEAST_KEY_BYTES:
        found = f"{len(key)} bytes where at least {LEAST_KEY_BYTES} are accepted"
        raise PeerKeyError(f"peer key file {path} has {found}; make one with `openssl rand -hex 32`")
    open_to_others = mode & (stat.S_IROTH | stat.S_IWOTH)
    return PeerKey(key, f"peer key file {path} is open to every user of this machine" if open_to_others else "")


class Initiator:
    """The side that connects."""

    def __init__(self, key: bytes, purpose: int, nonce: bytes | None = None) -> None:
        self._key = key
        self.hello = _HELLO.pack(MAGIC, *VERSIONS, purpose, nonce or secrets.token_bytes(32))
        """To be sent first."""

    def finish(self, reply: bytes) -> tuple[bytes, Session]:
        """The proof to be sent, and the session. `reply` has REPLY_BYTES. Raises HandshakeError."""
        version, _, proof = _REPLY.unpack(reply)
        if version == 0:
            spoken = "-".join(map(str, VERSIONS))
            raise HandshakeError(Reason.UNSUPPORTED_VERSION, f"the peer speaks no version of {spoken} on this port")
        said = self.hello + reply[:-PROOF_BYTES]
        if not hmac.compare_digest(proof, _proof(self._key, _RESPONDER, said)):
            raise HandshakeError(Reason.UNAUTHORIZED, "the peer has another key")
        if not VERSIONS[0] <= version <= VERSIONS[1]:
            raise HandshakeError(Reason.MALFORMED, f"the peer chose version {version}, which was not offered")
        to_responder, to_initiator = _keys(self._key, said)
        return _proof(self._key, _INITIATOR, said + proof), Session(version, to_responder, to_initiator)


class Responder:
    """The side that listens."""

    def __init__(self, key: bytes, purpose: int, nonce: bytes | None = None) -> None:
        self._key = key
        self._purpose = purpose
        self._nonce = nonce or secrets.token_bytes(32)
        self._said = b""
        self._version = 0

    def reply(self, hello: bytes) -> bytes:
        """What to answer a hello of HELLO_BYTES. With version 0 in it, `finish` will refuse. Raises HandshakeError."""
        magic, lowest, highest, purpose, _ = _HELLO.unpack(hello)
        if magic != MAGIC:
            raise HandshakeError(Reason.MALFORMED, "the peer speaks another protocol")
        common = min(highest, VERSIONS[1])
        if common < max(lowest, VERSIONS[0]) or purpose != self._purpose:
            return bytes(REPLY_BYTES)
        self._version = common
        self._said = hello + bytes((common,)) + self._nonce
        return self._said[HELLO_BYTES:] + _proof(self._key, _RESPONDER, self._said)

    def finish(self, proof: bytes) -> Session:
        """The session, if the peer's proof of PROOF_BYTES is right. Raises HandshakeError."""
        if not self._version:
            raise HandshakeError(Reason.UNSUPPORTED_VERSION, "no version in common, or another purpose")
        mine = _proof(self._key, _RESPONDER, self._said)
        if not hmac.compare_digest(proof, _proof(self._key, _INITIATOR, self._said + mine)):
            raise HandshakeError(Reason.UNAUTHORIZED, "the peer has another key")
        to_responder, to_initiator = _keys(self._key, self._said)
        return Session(self._version, to_initiator, to_responder)


def _proof(key: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(key, role + said, sha256)


def _keys(key: bytes, said: bytes) -> tuple[bytes, bytes]:
    """HKDF-SHA256 with what was said as salt: the keys towards the responder and towards the initiator."""
    extracted = hmac.digest(sha256(said).digest(), key, sha256)
    return hmac.digest(extracted, _INITIATOR + b"\x01", sha256), hmac.digest(extracted, _RESPONDER + b"\x01", sha256)
