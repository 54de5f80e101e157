"""What came of a migration, for whoever asked for it: where the request runs now, whether its answer is the one that it
would have given anyway, and where the time went.

In flow fingerprints and features; out flow `Outcome` and the judgement whether tokens computed anew are exact.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum

from llmfleet.api import Compatibility, Feature, Fingerprint, Reason, compatibility, differences
from llmfleet.migration.coordinator import CoordinatorPhase, Result

EXACT_DTYPE = "float32"
"""In which computing a token's KV in a prefill or in a decode leads to the same answer; in shorter ones it need not."""


class Replay(StrEnum):
    """What computing the tokens so far anew, at another engine, does to an answer."""

    EXACT = "exact"
    INEXACT = "inexact"
    """It goes on as it might have, but not as it would have."""
    NEVER = "never"
    """Another model would go on, or the request cannot be begun in its middle."""


NOT_IN_THE_MIDDLE = frozenset({Feature.SEVERAL_ANSWERS, Feature.POOLING, Feature.CLIENT_KV_TRANSFER, Feature.OTHER})
"""A request that uses one of these cannot be begun from tokens delivered."""


def replay(source: Fingerprint, destination: Fingerprint, features: Collection[Feature], adapter: str | None) -> Replay:
    """What a replay of a request of the source would be at the destination."""
    left = compatibility(differences(source, destination, adapter))
    if left is Compatibility.NEVER or NOT_IN_THE_MIDDLE.intersection(features):
        return Replay.NEVER
    same = left is Compatibility.COPY and source.dtype == EXACT_DTYPE and Feature.SAMPLING not in features
    return Replay.EXACT if same else Replay.INEXACT


@dataclass(frozen=True)
class Outcome:
    """How a migration ended. Exactly one for each."""

    result: Result
    migration: str = ""
    """Empty: it was refused before it had an id."""
    reason: Reason | None = None
    """Why it is not MOVED."""
    field: str = ""
    """What the reason is about: a field of the fingerprint, a feature."""
    detail: str = ""
    """For people."""
    exact: bool = True
    """The client gets what it would have got without the migration. False: it may differ, or nobody can know: without a
    seed, or where the owner resumes the stream at an engine of its choice."""
    replay: Replay = Replay.NEVER
    """What else can be done with a request that stayed; NEVER: it runs to its end at the source."""
    computed_tokens: int = 0
    """KV that was computed at the destination though it had been at the source."""
    bytes_sent: int = 0
    stages: int = 0
    """Of the copy."""
    phases_ms: dict[CoordinatorPhase, float] = dataclass_field(default_factory=dict)
    """Where the time went."""
