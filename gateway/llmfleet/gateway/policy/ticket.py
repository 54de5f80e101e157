"""One request on its way through the policy: what is expected of it, where it runs, and since when.

In flow the request's shape and prediction, and the prefixes that replicas hold; out flow the figures of this one
request on each of them. `Router` alone changes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfleet.api import Buckets
from llmfleet.api.llmservice import Objective
from llmfleet.gateway.policy.choice import keeps
from llmfleet.gateway.policy.prefix import BLOCK_CHARS, Hits
from llmfleet.gateway.policy.replicas import Replica
from llmfleet.gateway.policy.sizes import Prediction, RequestShape
from llmfleet.gateway.policy.state import ServiceState

if TYPE_CHECKING:
    from llmfleet.gateway.policy.decision import Decision


class Ticket:
    """One admitted request on its way through the policy. Opaque to the transport but for the read-only parts."""

    __slots__ = (
        "_bucket",
        "_buckets",
        "_first_s",
        "_hits",
        "_load_s",
        "_moved",
        "_prefill",
        "_sent_s",
        "_state",
        "arrived_s",
        "decision",
        "due",
        "explains",
        "prediction",
        "replica",
        "shape",
        "started",
    )

    def __init__(self, state: ServiceState, shape: RequestShape, prediction: Prediction, arrived_s: float) -> None:
        self._state = state
        self.arrived_s = arrived_s
        """Clock time at which it was admitted."""
        self.shape = shape
        self.prediction = prediction
        self.replica: Replica | None = None
        """Where it runs; None while it waits."""
        self.started = False
        """Whether its first token has come."""
        self._buckets: Buckets | None = None
        self._bucket = 0  # of these
        self._sent_s = 0.0
        self._first_s = 0.0
        self._load_s = 0.0
        """What its engine's `load_s` was when it was sent."""
        self._hits: Hits[Replica] | None = None
        """Who should have the beginning of its prompt; None: nobody was asked."""
        self._prefill = 0.0
        """Prompt tokens that its engine should have to compute."""
        self.explains = False
        """Whether the reasons of its next assignment are wanted."""
        self.decision: Decision | None = None
        """These reasons."""
        self.due = ""
        """The variant whose turn it was by the plan when it was assigned."""
        self._moved = False
        """Whether more than one engine worked on it, so that its times are nobody's."""

    @property
    def bucket(self) -> int:
        """Bucket of its predicted size. Where one request of a bucket finds no engine, no other does."""
        buckets = self._state.demand.buckets
        if buckets is not self._buckets:
            prediction = self.prediction
            self._bucket = buckets.index(prediction.prompt_tokens, prediction.output_tokens)
            self._buckets = buckets
        return self._bucket

    def hit_tokens(self, replica: Replica) -> float:
        """Prompt tokens that a replica should have in its prefix cache. An engine always computes the last one."""
        if not self._hits or not (blocks := self._hits.blocks(replica)):
            return 0.0
        tokens = blocks * BLOCK_CHARS / self._state.sizes.bytes_per_token
        return max(0.0, min(tokens, self.prediction.prompt_tokens - 1.0))

    def keeps(self, objective: Objective, replica: Replica, now: float, within: float = 1.0) -> bool:
        """Whether it is predicted to stay within this share of the objective on a replica."""
        prompt_tokens = self.prediction.prompt_tokens - self.hit_tokens(replica)
        return keeps(objective, replica, prompt_tokens, self.prediction.output_tokens, now, within)
