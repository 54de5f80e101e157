"""Which replica of a variant gets a request: the one where its last token is predicted to come first.

    replicas, request, hits of its prefix -> the replica with the least TTFT + expected output x TPOT

The loop reads every replica for every request, so it reads what `Replica` keeps reckoned and calls nothing. What is
the same for all replicas of a variant (the fit's base, the prompt's own prefill) cannot change the order and is left
out; `Replica.ttft_ms` is the whole prediction.

*Herds.* Several gateways that hear the same reports would all send to the same freest replica until the next report.
Where replicas also serve others, only two drawn at random are compared: the power of two choices (Mitzenmacher, IEEE
Transactions on Parallel and Distributed Systems 12, 2001), whose longest queue is exponentially shorter than with one
draw, and which needs no fresh reports. A replica that holds some of the prompt's prefix is compared as well.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from llmfleet.api.llmservice import Objective
from llmfleet.gateway.policy.replicas import Replica
from llmfleet.gateway.policy.sizes import Prediction

NO_HITS: Mapping[Replica, float] = {}


def two_of(replicas: Sequence[Replica], hits: Mapping[Replica, float], drawn: random.Random) -> list[Replica]:
    """Two replicas drawn at random (all of fewer), and those that hold some of the prefix."""
    count = len(replicas)
    if count <= 2:
        return list(replicas)
    first = int(drawn.random() * count)
    second = int(drawn.random() * (count - 1))
    pair = [replicas[first], replicas[second + (second >= first)]]
    return pair + [one for one in hits if one not in pair and one in replicas] if hits else pair


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
        if latency_s < least or (latency_s == least and _before(replica, best)):
            best, least = replica, latency_s
    return best


def _before(one: Replica, other: Replica) -> bool:
    return (one.in_flight, one.last_used) < (other.in_flight, other.last_used)


def keeps(objective: Objective, replica: Replica, prediction: Prediction, now: float, within: float = 1.0) -> bool:
    """Whether a further request on a replica is predicted to stay within this share of the objective."""
    if replica.pace_ms > within * objective.tpot.milliseconds and prediction.output_tokens > 1.0:
        return False
    ttft_ms = replica.ttft_ms(prediction.prompt_tokens, prediction.output_tokens, now)
    return ttft_ms <= within * objective.ttft.milliseconds
