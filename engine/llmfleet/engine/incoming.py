"""Requests that come: the destination's part of each migration, carried out.

In flow what the coordinator asks, what arrives on the data channels and the original request, submitted by the stream's
owner like any other; out flow blocks in their places, and in the end a request that runs on. All methods are called
under the monitor. `llmfleet.migration.destination` decides.

A request whose id names a migration is *parked*: it stays out of vLLM's queues until the word to begin has come, and
counts as parked only when its grammar, if it has one, is compiled, so that nothing that takes long lies in the gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.v1.request import Request

from llmfleet.api import DestinationPhase, Feature, Reason
from llmfleet.api.migration_messages import Cancel, DestinationStatus, Prepare, Refused, Resume, Status
from llmfleet.engine import vllm_internals
from llmfleet.engine.blocks import Reservation
from llmfleet.engine.hand_over import HandOver
from llmfleet.engine.identity import prompt_digest
from llmfleet.engine.metrics import Metrics
from llmfleet.engine.outgoing import REMEMBERED_LEASES
from llmfleet.migration.destination import (
    Destination,
    DestinationEffect,
    DestinationEvent,
    DestinationInput,
    Placed,
    destination_step,
)
from llmfleet.migration.engine_arguments import EngineSettings

REFUSED_FEATURES = frozenset(
    {
        Feature.PROMPT_LOGPROBS, Feature.SEVERAL_ANSWERS, Feature.PROMPT_EMBEDDINGS, Feature.MULTIMODAL,
        Feature.SPECULATIVE_DECODING, Feature.HYBRID_CACHE, Feature.POOLING, Feature.CLIENT_KV_TRANSFER, Feature.OTHER,
    }
)  # fmt: skip


@dataclass
class Arrival:
    """One request that comes, or has come."""

    ask: Prepare
    reservation: Reservation
    destination: Destination
    placed: list[int]
    """By rank: blocks in their places, without a gap."""
    request: Request | None = None
    hand_over: HandOver | None = None
    computed_tokens: int | None = None
    revision: int = 0


@dataclass(frozen=True)
class Ready:
    """A parked request that runs from the next step on."""

    arrival: Arrival
    request: Request
    hand_over: HandOver
    blocks: int
    """How many of the reserved blocks hold its KV cache."""


class Incoming:
    """All migrations of which this engine is the destination."""

    def __init__(
        self,
        *,
        pool: Any,
        block_size: int,
        ranks: int,
        settings: EngineSettings,
        clock: Callable[[], float],
        changed: Callable[[str], None],
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._pool = pool
        self._block_size = block_size
        self._ranks = ranks
        self._settings = settings
        self._clock = clock
        self._changed = changed
        self._arrivals: dict[str, Arrival] = {}
        self._ready: list[Ready] = []
        self._rejected: list[Request] = []

    # What coordinators ask

    def prepare(self, ask: Prepare, refusal: Refused | None) -> DestinationStatus | Refused | None:
        """Reserve. None: it is reserved; asked again, how it stands. `refusal` is what the engine has against it."""
        known = self._arrivals.get(ask.migration)
        if known is not None:
            if known.ask.epoch != ask.epoch:
                return Refused(reason=Reason.STALE_EPOCH, detail=f"epoch: this migration has {known.ask.epoch}")
            return None if known.destination.phase is DestinationPhase.RESERVED else self._status(known)
        refusal = refusal or self._no_room(ask)
        if refusal is not None:
            return refusal
        now_s = self._clock()
        lease_s = self._settings.lease_s
        self._arrivals[ask.migration] = Arrival(
            ask=ask,
            reservation=Reservation(self._pool, self._blocks_for(ask)),
            destination=Destination(lease_s, now_s + lease_s),
            placed=[0] * self._ranks,
        )
        return None

    def _no_room(self, ask: Prepare) -> Refused | None:
        if not ask.tokens:
            # Nothing is copied or reserved for it: to this engine it is a new request. After a crash many come at once.
            return None
        reserved = [
            a for a in self._arrivals.values() if a.ask.tokens and a.destination.phase is DestinationPhase.RESERVED
        ]
        if len(reserved) >= self._settings.incoming:
            detail = f"{len(reserved)} requests are on their way here; {self._settings.incoming} may"
            return Refused(reason=Reason.BUSY, detail=detail)
        tokens = sum(arrival.ask.most_tokens for arrival in reserved) + ask.most_tokens
        if tokens > self._settings.incoming_tokens:
            detail = f"{tokens} tokens would be on their way here; {self._settings.incoming_tokens} may"
            return Refused(reason=Reason.NO_ROOM, field="incoming_tokens", detail=detail)
        needed = self._blocks_for(ask)
        total = self._pool.num_gpu_blocks - 1
        share = self._settings.incoming_kv_share
        if needed + self.reserved_blocks > share * total:
            detail = f"{needed} blocks beside {self.reserved_blocks} reserved ones; at most {share:.0%} of {total}"
            return Refused(reason=Reason.NO_ROOM, detail=detail)
        free = self._pool.get_num_free_blocks()
        if needed > free:
            return Refused(reason=Reason.NO_ROOM, detail=f"{needed} blocks are needed, {free} are free")
        return None

    def _blocks_for(self, ask: Prepare) -> int:
        tokens = min(ask.tokens + self._settings.growth_tokens, ask.most_tokens) if ask.tokens else 0
        return -(-tokens // self._block_size)

    def resume(self, ask: Resume) -> DestinationStatus | Refused:
        arrival = self._arrivals[ask.migration]
        if arrival.ask.epoch == ask.epoch and arrival.destination.phase is DestinationPhase.RESERVED:
            if not arrival.destination.parked:
                # Else the word would be lost: the owner's request may still be on its way.
                return self._of_epoch(arrival, ask.epoch)
            tokens = arrival.request.num_prompt_tokens + len(ask.tokens) if arrival.request is not None else 0
            kv_tokens = min(arrival.destination.blocks * self._block_size, tokens - 1)
            arrival.hand_over = HandOver(list(ask.tokens), kv_tokens)
            self._event(arrival, DestinationEvent.RESUME)
        return self._of_epoch(arrival, ask.epoch)

    def asked(self, ask: Cancel | Status) -> DestinationStatus | Refused:
        """Of a migration that this engine knows."""
        arrival = self._arrivals[ask.migration]
        if arrival.ask.epoch == ask.epoch:
            cancelled = isinstance(ask, Cancel)
            self._event(arrival, DestinationEvent.CANCEL if cancelled else DestinationEvent.ASKED)
        return self._of_epoch(arrival, ask.epoch)

    def knows(self, migration: str) -> bool:
        return migration in self._arrivals

    def _of_epoch(self, arrival: Arrival, epoch: int) -> DestinationStatus | Refused:
        if arrival.ask.epoch != epoch:
            return Refused(reason=Reason.STALE_EPOCH, detail=f"epoch: this migration has {arrival.ask.epoch}")
        return self._status(arrival)

    # What the scheduler does

    @property
    def reserved_blocks(self) -> int:
        """Blocks that are taken for requests on their way here."""
        return sum(len(arrival.reservation) for arrival in self._arrivals.values())

    @property
    def active(self) -> int:
        """Migrations in reservation."""
        return sum(a.destination.phase is DestinationPhase.RESERVED for a in self._arrivals.values())

    @property
    def waiting(self) -> bool:
        """Whether the engine must go on stepping although vLLM knows of no request."""
        return bool(self._ready or self._rejected or any(a.request for a in self._arrivals.values()))

    def submitted(self, migration: str, request: Request) -> None:
        """The owner's request has come to the scheduler, which does not get it yet."""
        arrival = self._arrivals.get(migration)
        if arrival is None or arrival.request is not None:
            self._rejected.append(request)
            return
        arrival.request = request
        announced = arrival.ask.prompt_digest
        if announced is not None and announced != prompt_digest(request):
            self._event(arrival, DestinationEvent.OTHER)
            return
        self._park(arrival)

    def _park(self, arrival: Arrival) -> None:
        request = arrival.request
        if request is None or arrival.destination.parked:
            return
        if vllm_internals.grammar_is_ready(request):
            self._event(arrival, DestinationEvent.PARKED)

    def aborted(self, request_id: str) -> bool:
        """The owner's request went away. Whether it was a parked one."""
        for arrival in self._arrivals.values():
            if arrival.request is not None and arrival.request.request_id == request_id:
                arrival.request = None
                self._event(arrival, DestinationEvent.GONE)
                return True
        for ready in self._ready:
            if ready.request.request_id == request_id:
                self._ready.remove(ready)
                ready.arrival.reservation.release()
                return True
        return False

    def parked_ids(self) -> list[str]:
        """Ids of all requests that the scheduler has not got yet."""
        parked = [a.request.request_id for a in self._arrivals.values() if a.request is not None]
        return [*parked, *(ready.request.request_id for ready in self._ready)]

    def take_ready(self) -> list[Ready]:
        """Requests that run from this step on."""
        for arrival in self._arrivals.values():
            self._park(arrival)
        ready, self._ready = self._ready, []
        return ready

    def take_rejected(self) -> list[Request]:
        """Requests that get an error for an answer."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def reject(self, request: Request) -> None:
        """It cannot go on here after all."""
        self._rejected.append(request)

    def abandon(self) -> None:
        """All KV cache becomes worthless: let go of every block."""
        for arrival in self._arrivals.values():
            self._event(arrival, DestinationEvent.CANCEL)
        ready, self._ready = self._ready, []
        for one in ready:
            one.arrival.reservation.release()
            self._rejected.append(one.request)

    def computed(self, arrival: Arrival, tokens: int) -> None:
        """So many tokens' KV is computed here because it did not come."""
        arrival.computed_tokens = tokens
        self._metrics.recomputed(tokens)
        arrival.revision += 1
        self._changed(arrival.ask.migration)

    def tick(self) -> None:
        """Time goes by."""
        now_s = self._clock()
        for migration, arrival in list(self._arrivals.items()):
            self._event(arrival, DestinationEvent.TICK)
            over = arrival.destination.phase is not DestinationPhase.RESERVED and not arrival.reservation.written_to
            if over and now_s > arrival.destination.lease_ends_s + REMEMBERED_LEASES * self._settings.lease_s:
                del self._arrivals[migration]

    # What comes on the data channels

    def begin_write(self, rank: int, migration: str, epoch: int, first: int, count: int) -> list[int] | None:
        """Ids of the blocks that these belong to, until `end_write`; None where nobody waits for them."""
        arrival = self._arrivals.get(migration)
        if arrival is None or arrival.ask.epoch != epoch or arrival.destination.phase is not DestinationPhase.RESERVED:
            return None
        # Not beyond what was announced, and without a gap: what is placed is told as a single number.
        most = -(-arrival.ask.most_tokens // self._block_size)
        if first > arrival.placed[rank] or first + count > most:
            return None
        if not arrival.reservation.grow(first + count):
            return None
        return arrival.reservation.begin_write(first, count)

    def end_write(self, rank: int, migration: str, first: int, count: int, whole: bool) -> int | None:
        """The write is over. Number of blocks in their places, or None where nobody waits for them any more."""
        arrival = self._arrivals[migration]
        arrival.reservation.end_write()
        if arrival.destination.phase is not DestinationPhase.RESERVED:
            return None
        if whole:
            arrival.placed[rank] = max(arrival.placed[rank], first + count)
            self._event(arrival, Placed(min(arrival.placed)))
        return arrival.placed[rank]

    def settled(self, migration: str, epoch: int, word: HandOver) -> bool:
        """Whether the word can be taken or refused: nothing more is expected, or the blocks are there on all ranks."""
        arrival = self._arrivals.get(migration)
        if arrival is None or arrival.ask.epoch != epoch or arrival.destination.phase is not DestinationPhase.RESERVED:
            return True
        return arrival.destination.blocks >= self._blocks(word)

    def hand_over(self, migration: str, epoch: int, word: HandOver) -> bool:
        """The word to begin has come. Whether it is taken."""
        arrival = self._arrivals.get(migration)
        if arrival is None or arrival.ask.epoch != epoch:
            return False
        if arrival.destination.phase is DestinationPhase.RESERVED:
            if arrival.destination.blocks < self._blocks(word):
                return False
            arrival.hand_over = word
        return DestinationEffect.TAKE_TAIL in self._event(arrival, DestinationEvent.TAIL)

    def ended(self, migration: str, epoch: int) -> None:
        """The source says that nothing will come any more."""
        arrival = self._arrivals.get(migration)
        if arrival is not None and arrival.ask.epoch == epoch:
            self._event(arrival, DestinationEvent.SOURCE_ENDED)

    # Carrying out

    def _event(self, arrival: Arrival, event: DestinationInput) -> tuple[DestinationEffect, ...]:
        before = arrival.destination
        arrival.destination, effects = destination_step(before, event, self._clock())
        for effect in effects:
            match effect:
                case DestinationEffect.ADMIT:
                    self._admit(arrival)
                case DestinationEffect.GIVE_BACK:
                    arrival.reservation.release()
                case DestinationEffect.ABORT_REQUEST | DestinationEffect.REFUSE_REQUEST:
                    if arrival.request is not None:
                        self._rejected.append(arrival.request)
                        arrival.request = None
        if arrival.destination.phase is not before.phase:
            self._metrics.came(arrival.destination.phase, arrival.destination.reason)
        if (arrival.destination.phase, arrival.destination.parked) != (before.phase, before.parked):
            arrival.revision += 1
            self._changed(arrival.ask.migration)
        return effects

    def _admit(self, arrival: Arrival) -> None:
        request, word = arrival.request, arrival.hand_over
        assert request is not None, "ADMIT follows PARKED"
        assert word is not None, "and the word to begin"
        arrival.request = None
        self._ready.append(Ready(arrival, request, word, self._blocks(word)))

    def _blocks(self, word: HandOver) -> int:
        return -(-word.kv_tokens // self._block_size)

    def _status(self, arrival: Arrival) -> DestinationStatus:
        destination = arrival.destination
        return DestinationStatus(
            migration=arrival.ask.migration,
            epoch=arrival.ask.epoch,
            revision=arrival.revision,
            phase=destination.phase,
            blocks=destination.blocks,
            parked=destination.parked,
            complete=destination.complete,
            reason=destination.reason,
            computed_tokens=arrival.computed_tokens,
        )
