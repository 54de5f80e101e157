"""Which replica of a variant gets a request: the one where its last token is predicted to come first.

    replicas, request, hits of its prefix -> the replica with the least TTFT + expected output x TPOT

The loop reads every replica for every request, so it reads what `Replica` keeps reckoned and calls nothing. What is
the same for all replicas of a variant (the fit's base, the prompt's own prefill) cannot change the order and is left
out; `Replica.ttft_ms` is the whole prediction.

*Herds.* Several gateways that hear the same reports would all send to the same freest replica until the next report.
Where replicas also serve others, only two drawn at random are compared: the power of two choices (Mitzenmacher, IEEE
Transactions on Parallel and Distributed Systems 12, 2001), whose longest queue is exponentially shorter than with one
draw, and which needs no fresh reports. Replicas that hold most of the prompt's prefix are compared as well.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from llmfleet.api.llmservice import Objective
from llmfleet.gateway.policy.replicas import Replica

COMPARED = 16
"""Most replicas that one decision compares. The best of so many of a large fleet is as good as the best of all: with
each further choice the longest queue shrinks less (from log log n / log 2 to log log n / log 16)."""
_STRIDE = 7
SPILL_WITHIN = 0.8
"""Share of the objective within which a request must be predicted to stay on a replica of another variant: what is
spilled must not come back."""
NO_HITS: Mapping[Replica, float] = {}


def two_of(replicas: Sequence[Replica], drawn: random.Random) -> Sequence[Replica]:
    """Two replicas drawn at random, or all of fewer."""
    count = len(replicas)
    if count <= 2:
        return replicas
    first = int(drawn.random() * count)
    second = int(drawn.random() * (count - 1))
    return [replicas[first], replicas[second + (second >= first)]]


def in_turn(replicas: Sequence[Replica], turn: int) -> Sequence[Replica]:
    """All replicas, or of many a window that moves with each turn."""
    count = len(replicas)
    if count <= COMPARED:
        return replicas
    first = turn * _STRIDE % count
    beyond = first + COMPARED - count
    window = replicas[first : first + COMPARED]
    return window if beyond <= 0 else [*window, *replicas[:beyond]]


def least_latency(
    replicas: Sequence[Replica],
    prompt_tokens: float,
    output_tokens: float,
    now: float,
    hits: Mapping[Replica, float] = NO_HITS,
) -> Replica:
    """The replica of one variant with the least predicted latency; among equals the least loaded, then the longest
    unused. `hits`: tokens of the prompt that a replica has in its prefix cache.

    Raises ValueError if there is none.
    """
    if not replicas:
        raise ValueError("replicas must name at least one")
    per_token_s = replicas[0].latency.ttft_ms_per_input_token * 1e-3
    output_k = output_tokens * 1e-3
    best = replicas[0]
    least = math.inf
    for replica in replicas:
        latency_s = replica.ready_s - now
        if latency_s < replica.behind_s:
            latency_s = replica.behind_s
        latency_s += output_k * replica.pace_ms
        needed = prompt_tokens
        if hits:
            needed -= hits.get(replica, 0.0)
            latency_s += per_token_s * needed
        if replica.room_tokens < needed:
            latency_s += replica.kv_wait_ms(needed, output_tokens) * 1e-3
        if latency_s > least:
            continue
        if latency_s == least and (
            replica.in_flight > best.in_flight
            or (replica.in_flight == best.in_flight and replica.last_used >= best.last_used)
        ):
            continue
        best, least = replica, latency_s
    return best


def keeps(
    objective: Objective, replica: Replica, prompt_tokens: float, output_tokens: float, now: float, within: float = 1.0
) -> bool:
    """Whether a further request on a replica is predicted to stay within this share of the objective.

    `prompt_tokens`: those that are to be computed."""
    if replica.pace_ms > within * objective.tpot.milliseconds and output_tokens > 1.0:
        return False
    return replica.ttft_ms(prompt_tokens, output_tokens, now) <= within * objective.ttft.milliseconds
