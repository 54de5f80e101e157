"""Requests that leave: the source's part of each migration, carried out.

In flow what the coordinator asks, the steps of the scheduler and the destination's acknowledgements; out flow blocks,
the tail and the word to begin. `llmfleet.migration.source` decides. All methods are called under the monitor.

While the request runs on, full blocks are pinned and handed to the channel, so many per step as the governor allows.
The cut is the request's length cap, lowered; the token that the next step gives is its last here, and is delivered as
any other. Once that step's results are in, what is left, at most a block or two, goes out from the scheduler's own
thread, with the tokens and the sampler's state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from llmfleet.api import Reason, SourcePhase, TailFate
from llmfleet.api.migration_messages import Cancel, Freeze, Precopy, Refused, Release, SourceStatus, Status
from llmfleet.engine import hand_over as codec
from llmfleet.engine import vllm_internals
from llmfleet.engine.blocks import Pins
from llmfleet.engine.hand_over import HandOver, Logprobs
from llmfleet.engine.metrics import Metrics
from llmfleet.engine.rank import RankPort
from llmfleet.migration.source import Acknowledged, Source, SourceEffect, SourceEvent, SourceInput, Stepped, source_step

REMEMBERED_LEASES = 10
"""So long it is known how a migration ended: what comes late learns it, and begins nothing."""

_EVENTS = {
    Freeze: SourceEvent.FREEZE,
    Release: SourceEvent.RELEASE,
    Cancel: SourceEvent.CANCEL,
    Status: SourceEvent.ASKED,
}


class Links:
    """The data channels to one destination, one per rank."""

    def __init__(self, ranks: Sequence[RankPort], addresses: Sequence[str]) -> None:
        self._ranks = list(zip(ranks, addresses, strict=True))
        self.addresses = tuple(addresses)

    def send_blocks(self, migration: str, epoch: int, first: int, block_ids: Sequence[int]) -> None:
        for rank, address in self._ranks:
            rank.send_blocks(address, migration, epoch, first, block_ids)

    def send_tail(self, migration: str, epoch: int, first: int, block_ids: Sequence[int], word: bytes) -> None:
        """The first rank's connection carries the word to begin; a destination waits for the other ranks' blocks."""
        for number, (rank, address) in enumerate(self._ranks):
            rank.send_tail(address, migration, epoch, first, block_ids, None if number else word)

    def send_ended(self, migration: str, epoch: int) -> None:
        rank, address = self._ranks[0]
        rank.send_ended(address, migration, epoch)


@dataclass
class Departure:
    """One request that leaves, or has left."""

    ask: Precopy
    request: Request
    links: Links
    acknowledged: list[int]
    """By rank: blocks that are in their places."""
    pins: Pins
    source: Source
    handed_blocks: int = 0
    """Blocks that the channel has been given."""
    cap_before: int | None = None
    bytes_sent: int = 0
    stages: int = 0
    cut_s: float = 0.0
    revision: int = 0
    logprobs: list[LogprobsLists] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        return self.ask.migration, self.ask.epoch


class Outgoing:
    """All migrations of which this engine is the source."""

    def __init__(
        self,
        *,
        scheduler: Any,
        block_size: int,
        most: int,
        lease_s: float,
        ranks: Sequence[RankPort],
        clock: Callable[[], float],
        changed: Callable[[str], None],
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._scheduler = scheduler
        self._pool = vllm_internals.block_pool(scheduler)
        self._block_size = block_size
        self._block_bytes = sum(rank.description.block_bytes for rank in ranks)
        self._most = most
        self._lease_s = lease_s
        self._ranks = ranks
        self._clock = clock
        self._changed = changed
        self._departures: dict[str, Departure] = {}
        self._by_request: dict[str, Departure] = {}

    # What coordinators ask

    def precopy(self, ask: Precopy, request: Request | None) -> SourceStatus | Refused:
        known = self._departures.get(ask.migration)
        if known is not None:
            return self._of_epoch(known, ask.epoch)
        if request is None or request.is_finished():
            return Refused(reason=Reason.UNKNOWN_REQUEST, detail=f"request: {ask.request!r} does not run here")
        if request.request_id in self._by_request:
            return Refused(reason=Reason.BUSY, detail="another migration of this request runs")
        if self.active >= self._most:
            return Refused(reason=Reason.BUSY, detail=f"{self.active} requests are leaving; {self._most} may")
        addresses = ask.destination.data
        if len(addresses) != len(self._ranks):
            detail = f"destination.data: {len(addresses)} ranks where this engine has {len(self._ranks)}"
            return Refused(reason=Reason.INCOMPATIBLE, field="tp", detail=detail)
        departure = Departure(
            ask=ask,
            request=request,
            links=Links(self._ranks, addresses),
            acknowledged=[0] * len(addresses),
            pins=Pins(self._pool),
            source=Source(self._lease_s, self._clock() + self._lease_s),
        )
        self._departures[ask.migration] = self._by_request[request.request_id] = departure
        return self._status(departure)

    def asked(self, ask: Freeze | Release | Cancel | Status) -> SourceStatus | Refused:
        """Of a migration that this engine knows."""
        departure = self._departures[ask.migration]
        if departure.ask.epoch == ask.epoch:
            self._event(departure, _EVENTS[type(ask)])
        return self._of_epoch(departure, ask.epoch)

    def knows(self, migration: str) -> bool:
        return migration in self._departures

    def _of_epoch(self, departure: Departure, epoch: int) -> SourceStatus | Refused:
        if departure.ask.epoch != epoch:
            return Refused(reason=Reason.STALE_EPOCH, detail=f"epoch: this migration has {departure.ask.epoch}")
        return self._status(departure)

    # What the scheduler does

    @property
    def active(self) -> int:
        """Migrations that hold blocks or will."""
        return len(self._by_request) + sum(d.source.phase is SourcePhase.HELD for d in self._departures.values())

    @property
    def held_blocks(self) -> int:
        """Blocks that only wait for the release."""
        held = (d for d in self._departures.values() if d.source.phase is SourcePhase.HELD)
        return sum(len(departure.pins.blocks) for departure in held)

    @property
    def copying(self) -> bool:
        return bool(self._by_request)

    def scheduled(self, most_blocks: int) -> int:
        """A step is planned: hand at most so many blocks to the channels. Returns how many it was."""
        left = most_blocks
        for departure in list(self._by_request.values()):
            self._pin(departure)
            full = vllm_internals.full_blocks(departure.request, self._block_size)
            self._event(departure, Stepped(full, departure.request.num_output_tokens > 0))
            if departure.source.phase is SourcePhase.COPYING:
                left -= self._hand(departure, min(departure.source.sent_blocks - departure.handed_blocks, left))
            elif departure.source.phase is SourcePhase.FREEZING:
                # A client waits for what follows the cut, and a prompt that is still computed is cut at its first
                # token: what is full by now need not be sent then.
                self._hand(departure, full - departure.handed_blocks)
        return most_blocks - left

    def preempted(self, request: Request) -> None:
        """Its blocks are gone; those that were sent may differ, in rounding, from those that will be computed.

        So a copy ends. After the freeze it cannot: the cut will come later, and then all is sent again.
        """
        departure = self._by_request.get(request.request_id)
        if departure is not None:
            self._event(departure, SourceEvent.CANCEL)
            departure.pins.release()
            departure.handed_blocks = 0

    def abandon(self) -> None:
        """All KV cache becomes worthless: let go of every block."""
        for departure in list(self._departures.values()):
            if departure.source.phase is SourcePhase.HELD:
                self._event(departure, SourceEvent.RELEASE)
            elif not departure.source.over:
                self.preempted(departure.request)

    def finished(self, request_id: str, logprobs: Sequence[LogprobsLists]) -> None:
        """The request ended, by itself or by the cut."""
        departure = self._by_request.get(request_id)
        if departure is None:
            return
        cut = departure.cap_before is not None and vllm_internals.was_cut(
            departure.request, departure.cap_before, self._scheduler.max_model_len
        )
        departure.logprobs = list(logprobs)
        self._event(departure, SourceEvent.CUT if cut else SourceEvent.ENDED)
        self._by_request.pop(request_id, None)

    def tick(self) -> None:
        """Time goes by."""
        for migration, departure in list(self._departures.items()):
            self._event(departure, SourceEvent.TICK)
            forgotten_s = departure.source.lease_ends_s + REMEMBERED_LEASES * self._lease_s
            if departure.source.over and self._clock() > forgotten_s:
                del self._departures[migration]

    # What the destination says

    def acknowledged(self, rank: int, migration: str, epoch: int, blocks: int) -> None:
        departure = self._departures.get(migration)
        if departure is not None and departure.ask.epoch == epoch:
            departure.acknowledged[rank] = max(departure.acknowledged[rank], blocks)
            self._event(departure, Acknowledged(min(departure.acknowledged)))

    def taken(self, migration: str, epoch: int) -> None:
        departure = self._departures.get(migration)
        if departure is not None and departure.ask.epoch == epoch:
            self._event(departure, SourceEvent.TAIL_TAKEN)

    def refused(self, migration: str, epoch: int) -> None:
        departure = self._departures.get(migration)
        if departure is None or departure.ask.epoch != epoch:
            return
        held = departure.source.phase is SourcePhase.HELD
        self._event(departure, SourceEvent.TAIL_REFUSED if held else SourceEvent.CHANNEL_LOST)

    def lost(self, address: str) -> None:
        """A channel is gone, and what was in it."""
        for departure in list(self._departures.values()):
            if address in departure.links.addresses:
                self._event(departure, SourceEvent.CHANNEL_LOST)

    # Carrying out

    def _event(self, departure: Departure, event: SourceInput) -> None:
        before = departure.source
        departure.source, effects = source_step(before, event, self._clock())
        for effect in effects:
            match effect:
                case SourceEffect.SEND_BLOCKS:
                    departure.stages += 1
                case SourceEffect.CAP:
                    departure.cap_before = vllm_internals.cap(departure.request)
                    self._pin(departure)
                case SourceEffect.SEND_TAIL:
                    self._send_tail(departure)
                case SourceEffect.TELL_DESTINATION:
                    departure.links.send_ended(*departure.key)
                case SourceEffect.FREE_BLOCKS:
                    departure.pins.release()
        if departure.source.tail is TailFate.TAKEN and before.tail is not TailFate.TAKEN:
            self._metrics.handed_over(self._clock() - departure.cut_s)
        if departure.source.over and not before.over:
            self._metrics.left(departure.source.phase, departure.source.tail, departure.source.reason, departure.stages)
        if departure.source.over:
            departure.logprobs = []
            departure.pins.release()
            self._by_request.pop(departure.request.request_id, None)
        if _told(departure.source) != _told(before):
            departure.revision += 1
            self._changed(departure.ask.migration)

    def _pin(self, departure: Departure) -> None:
        departure.pins.extend_to(vllm_internals.blocks_of(self._scheduler, departure.request.request_id))

    def _hand(self, departure: Departure, count: int) -> int:
        if count <= 0:
            return 0
        ids = departure.pins.ids(departure.handed_blocks, count)
        departure.links.send_blocks(*departure.key, departure.handed_blocks, ids)
        departure.handed_blocks += count
        departure.bytes_sent += count * self._block_bytes
        self._metrics.sent(count * self._block_bytes)
        return count

    def _send_tail(self, departure: Departure) -> None:
        request = departure.request
        kv_tokens = request.num_tokens - 1
        first = departure.handed_blocks
        ids = departure.pins.ids(first, -(-kv_tokens // self._block_size) - first)
        word = codec.encode(
            HandOver(
                tokens=list(request.output_token_ids),
                kv_tokens=kv_tokens,
                generator=self._ranks[0].generator_state(request.request_id),
                logprobs=_joined(departure.logprobs, request.num_output_tokens),
            )
        )
        departure.handed_blocks += len(ids)
        size = len(ids) * self._block_bytes + len(word)
        departure.bytes_sent += size
        self._metrics.sent(size)
        departure.cut_s = self._clock()
        departure.links.send_tail(*departure.key, first, ids, word)

    def _status(self, departure: Departure) -> SourceStatus:
        source = departure.source
        return SourceStatus(
            migration=departure.ask.migration,
            epoch=departure.ask.epoch,
            revision=departure.revision,
            phase=source.phase,
            full_blocks=source.full_blocks,
            sent_blocks=source.sent_blocks,
            acknowledged_blocks=source.acknowledged_blocks,
            caught_up=source.caught_up,
            tail=source.tail,
            reason=source.reason,
            output_tokens=departure.request.num_output_tokens,
            bytes_sent=departure.bytes_sent,
            stages=departure.stages,
        )


def _told(source: Source) -> tuple[Any, ...]:
    """What a coordinator waits for: not each block."""
    return source.phase, source.caught_up, source.tail


def _joined(chunks: Sequence[LogprobsLists], tokens: int) -> Logprobs | None:
    """Log probabilities of all tokens; None where they are not asked for, or not known from the first token on."""
    if not chunks:
        return None
    ranks = np.concatenate([chunk.sampled_token_ranks for chunk in chunks])
    if len(ranks) != tokens:
        return None
    # A step gives every request as many columns as the one that wants most; what all steps gave is enough for this one.
    width = min(chunk.logprob_token_ids.shape[1] for chunk in chunks)
    return Logprobs(
        np.concatenate([chunk.logprob_token_ids[:, :width] for chunk in chunks]),
        np.concatenate([chunk.logprobs[:, :width] for chunk in chunks]),
        ranks,
    )
