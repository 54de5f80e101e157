"""One engine as this gateway sees it, and the choice among a variant's engines.

Latency is predicted from the variant's fit (`LatencyCoefficients`) and what this gateway has in flight there. The
prompts of requests that have no first token yet stand before a new one; the requests in flight slow its tokens down:

    TTFT = base + per input token * (prompt + prompts without a first token)
    TPOT = base + per running * in flight

An engine that failed gets nothing for a while: 0.5 s, doubled with each further failure up to 30 s. Then one request
probes it; only its success opens the engine again (a half-open circuit breaker). Readiness in Kubernetes lags by a
probe period; this does not.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmfleet.api import LatencyCoefficients
from llmfleet.gateway.fleet import Engine

EJECTION_FIRST_S = 0.5
EJECTION_LONGEST_S = 30.0


class Replica:
    """In-flight counts and health of one engine."""

    __slots__ = (
        "_load_at",
        "answers",
        "engine",
        "failures",
        "in_flight",
        "last_used",
        "load_s",
        "probing",
        "retry_at",
        "unstarted",
        "unstarted_tokens",
    )

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.in_flight = 0
        """Requests sent and not finished."""
        self.answers = 0
        """Answers that these will get: a request may ask for several, which the engine works on side by side."""
        self.load_s = 0.0
        """Integral of `answers` over time up to the last `weigh`: two readings, divided by the time between them, are
        the mean load."""
        self._load_at = 0.0
        self.unstarted = 0
        """Requests sent that have no first token yet."""
        self.unstarted_tokens = 0.0
        """Prompt tokens of these."""
        self.last_used = 0
        """Sequence number of the last request, so that equal engines take turns."""
        self.failures = 0
        """Failures since the last success."""
        self.retry_at = 0.0
        """Clock time at which an ejected engine may be probed, in seconds."""
        self.probing = False
        """Whether a probe is on its way."""

    def weigh(self, now: float, change: int = 0) -> float:
        """Brings `load_s` to `now`, gives it, and changes the number of answers."""
        self.load_s += self.answers * (now - self._load_at)
        self._load_at = now
        self.answers += change
        return self.load_s

    def available(self, now: float) -> bool:
        """Whether the engine may get a request now."""
        return self.failures == 0 or (now >= self.retry_at and not self.probing)

    def eject(self, now: float) -> None:
        """Notes a failure."""
        self.failures += 1
        self.probing = False
        self.retry_at = now + min(EJECTION_LONGEST_S, EJECTION_FIRST_S * 2.0 ** min(self.failures - 1, 16))

    def restore(self) -> None:
        """Notes a success: the engine gets its full share again."""
        self.failures = 0
        self.probing = False

    def predicted_ms(self, latency: LatencyCoefficients, prompt_tokens: float, output_tokens: float) -> float:
        """Predicted time from sending a request to its last token, in milliseconds."""
        ttft = latency.ttft_base_ms + latency.ttft_ms_per_input_token * (prompt_tokens + self.unstarted_tokens)
        tpot = latency.tpot_base_ms + latency.tpot_ms_per_running * self.in_flight
        return ttft + output_tokens * tpot


def least_latency(
    replicas: Iterable[Replica], latency: LatencyCoefficients, prompt_tokens: float, output_tokens: float
) -> Replica:
    """The replica with the least predicted latency; among equals the least loaded, then the longest unused.

    Raises ValueError if there is none.
    """
    return min(
        replicas,
        key=lambda r: (r.predicted_ms(latency, prompt_tokens, output_tokens), r.in_flight, r.last_used),
    )
