"""What was demanded: the counts behind the admin port's `GET /v1/demand`.

Every admitted request is in exactly one place: waiting, running, completed or abandoned. Arrivals and completions
only grow, so that the operator can take differences; a change of the bucket edges starts them anew, because counts
of other edges mean something else.
"""

from __future__ import annotations

from llmfleet.api import Buckets, ServiceDemand
from llmfleet.gateway.policy.observed import Observations, Sizes


class DemandCount:
    """Cumulative counts of one service."""

    __slots__ = ("abandoned", "arrived", "buckets", "completed", "observed", "running", "sizes", "waiting")

    def __init__(self, buckets: Buckets) -> None:
        self.rebucket(buckets)
        self.waiting = 0
        self.running = 0
        self.abandoned = 0
        """Requests that ended without an answer: the client left, no engine came, the engine refused or died."""

    def rebucket(self, buckets: Buckets) -> None:
        """Starts the cumulative counts anew with other edges. What waits or runs still does."""
        self.buckets = buckets
        self.arrived = [0] * len(buckets.input_tokens)
        self.completed = [0] * buckets.count
        self.sizes = Sizes(buckets)
        self.observed = Observations(buckets)

    @property
    def seen(self) -> bool:
        """Whether there is anything to report."""
        return any(self.arrived) or any(self.completed) or self.waiting > 0 or self.running > 0

    def report(self, namespace: str, service: str) -> ServiceDemand:
        """The counts as they go over the wire."""
        return ServiceDemand(
            namespace=namespace,
            service=service,
            buckets=self.buckets,
            arrived=list(self.arrived),
            completed=list(self.completed),
            waiting=self.waiting,
            running=self.running,
        )
