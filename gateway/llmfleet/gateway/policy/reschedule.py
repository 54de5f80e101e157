"""Which running streams should go on elsewhere, so that the streams of a service lose less time to each other.

    loads of replicas, own streams --moves--> (stream, from, to), the best first; none where none pays

Requests on one engine slow each other down (TPOT grows with the batch), and where the KV cache runs out they wait and
are preempted. Routing decides that once, knowing no answer's length; this corrects it while they run. Llumnix (OSDI'24)
moves from the replica with the least *freeness* to the one with the most:

    freeness = (M - sum of virtual usage) / batch        tokens left per running request

where who waits counts with what it demands, and a high-priority request with headroom besides. Its fixed thresholds
made it move under full load too, where nothing can be gained (Block, arXiv 2508.03611, saw latencies ten times as
long). So here freeness only names the pair. A stream moves if it is predicted to save more than it costs:

    saves   its remaining tokens x slope x 2 (batch there after - batch here after):  it and its neighbours, both sides
            + the time that is lost for lack of KV cache, before less after, both sides
    costs   the gap that its client sees, and what copying slows both batches down

and if both replicas are nearer to each other afterwards than before, so that nothing moves back and forth. A
destination must have room for the stream and for what everybody there will write soon; if nobody has, nothing moves.
Each replica takes part in one move per round.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

SOON_TOKENS = 64
"""Tokens that a running request writes before a move has done its work: two seconds and more."""
WORTH = 4.0
"""A move must be predicted to save this many times its cost: lengths of answers are guesses."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica as the rescheduler sees it."""

    id: str
    running: float
    """Requests in its batch, others' too."""
    waiting: float
    """Requests that have no first token yet."""
    kv_tokens: float
    """Tokens that its KV cache holds; 0: unknown."""
    demand_tokens: float
    """Tokens in use, and those that waiting requests demand."""
    slope_ms: float
    """Additional TPOT per running request, in milliseconds."""
    stay_ms: float
    """How long a request stays, in milliseconds."""
    high: int = 0
    """Requests of high priority: others move away from them."""
    open: bool = True
    """Whether it may get requests."""

    def room(self, headroom_tokens: float) -> float:
        """Tokens left of the KV cache, less headroom for high priority where there is such a request."""
        return self.kv_tokens - self.demand_tokens - (headroom_tokens if self.high else 0.0)

    def freeness(self, headroom_tokens: float) -> float:
        """Tokens left per running request; may be negative."""
        return self.room(headroom_tokens) / max(1.0, self.running)


@dataclass(frozen=True, slots=True)
class Stream(Generic[T]):
    """A running request of this gateway that can move."""

    name: T
    replica: str
    tokens: float
    """Prompt and answer so far."""
    remaining_tokens: float
    """Expected rest of the answer."""


@dataclass(frozen=True, slots=True)
class MoveCost:
    """What a move costs."""

    gap_ms: float = 30.0
    """What its client sees."""
    copy_ms_per_token: float = 0.06
    """0.5 MB of KV per token of a 7B model at 64 Gbit/s."""
    copy_slows: float = 0.01
    """Share by which copying slows the steps of both batches down (Llumnix measured at most 1 %)."""
    headroom_tokens: float = 1600.0
    """KV cache kept free beside a high-priority request (Llumnix's figure for ideal decoding speed)."""


@dataclass(frozen=True, slots=True)
class Move(Generic[T]):
    """A stream that should go on elsewhere."""

    stream: Stream[T]
    to: str
    saves_ms: float
    """Predicted, all requests together, costs taken off."""


def moves(replicas: Sequence[ReplicaLoad], streams: Iterable[Stream[T]], cost: MoveCost) -> list[Move[T]]:
    """The moves of one round, the one that saves most first. Empty where none pays."""
    own: dict[str, list[Stream[T]]] = {}
    for stream in streams:
        own.setdefault(stream.replica, []).append(stream)
    left = sorted(replicas, key=lambda one: one.freeness(cost.headroom_tokens))
    found: list[Move[T]] = []
    while len(left) > 1:
        source = left.pop(0)
        candidates = own.get(source.id)
        targets = [one for one in left if one.open]
        if not candidates or not targets:
            continue
        target = targets[-1]
        best = max(
            (Move(stream, target.id, _saved_ms(stream, source, target, cost)) for stream in candidates),
            key=lambda move: move.saves_ms,
        )
        if best.saves_ms > 0.0:
            found.append(best)
            left.remove(target)
    found.sort(key=lambda move: -move.saves_ms)
    return found


def _saved_ms(stream: Stream[T], source: ReplicaLoad, target: ReplicaLoad, cost: MoveCost) -> float:
    """What a move saves, costs taken off; negative where it must not be."""
    headroom = cost.headroom_tokens
    here = replace(source, running=source.running - 1.0, demand_tokens=source.demand_tokens - stream.tokens)
    there = replace(target, running=target.running + 1.0, demand_tokens=target.demand_tokens + stream.tokens)
    if target.kv_tokens and there.room(headroom) < SOON_TOKENS * there.running:
        return -1.0
    if there.freeness(headroom) <= source.freeness(headroom) and there.running >= source.running:
        return -1.0
    slope_ms = (source.slope_ms + target.slope_ms) / 2.0
    saved_ms = 2.0 * stream.remaining_tokens * slope_ms * (here.running - target.running)
    for before, after in ((source, here), (target, there)):
        saved_ms += _lost_ms(before, headroom) - _lost_ms(after, headroom)
    copy_ms = cost.copy_ms_per_token * stream.tokens
    costs_ms = cost.gap_ms + cost.copy_slows * copy_ms * (source.running + target.running)
    return saved_ms - WORTH * costs_ms


def _lost_ms(load: ReplicaLoad, headroom_tokens: float) -> float:
    """Time that requests lose for lack of KV cache: by Little's law, the lack over what leaves per millisecond, for
    each that waits and for one that is preempted."""
    lack = SOON_TOKENS * load.running - load.room(headroom_tokens)
    if not load.kv_tokens or lack <= 0.0 or load.demand_tokens <= 0.0:
        return 0.0
    return lack / load.demand_tokens * load.stay_ms * (1.0 + load.waiting)
