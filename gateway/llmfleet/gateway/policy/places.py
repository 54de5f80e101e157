"""Where a request that may be held back has a place now: on which replicas of which variants (`holding` says when).

request, the variants that may get it -> any place? -> the replica, where the first choice has none
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from llmfleet.gateway.policy.choice import SPILL_WITHIN, least_latency
from llmfleet.gateway.policy.holding import has_place
from llmfleet.gateway.policy.replicas import Replica
from llmfleet.gateway.policy.split import Split
from llmfleet.gateway.policy.state import ServiceState
from llmfleet.gateway.policy.ticket import Ticket


class Places:
    """Where there is a place for a request: on the variants that may get it, or, where waiting for these is predicted
    to break the objective, on any that is predicted to keep it."""

    __slots__ = ("_batch", "_now", "_objective", "_options", "_state", "_ticket", "_variants")

    def __init__(
        self, state: ServiceState, options: Mapping[str, float], ticket: Ticket, now: float, *, batch: bool
    ) -> None:
        """Raises ValueError where the service has no objective: then nothing is held back."""
        objective = state.objective
        if objective is None:
            raise ValueError("the service has no objective")
        self._state = state
        self._options = options
        self._ticket = ticket
        self._objective = objective
        self._now = now
        self._batch = batch
        self._variants: Collection[str] = options

    def _has(self, name: str, replica: Replica) -> bool:
        ticket, objective, now = self._ticket, self._objective, self._now
        return has_place(replica, ticket.prediction, objective, now, batch=self._batch) and (
            name in self._options or ticket.keeps(objective, replica, now, SPILL_WITHIN)
        )

    def any(self) -> bool:
        """Whether there is one."""
        if self._any():
            return True
        if self._batch or len(self._state.variants) == len(self._options) or not self._late():
            return False
        self._variants = self._state.variants
        return self._any()

    def _any(self) -> bool:
        for name in self._variants:
            for replica in self._state.ready(name, self._now):
                if self._has(name, replica):
                    return True
        return False

    def _late(self) -> bool:
        size, now = self._ticket.prediction, self._now
        least_ms = min(
            replica.ttft_ms(size.prompt_tokens - self._ticket.hit_tokens(replica), size.output_tokens, now)
            for name in self._options
            for replica in self._state.ready(name, now)
        )
        return (now - self._ticket.arrived_s) * 1e3 + least_ms > self._objective.ttft.milliseconds

    def instead_of(self, replica: Replica, split: Split[str]) -> Replica:
        """The replica if it has a place; else the best of its variant that has, or of another one."""
        prediction = self._ticket.prediction
        if has_place(replica, prediction, self._objective, self._now, batch=self._batch):
            return replica
        chosen = replica.engine.variant
        names = sorted(self._variants, key=lambda one: (one != chosen, one not in self._options, -split.credit(one)))
        for name in names:
            free = [one for one in self._state.ready(name, self._now) if self._has(name, one)]
            if free:
                if name != chosen:
                    split.instead(chosen, name)
                hits = {one: self._ticket.hit_tokens(one) for one in free}
                return least_latency(free, prediction.prompt_tokens, prediction.output_tokens, self._now, hits)
        return replica
