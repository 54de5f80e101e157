"""API keys and what they may do.

A key is known by its SHA-256 digest only: neither memory nor log of the gateway keeps one. Its rights come with it from
the Secret; `discovery.keys` reads them. Where a service asks for no key, everybody is one tenant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """Class of a request; who has a higher one is served first."""

    BATCH = 0
    """Only where engines are idle otherwise."""
    STANDARD = 1
    HIGH = 2


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key's rights."""

    tenant: str
    """Name of its entry in the Secret: unique there, and no secret."""
    models: frozenset[str] | None = None
    """Model names that it opens; None: all of its service."""
    requests_per_second: float | None = None
    """None: unbounded."""
    tokens_per_minute: float | None = None
    """Of prompts and answers; None: unbounded."""
    concurrent_requests: int | None = None
    """Requests at once, those that wait included; None: unbounded."""
    max_priority: Priority = Priority.STANDARD
    """The highest class that its requests may have."""
    decisions: bool = False
    """Whether it may ask why a request went where it went."""


EVERYBODY = ApiKey("", max_priority=Priority.HIGH)
"""Clients of a service that asks for no key: nobody is there who could be preferred to others."""


class KeyRing:
    """The keys of one service. An empty ring accepts nobody: that is what a missing Secret means."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        """Of plain keys, which have the default rights. The tenant is the beginning of the digest."""
        digests = {hashlib.sha256(key).digest() for key in keys if key}
        self._keys: dict[bytes, ApiKey] = {digest: ApiKey(digest[:6].hex()) for digest in sorted(digests)}

    @classmethod
    def of(cls, keys: Mapping[bytes, ApiKey]) -> KeyRing:
        """Of rights by the digest of the key."""
        ring = cls()
        ring._keys = dict(keys)
        return ring

    def find(self, digest: bytes | None) -> ApiKey | None:
        """The rights of the key with this `key_digest`; None if it is not one of the ring's.

        A look-up takes other times for other digests, but a digest says nothing of a key, and nobody can choose one
        that begins like another's.
        """
        return None if digest is None else self._keys.get(digest)

    def __len__(self) -> int:
        return len(self._keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyRing) and self._keys == other._keys

    def __hash__(self) -> int:
        return hash(frozenset(self._keys.items()))


def key_digest(key: bytes | None) -> bytes | None:
    """What a `KeyRing` looks up: the SHA-256 digest of a presented key, None where none was presented."""
    return hashlib.sha256(key).digest() if key else None
