"""One engine as this gateway sees it: what it has to do, and what a further request would see there.

Latency is predicted from the variant's fit (`LatencyCoefficients`), from what this gateway has in flight there, and
from what others have as far as the engine has lately said so (`reports`):

    TTFT = base + prompt's own prefill + backlog + wait for KV cache
    TPOT = base + per running * requests there

*Backlog* is the prefill of the prompts that have no first token yet. It is worked off while it waits, so it is kept as
the time at which it will be done: a prompt moves that time back, and each first token says anew how much is left. An
engine that is slower than its fit never seems done: what stands behind the oldest prompt still has to come.

*Wait for KV cache.* An engine whose cache is full lets nobody in before somebody leaves. Of M tokens in use M / W leave
per unit of time, where W is how long a request stays (Little's law in tokens), so who needs D more than there is waits
D * W / M. Llumnix's virtual usage counts the same demand: those who wait count as if they were in.

An engine that failed gets nothing for a while: 0.5 s, doubled with each further failure up to 30 s. Then one request
probes it; only its success opens the engine again (a half-open circuit breaker). Readiness in Kubernetes lags by a
probe period; this does not.
"""

from __future__ import annotations

import math

from llmfleet.api import LatencyCoefficients
from llmfleet.gateway.fleet import Engine
from llmfleet.gateway.policy.reports import FRESH_S, NOBODY, EngineReport, others_of

UNKNOWN = LatencyCoefficients(ttft_base_ms=0, ttft_ms_per_input_token=0, tpot_base_ms=0, tpot_ms_per_running=0)
"""Fit of a variant that is not in the table: its engines get no requests."""
EJECTION_FIRST_S = 0.5
EJECTION_LONGEST_S = 30.0


