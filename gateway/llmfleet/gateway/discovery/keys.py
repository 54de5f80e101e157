"""API keys from the entries of a Secret.

An entry is a plain key, which has the default rights, or an object, in JSON or YAML:

    key: sk-...                  # or sha256: the hexadecimal digest of the key, so that the Secret holds no key
    models: [chat]               # all of the service where left out, as with every field below
    requestsPerSecond: 5
    tokensPerMinute: 100000
    concurrentRequests: 20
    maxPriority: high            # or standard, batch
    decisions: true              # may ask why a request went where it went

The entry's name is the tenant. An entry that cannot be understood opens nothing, is named without what it holds, and
leaves the others in force. Of two entries with one key the first by name counts, as nobody could say which was meant.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from llmfleet.gateway.keys import ApiKey, KeyRing, Priority

_PRIORITIES = {"high": Priority.HIGH, "standard": Priority.STANDARD, "batch": Priority.BATCH}
_SECRET_FIELDS = frozenset(("key", "sha256"))

_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, strict=True)

    key: str | None = Field(default=None, min_length=1, pattern=r"^\S+$")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    models: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    requests_per_second: _Rate | None = None
    tokens_per_minute: _Rate | None = None
    concurrent_requests: Annotated[int, Field(ge=1)] | None = None
    max_priority: Literal["high", "standard", "batch"] = "standard"
    decisions: bool = False


def read_keys(entries: Mapping[str, str]) -> tuple[KeyRing, list[str]]:
    """The keys of a Secret's `data` (base64 by name), and what was wrong with those entries that were left out.

    A complaint names entry and field and says what is accepted; it holds no part of a key.
    """
    keys: dict[bytes, ApiKey] = {}
    complaints: list[str] = []
    for name, encoded in sorted(entries.items()):
        try:
            digest, rights = _read(name, encoded)
        except ValueError as error:
            complaints.append(f"entry {name!r} {error}")
            continue
        if digest in keys:
            complaints.append(f"entry {name!r} has the same key as entry {keys[digest].tenant!r}, which counts")
        else:
            keys[digest] = rights
    return KeyRing.of(keys), complaints


def _read(name: str, encoded: str) -> tuple[bytes, ApiKey]:
    try:
        text = base64.b64decode(encoded, validate=True).decode().strip()
    except (binascii.Error, UnicodeDecodeError):
        # `from None` everywhere: what was decoded must not reach a log with a traceback.
        raise ValueError("is not base64 of UTF-8 text") from None
    if not text:
        raise ValueError("is empty; a key, or an object with one, is accepted")
    if not text.startswith("{") and not any(character.isspace() for character in text):
        return hashlib.sha256(text.encode()).digest(), ApiKey(name)
    entry = _entry(text)
    if (entry.key is None) == (entry.sha256 is None):
        raise ValueError("must have either key or sha256")
    digest = bytes.fromhex(entry.sha256) if entry.sha256 else hashlib.sha256((entry.key or "").encode()).digest()
    return digest, ApiKey(
        tenant=name,
        models=None if entry.models is None else frozenset(entry.models),
        requests_per_second=entry.requests_per_second,
        tokens_per_minute=entry.tokens_per_minute,
        concurrent_requests=entry.concurrent_requests,
        max_priority=_PRIORITIES[entry.max_priority],
        decisions=entry.decisions,
    )


def _entry(text: str) -> _Entry:
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise ValueError("is neither a key without white space nor an object in JSON or YAML") from None
    if not isinstance(document, dict):
        raise ValueError("is neither a key without white space nor an object in JSON or YAML")
    # YAML reads a key of digits as a number; it was meant as it is written only within quotes.
    if unquoted := [field for field in _SECRET_FIELDS if not isinstance(document.get(field, ""), str)]:
        raise ValueError(f"must have {unquoted[0]} as text: put it in quotes")
    try:
        return _Entry.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "extra_forbidden":
            # Not by name: it may be a key that was written in the wrong place.
            known = ", ".join(field.alias or name for name, field in _Entry.model_fields.items())
            raise ValueError(f"has a field that is not known; accepted are {known}") from None
        got = f", got {first['input']!r}" if isinstance(first["input"], bool | int | float) else ""
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}{got}") from None
