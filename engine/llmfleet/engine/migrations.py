"""All migrations of one engine: the monitor, what comes and goes, and the plain answers to coordinators.

In flow calls of the scheduler (`arrives` ... `abandon`), which holds the monitor meanwhile; asks of the control port
and data of the channels, whose threads need not hold it. Out flow what these return.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from llmfleet.api import Reason
from llmfleet.api.fingerprint import Compatibility, Fingerprint, compatibility, differences
from llmfleet.api.migration import Feature
from llmfleet.api.migration_messages import (
    MOST_REQUESTS,
    AnyAnswer,
    AnyAsk,
    Cancel,
    Capabilities,
    Cause,
    Destination,
    EngineCapabilities,
    EngineLimits,
    Freeze,
    GetLoad,
    ListRequests,
    Load,
    Precopy,
    Prepare,
    Prepared,
    Refused,
    Release,
    RequestList,
    Resume,
    RunningRequest,
    Status,
)
from llmfleet.engine import hand_over as codec
from llmfleet.engine import vllm_internals
from llmfleet.engine.identity import prompt_digest
from llmfleet.engine.incoming import REFUSED_FEATURES, Incoming, Ready
from llmfleet.engine.journal import Journal, Subscriber
from llmfleet.engine.metrics import Metrics
from llmfleet.engine.outgoing import Outgoing
from llmfleet.engine.rank import RankPort
from llmfleet.engine.resume import Resumed, Resumes, lists
from llmfleet.engine.step_times import StepTimes
from llmfleet.migration.engine_arguments import EngineSettings
from llmfleet.migration.ports import host_and_port, migration_of

log = logging.getLogger("vllm.llmfleet")


@dataclass
class Followed:
    """What is remembered of a request that runs here."""

    request: Request
    names: tuple[str, ...]
    """What its owner may have called it."""
    logprobs: list[LogprobsLists] = field(default_factory=list)
    """Of its tokens so far, where they are asked for: an answer that is not streamed is told in one piece."""


class Migrations:
    """One engine's part in live migration."""

    def __init__(
        self,
        *,
        scheduler: Any,
        add_request: Callable[[Request], None],
        ranks: Sequence[RankPort],
        settings: EngineSettings,
        fingerprint: Fingerprint,
        unsupported: Feature | None,
        changed: Callable[[str], None],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics
        self.monitor = threading.RLock()
        self._placed = threading.Condition(self.monitor)
        self.instance = secrets.token_hex(16)
        self._scheduler = scheduler
        self._pool = vllm_internals.block_pool(scheduler)
        self._ranks = ranks
        self._settings = settings
        self._fingerprint = fingerprint
        self._unsupported = unsupported
        self._requests: dict[str, Followed] = {}
        self._steps = StepTimes(clock)
        self.journal = Journal()
        self._resumes = Resumes(scheduler, add_request)
        self._incoming = Incoming(
            pool=self._pool,
            block_size=fingerprint.block_size,
            ranks=len(ranks),
            settings=settings,
            clock=clock,
            changed=changed,
            metrics=metrics,
        )
        self._outgoing = Outgoing(
            scheduler=scheduler,
            block_size=fingerprint.block_size,
            most=settings.outgoing,
            lease_s=settings.lease_s,
            ranks=ranks,
            clock=clock,
            changed=changed,
            metrics=metrics,
        )
        host = settings.advertise or reachable(settings.data_listen or settings.listen)
        ports = [rank.description.data_port for rank in ranks]
        self._destination = Destination(instance=self.instance, data=[f"{host}:{port}" for port in ports])

    def close(self) -> None:
        """The engine ends."""
        for rank in self._ranks:
            rank.close()

    # The scheduler

    def arrives(self, request: Request) -> bool:
        """A request has come from the API server. Whether it is kept out of the scheduler's queues."""
        migration = migration_of(request.request_id)
        if migration is None:
            self._follow(request)
            return False
        self._incoming.submitted(migration, request)
        return True

    def _follow(self, request: Request) -> Followed:
        followed = Followed(request, vllm_internals.names(request.request_id))
        self._requests[request.request_id] = followed
        self.journal.began(followed.names)
        return followed

    @property
    def waiting(self) -> bool:
        """Whether the engine must step although vLLM knows of nothing to do."""
        return self._incoming.waiting or self._resumes.waiting

    def before_step(self) -> None:
        """A step is about to be planned: what is ready goes into the scheduler's queues."""
        for ready in self._incoming.take_ready():
            self._admit(ready)

    def _admit(self, ready: Ready) -> None:
        request, word, reservation = ready.request, ready.hand_over, ready.arrival.reservation
        followed = self._follow(request)
        try:
            blocks = reservation.take(ready.blocks)
            if not self._resumes.admit(request, word, blocks):
                self._pool.free_blocks(reversed(blocks))
        except ValueError as error:
            log.warning("a request that came from another engine is refused: %s", error)
            reservation.release()
            del self._requests[request.request_id]
            self._incoming.reject(request)
            return
        if word.logprobs is not None:
            followed.logprobs.append(lists(word.logprobs))
        self._incoming.computed(ready.arrival, max(0, request.num_tokens - 1 - word.kv_tokens))

    def planned(self, output: SchedulerOutput) -> list[Resumed]:
        """A step is planned: copy, and say what the model runner must know."""
        for request_id in output.preempted_req_ids or ():
            followed = self._requests.get(request_id)
            if followed is not None:
                self._outgoing.preempted(followed.request)
        copied = self._outgoing.scheduled(self._steps.blocks) if self._outgoing.copying else 0
        self._steps.planned(busy=bool(output.total_num_scheduled_tokens), copied_blocks=copied)
        return self._resumes.scheduled(output)

    def stepped(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """A step's results are in: what is told of them, and which requests ended."""
        for client in outputs.values():
            for output in client.outputs:
                self._told(output)
        for index, output in self._resumes.complete_outputs():
            self._requests.pop(output.request_id, None)
            outputs.setdefault(index, EngineCoreOutputs()).outputs.append(output)
        for request in self._incoming.take_rejected():
            refused = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR)
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(refused)

    def _told(self, output: EngineCoreOutput) -> None:
        followed = self._requests.get(output.request_id)
        if followed is None:
            return
        if output.new_logprobs is not None:
            followed.logprobs.append(output.new_logprobs)
        self._resumes.told(output)
        if self.journal.followed:
            self.journal.stepped(followed.names, followed.request.output_token_ids)
        if output.finish_reason is not None:
            self._outgoing.finished(output.request_id, followed.logprobs)
            del self._requests[output.request_id]

    def aborted(self, request_ids: Iterable[str] | None) -> None:
        """The API server wants no more of these; None: of any."""
        ids = list(request_ids) if request_ids is not None else [*self._requests, *self._incoming.parked_ids()]
        for request_id in ids:
            if self._incoming.aborted(request_id):
                continue
            followed = self._requests.pop(request_id, None)
            if followed is not None:
                self._outgoing.finished(request_id, followed.logprobs)
                self._resumes.forget(request_id)

    def abandon(self) -> None:
        """All KV cache becomes worthless (other weights): nothing that was copied may be used."""
        self._incoming.abandon()
        self._outgoing.abandon()

    # Coordinators and owners

    def answer(self, ask: AnyAsk) -> AnyAnswer:
        """How things stand once what was asked is done. Never waits."""
        with self.monitor:
            match ask:
                case Capabilities():
                    return self._capabilities()
                case GetLoad():
                    return self._load()
                case ListRequests():
                    return self._list(ask.request)
                case Prepare():
                    return self._prepare(ask)
                case Precopy():
                    return self._precopy(ask)
                case Freeze() | Release() | Cancel() | Status() if self._outgoing.knows(ask.migration):
                    return self._outgoing.asked(ask)
                case Cancel() | Status() if self._incoming.knows(ask.migration):
                    return self._incoming.asked(ask)
                case Resume() if self._incoming.knows(ask.migration):
                    return self._incoming.resume(ask)
            return Refused(reason=Reason.UNKNOWN_REQUEST, detail="migration: this engine knows no such one")

    def subscribe(self, subscriber: Subscriber, names: Iterable[str]) -> None:
        """Tell the subscriber of these requests."""
        with self.monitor:
            self.journal.subscribe(subscriber, names)
            for followed in self._requests.values():
                self.journal.stepped(followed.names, followed.request.output_token_ids)

    def unsubscribe(self, subscriber: Subscriber, names: Iterable[str] | None = None) -> None:
        """No more of these; None: of none at all."""
        with self.monitor:
            self.journal.unsubscribe(subscriber, names)

    def tick(self) -> None:
        """Time goes by: leases end."""
        with self.monitor:
            self._incoming.tick()
            self._outgoing.tick()

    def _capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            instance=self.instance,
            fingerprint=self._fingerprint,
            transports=["tcp"],
            data=self._destination.data,
            limits=EngineLimits(
                lease_s=self._settings.lease_s,
                incoming=self._settings.incoming,
                outgoing=self._settings.outgoing,
                incoming_tokens=self._settings.incoming_tokens,
                incoming_kv_share=self._settings.incoming_kv_share,
            ),
        )

    def present(self) -> int:
        """Requests that run, wait, come or leave. Any thread."""
        # Unlike vLLM's own gauges, which stay as the last step left them when a request leaves without one.
        running, waiting = self._scheduler.get_request_counts()
        return int(running + waiting) + self._incoming.active + self._outgoing.active

    def blocks(self) -> tuple[int, int]:
        """Reserved for requests that come, and held of requests that have left."""
        with self.monitor:
            return self._incoming.reserved_blocks, self._outgoing.held_blocks

    def _load(self) -> Load:
        running, waiting = self._scheduler.get_request_counts()
        return Load(
            blocks_total=self._pool.num_gpu_blocks - 1,
            blocks_free=self._pool.get_num_free_blocks(),
            blocks_reserved=self._incoming.reserved_blocks,
            blocks_held=self._outgoing.held_blocks,
            running=running,
            waiting=waiting,
            step_ms=self._steps.mean_s * 1000,
            incoming=self._incoming.active,
            outgoing=self._outgoing.active,
        )

    def _list(self, name: str | None) -> AnyAnswer:
        if name is not None:
            found = self._find(name)
            if isinstance(found, Refused):
                return found
            return RequestList(requests=[] if found is None else [self._describe(found.request, name)])
        listed: list[RunningRequest] = []
        for followed in self._requests.values():
            # A client may have named its request in a way that no message can carry: the others are listed.
            with contextlib.suppress(ValidationError):
                listed.append(self._describe(followed.request, None))
        return RequestList(requests=listed[:MOST_REQUESTS])

    def _describe(self, request: Request, name: str | None) -> RunningRequest:
        unsupported = self._unsupported or vllm_internals.unsupported_request(request)
        refusal = None
        if unsupported is not None:
            refusal = Cause(reason=Reason.UNSUPPORTED, field=unsupported, detail=f"{unsupported} cannot be carried yet")
        lora = request.lora_request
        return RunningRequest(
            request=name or vllm_internals.names(request.request_id)[0],
            prompt_tokens=request.num_prompt_tokens,
            output_tokens=request.num_output_tokens,
            most_tokens=min(request.num_prompt_tokens + request.max_tokens, self._scheduler.max_model_len),
            blocks=len(vllm_internals.blocks_of(self._scheduler, request.request_id)),
            features=vllm_internals.features(request),
            adapter=None if lora is None else lora.lora_name,
            prompt_digest=None if name is None else prompt_digest(request),
            refusal=refusal,
        )

    def _find(self, name: str) -> Followed | Refused | None:
        """Clients name requests, and two may choose one name: who asks for it would get somebody else's."""
        found = [followed for followed in self._requests.values() if name in followed.names]
        if len(found) > 1:
            detail = f"request: {len(found)} run under the name {name!r}; one that no other has can move"
            return Refused(reason=Reason.UNKNOWN_REQUEST, field="request", detail=detail)
        return found[0] if found else None

    def _prepare(self, ask: Prepare) -> AnyAnswer:
        answer = self._incoming.prepare(ask, self._refusal(ask))
        if answer is not None:
            return answer
        return Prepared(
            migration=ask.migration, epoch=ask.epoch, lease_s=self._settings.lease_s, destination=self._destination
        )  # fmt: skip

    def _refusal(self, ask: Prepare) -> Refused | None:
        differing = differences(ask.fingerprint, self._fingerprint, ask.adapter)
        if ask.tokens == 0 and compatibility(differing) is not Compatibility.NEVER:
            differing = ()
        if differing:
            there, here = (getattr(print_, differing[0]) for print_ in (ask.fingerprint, self._fingerprint))
            detail = f"{differing[0]}: the source has {there!r}, this engine {here!r}"
            return Refused(reason=Reason.INCOMPATIBLE, field=differing[0], detail=detail)
        refused = sorted(REFUSED_FEATURES.intersection(ask.features))
        if self._unsupported or refused:
            feature = self._unsupported or refused[0]
            return Refused(reason=Reason.UNSUPPORTED, field=feature, detail=f"{feature} cannot be taken over yet")
        if ask.most_tokens > self._scheduler.max_model_len:
            detail = f"most_tokens: {ask.most_tokens} where this engine takes {self._scheduler.max_model_len}"
            return Refused(reason=Reason.TOO_LARGE, field="most_tokens", detail=detail)
        return None

    def _precopy(self, ask: Precopy) -> AnyAnswer:
        if ask.destination.instance == self.instance:
            return Refused(reason=Reason.SAME_ENGINE, detail="destination: it is this engine")
        found = self._find(ask.request)
        if isinstance(found, Refused):
            return found
        if found is not None:
            unsupported = self._unsupported or vllm_internals.unsupported_request(found.request)
            if unsupported:
                return Refused(reason=Reason.UNSUPPORTED, field=unsupported, detail=f"{unsupported} cannot be carried")
        return self._outgoing.precopy(ask, None if found is None else found.request)

    # What ranks tell of the data channels (`rank.RankEvents`)

    def begin_write(self, rank: int, migration: str, epoch: int, first: int, count: int) -> list[int] | None:
        with self.monitor:
            return self._incoming.begin_write(rank, migration, epoch, first, count)

    def end_write(self, rank: int, migration: str, first: int, count: int, whole: bool) -> int | None:
        if whole:
            self.metrics.received(count * self._ranks[rank].description.block_bytes)
        with self.monitor:
            placed = self._incoming.end_write(rank, migration, first, count, whole)
            self._placed.notify_all()
            return placed

    def word(self, migration: str, epoch: int, payload: bytes) -> bool:
        try:
            word = codec.decode(payload)
        except ValueError as error:
            log.warning("the word to begin for %s is refused: %s", migration, error)
            return False
        self.metrics.received(len(payload))
        with self.monitor:
            # It may have overtaken other ranks' blocks.
            self._placed.wait_for(lambda: self._incoming.settled(migration, epoch, word), self._settings.lease_s)
            return self._incoming.hand_over(migration, epoch, word)

    def ended(self, migration: str, epoch: int) -> None:
        with self.monitor:
            self._incoming.ended(migration, epoch)

    def acknowledged(self, rank: int, migration: str, epoch: int, blocks: int) -> None:
        with self.monitor:
            self._outgoing.acknowledged(rank, migration, epoch, blocks)

    def taken(self, migration: str, epoch: int) -> None:
        with self.monitor:
            self._outgoing.taken(migration, epoch)

    def refused(self, migration: str, epoch: int) -> None:
        with self.monitor:
            self._outgoing.refused(migration, epoch)

    def lost(self, address: str) -> None:
        with self.monitor:
            self._outgoing.lost(address)


def reachable(listen: str) -> str:
    """The host by which others reach an address that is listened at: this machine's own where it is any."""
    host, _ = host_and_port(listen)
    return socket.gethostbyname(socket.gethostname()) if host in ("", "0.0.0.0", "::") else listen.rpartition(":")[0]