class Replica:
    """In-flight counts, reports and health of one engine."""

    __slots__ = (
        "_load_at",
        "_prompts",
        "answers",
        "behind_s",
        "done_s",
        "engine",
        "failures",
        "fresh_until_s",
        "in_flight",
        "kv_tokens",
        "last_used",
        "latency",
        "load_s",
        "others",
        "own_tokens",
        "pace_ms",
        "probing",
        "ready_s",
        "retry_at",
        "room_tokens",
        "unstarted_tokens",
    )

    def __init__(self, engine: Engine, latency: LatencyCoefficients = UNKNOWN) -> None:
        self.engine = engine
        self.latency = latency
        """Fit of its variant."""
        self.in_flight = 0
        """Requests sent and not finished."""
        self.answers = 0
        """Answers that these will get: a request may ask for several, which the engine works on side by side."""
        self.load_s = 0.0
        """Integral of `answers` over time up to the last `weigh`: two readings, divided by the time between them, are
        the mean load."""
        self._load_at = 0.0
        self._prompts: dict[object, tuple[float, float]] = {}  # without a first token, oldest first: sent at, tokens
        self.unstarted_tokens = 0.0
        """Prompt tokens of these."""
        self.own_tokens = 0.0
        """Prompt tokens of all in flight."""
        self.done_s = 0.0
        """Clock time at which the prompts that have no first token yet should be computed."""
        self.ready_s = 0.0
        """`done_s`, with others' prompts."""
        self.behind_s = 0.0
        """Prefill, in seconds, that a further prompt stands behind even if the oldest of these is done at once."""
        self.pace_ms = latency.tpot_base_ms
        """Predicted time per token of a further request, in milliseconds."""
        self.room_tokens = math.inf
        """What the KV cache has left when all that is there has been let in; infinite while its size is unknown."""
        self.others = NOBODY
        """What others have there, by the last report."""
        self.kv_tokens = 0
        """Tokens that its KV cache holds; 0 while that is unknown."""
        self.fresh_until_s = 0.0
        """Clock time until which the last report counts."""
        self.last_used = 0
        """Sequence number of the last request, so that equal engines take turns."""
        self.failures = 0
        """Failures since the last success."""
        self.retry_at = 0.0
        """Clock time at which an ejected engine may be probed, in seconds."""
        self.probing = False
        """Whether a probe is on its way."""

    def adopt(self, engine: Engine, latency: LatencyCoefficients | None) -> None:
        """Takes on what the newest fleet says of it; `latency` is None where its variant is not in the table."""
        self.engine = engine
        if latency is not None and latency != self.latency:
            self.latency = latency
            self._reckon()

    @property
    def unstarted(self) -> int:
        """Requests sent that have no first token yet."""
        return len(self._prompts)

    @property
    def oldest(self) -> tuple[float, float]:
        """(clock time at which it was sent, prompt tokens) of the oldest of these requests; there must be one."""
        return next(iter(self._prompts.values()))

    # What it has to do

    def send(self, request: object, prompt_tokens: float, now: float) -> None:
        """A request goes there. `request` is any hashable that names it."""
        self.in_flight += 1
        self.own_tokens += prompt_tokens
        self._prompts[request] = now, prompt_tokens
        self.unstarted_tokens += prompt_tokens
        self.done_s = max(now, self.done_s) + self.latency.ttft_ms_per_input_token * prompt_tokens * 1e-3
        self._reckon()

    def start(self, request: object, now: float) -> None:
        """A request that was sent there got its first token."""
        self._done(request, now)
        self._reckon()

    def leave(self, request: object, prompt_tokens: float, now: float) -> None:
        """A request is there no more."""
        self.in_flight -= 1
        self.own_tokens = self.own_tokens - prompt_tokens if self.in_flight else 0.0
        if request in self._prompts:
            self._done(request, now)
        self._reckon()

    def _done(self, request: object, now: float) -> None:
        _, tokens = self._prompts.pop(request)
        self.unstarted_tokens = self.unstarted_tokens - tokens if self._prompts else 0.0
        self.done_s = now + self.latency.ttft_ms_per_input_token * self.unstarted_tokens * 1e-3

    def _reckon(self) -> None:
        """What the choice among many replicas reads, brought up to date with everything that does not change by
        itself."""
        latency, others = self.latency, self.others
        behind = self.unstarted_tokens - self.oldest[1] if self._prompts else 0.0
        per_token_s = latency.ttft_ms_per_input_token * 1e-3
        self.behind_s = per_token_s * (behind + others.queue_tokens)
        self.ready_s = self.done_s + per_token_s * others.queue_tokens
        self.pace_ms = latency.tpot_base_ms + latency.tpot_ms_per_running * (self.in_flight + others.in_flight)
        self.room_tokens = self.kv_tokens - self.own_tokens - others.kv_tokens if self.kv_tokens else math.inf

    def weigh(self, now: float, change: int = 0) -> float:
        """Brings `load_s` to `now`, gives it, and changes the number of answers."""
        self.load_s += self.answers * (now - self._load_at)
        self._load_at = now
        self.answers += change
        return self.load_s

    def hear(self, report: EngineReport, mean_prompt_tokens: float) -> None:
        """Takes in what the engine says; what is older than what it said last is dropped."""
        if report.at_s + FRESH_S <= self.fresh_until_s:
            return
        self.fresh_until_s = report.at_s + FRESH_S
        self.kv_tokens = report.kv_tokens
        self.others = others_of(
            report,
            in_flight=self.in_flight,
            held_tokens=self.own_tokens - self.unstarted_tokens,
            mean_prompt_tokens=mean_prompt_tokens,
        )
        self._reckon()

    def forget_stale(self, now: float) -> None:
        """Drops what others have there where the last report is too old."""
        if self.others is not NOBODY and now >= self.fresh_until_s:
            self.others, self.kv_tokens = NOBODY, 0
            self._reckon()

    # Health

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

    # What a further request would see

    def backlog_ms(self, now: float) -> float:
        """Prefill that a further prompt stands behind, in milliseconds."""
        return max(self.ready_s - now, self.behind_s) * 1e3

    def kv_wait_ms(self, prompt_tokens: float, output_tokens: float) -> float:
        """Predicted wait until the KV cache has room for the prompt, in milliseconds; 0 where its size is unknown."""
        lacking = prompt_tokens - self.room_tokens
        used = self.kv_tokens - self.room_tokens
        return lacking / used * output_tokens * self.pace_ms if lacking > 0.0 and used > 0.0 else 0.0

    def ttft_ms(self, prompt_tokens: float, output_tokens: float, now: float) -> float:
        """Predicted time to first token of a further request with so many prompt tokens to compute."""
        own = self.latency.ttft_base_ms + self.latency.ttft_ms_per_input_token * prompt_tokens
        return own + self.backlog_ms(now) + self.kv_wait_ms(prompt_tokens, output_tokens)
