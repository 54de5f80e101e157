"""What the routing rows send, and the engine that they send it to.

    loads(seed)  -> name, arrivals at one request per second    stretched by `at_rate` to the rate wanted
    ENGINE, FIT  the engine model, and the straight lines that a router is told of it

Sizes: Llumnix's three length distributions (OSDI'24, table of section 6: mean, P50, P80, P95, P99; at most 6,000
tokens), drawn by interpolating the logarithm between those quantiles. "S-L" is short prompts and long answers. Times:
Poisson, or gamma-distributed gaps with coefficients of variation of 2 to 8 as in the paper. And Azure's 2023 traces of
conversations and code (Azure Public Dataset, CC-BY 4.0; Patel et al., Splitwise, ISCA'24), sizes and times as they
were.

Engine: an A10 with a 7B model as in the paper: KV cache of 13,616 tokens, 14 GB of weights read at 520 GB/s in a step,
0.5 MB of KV per token read at the same rate, 70 TFLOPS in prefill.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

from llmfleet.api import LatencyCoefficients
from llmfleet.simulator import Arrival, EngineSpec, StepTime
from llmfleet.simulator.arrivals import at_rate, renewal
from llmfleet.simulator.traces import read_trace

TRACES = Path(__file__).parents[2] / "simulator" / "traces"
LONGEST = 6000
# Quantiles as the paper gives them; (0, 1) and (1, LONGEST) close the curve.
_POWER_LAWS = {
    "S": ((0.5, 38), (0.8, 113), (0.95, 413), (0.99, 1464)),
    "M": ((0.5, 32), (0.8, 173), (0.95, 1288), (0.99, 4208)),
    "L": ((0.5, 55), (0.8, 582), (0.95, 3113), (0.99, 5166)),
}
ENGINE = EngineSpec(
    step=StepTime(overhead_ms=2.0, weights_ms=27.0, token_ms=0.2, sequence_ms=0.05, context_token_ms=0.001),
    kv_blocks=13_616 // 16,
)
FIT = LatencyCoefficients(ttft_base_ms=29.0, ttft_ms_per_input_token=0.2, tpot_base_ms=29.0, tpot_ms_per_running=0.4)
"""Per running: the sequence's own share and the KV of 350 tokens."""


def power_law(name: str, share: float) -> int:
    """The size that this share of the requests stays below, in tokens."""
    points = ((0.0, 1), *_POWER_LAWS[name], (1.0, LONGEST))
    for (low, small), (high, large) in pairwise(points):
        if share <= high:
            part = (share - low) / (high - low)
            return max(1, round(math.exp(math.log(small) + part * (math.log(large) - math.log(small)))))
    return LONGEST


def drawn(lengths: str, count: int, seed: int, *, cv: float = 1.0) -> list[Arrival]:
    """`count` requests, one a second in the mean; `lengths` such as "S-L": prompts and answers.

    cv: coefficient of variation of the gaps; 1 is a Poisson process.
    """
    prompt, answer = lengths.split("-")
    chance = random.Random(f"{lengths} {seed}")
    sizes = [(power_law(prompt, chance.random()), power_law(answer, chance.random())) for _ in range(count)]
    times = renewal([(1, 1)], 1.0, count, seed=seed, cv2=cv * cv)
    return [Arrival(one.at_s, *size) for one, size in zip(times, sizes, strict=True)]


def azure(name: str, count: int, part: int) -> list[Arrival]:
    """`count` requests of a trace, one a second in the mean, from `part` times as far into it; longer ones are left
    out, as the engine cannot hold them."""
    whole = read_trace(TRACES / f"azure_{name}_2023.csv")
    fitting = [one for one in whole if one.input_tokens + one.output_tokens <= 2 * LONGEST]
    first = part * (len(fitting) - count) // 5
    return at_rate(fitting[first : first + count], 1.0)
