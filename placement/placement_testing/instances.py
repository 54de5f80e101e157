"""Synthetic fleets of any size, as numbers: what the solver is measured on.

Five model sizes (3-70B), seven GPU types, tensor parallel 1-8, bf16 and fp8: up to twelve variants per service that
hold its weights. What a replica does in a bucket comes from a roofline: a step reads the weights and the KV cache,
prefill computes; the batch is as large as memory and the objective allow. Sizes are mixtures in the shape of the two
Azure traces (conversation and code) plus a tail of long contexts, on a grid of 10 x 6 = 60 buckets. Rates are
log-uniform between 0.05 and 200 requests per second. Devices of each type are a share of what the fleet would take if
nothing were scarce.

Everything follows from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llmfleet.placement.solver.problem import Array, Problem, Service

INPUT_TOKENS = np.array([64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536], dtype=float)
OUTPUT_TOKENS = np.array([32, 96, 192, 384, 768, 1536], dtype=float)
VARIANTS = 12


@dataclass(frozen=True)
class Gpu:
    """A type: dense TFLOPS in bf16, bandwidth, memory, price per hour, watts at load, whether it computes in fp8."""

    name: str
    tflops: float
    gb_per_s: float
    memory_gb: float
    price: float
    watts: float
    fp8: bool


@dataclass(frozen=True)
class Model:
    """A model: parameters in billions, KV bytes per token in bf16."""

    billions: float
    kv_bytes: float


GPUS = (
    Gpu("l4", 121, 300, 24, 0.70, 72, True),
    Gpu("a10g", 70, 600, 24, 0.80, 150, False),
    Gpu("l40s", 362, 864, 48, 1.95, 350, True),
    Gpu("a100-40", 312, 1555, 40, 1.90, 400, False),
    Gpu("a100-80", 312, 2039, 80, 2.40, 400, False),
    Gpu("h100", 989, 3350, 80, 6.00, 700, True),
    Gpu("h200", 989, 4800, 141, 7.50, 700, True),
)
MODELS = (
    Model(3, 28_672 * 2),
    Model(8, 65_536 * 2),
    Model(14, 98_304 * 2),
    Model(32, 131_072 * 2),
    Model(70, 163_840 * 2),
)


def throughput(model: Model, gpu: Gpu, degree: int, bytes_per_weight: float, ttft_s: float, tpot_s: float) -> Array:
    """Requests per second of one replica by bucket, shape (60,); 0 where it misses the objective."""
    efficiency = 0.92 ** np.log2(degree)
    bandwidth = gpu.gb_per_s * 1e9 * degree * efficiency * 0.75
    flops = gpu.tflops * 1e12 * degree * efficiency * 0.5 * (1.7 if bytes_per_weight == 1 and gpu.fp8 else 1.0)
    weights = model.billions * 1e9 * bytes_per_weight
    room = gpu.memory_gb * 1e9 * degree * 0.9 - weights * 1.05
    if room <= 0:
        return np.zeros(len(INPUT_TOKENS) * len(OUTPUT_TOKENS))
    inputs, outputs = (grid.ravel() for grid in np.meshgrid(INPUT_TOKENS, OUTPUT_TOKENS, indexing="ij"))
    context = inputs + outputs / 2
    kv = model.kv_bytes * context
    prefill_s = 2 * model.billions * 1e9 * inputs / flops + 0.015
    per_request_s = kv / bandwidth + 2 * model.billions * 1e9 / flops
    batch = np.floor(np.minimum(room / (model.kv_bytes * (inputs + outputs)), 256))
    # Decoding shares the engine with the prefills of the requests that come in meanwhile.
    budget_s = tpot_s - weights / bandwidth - 0.002
    batch = np.minimum(batch, np.floor(budget_s / (per_request_s + prefill_s / outputs)))
    possible = (batch >= 1) & (prefill_s <= ttft_s)
    step_s = weights / bandwidth + 0.002 + np.maximum(batch, 1) * per_request_s
    rate = np.maximum(batch, 1) / (outputs * step_s + np.maximum(batch, 1) * prefill_s)
    found: Array = np.where(possible, rate, 0.0).astype(np.float64)
    return found


def sizes(chance: np.random.Generator) -> Array:
    """Shares of the buckets, shape (60,)."""

    def lognormal(grid: Array, median: float, sigma: float) -> Array:
        mass = np.exp(-0.5 * ((np.log(grid) - np.log(median)) / sigma) ** 2)
        share: Array = mass / mass.sum()
        return share

    conversation = np.outer(lognormal(INPUT_TOKENS, 1000, 1.1), lognormal(OUTPUT_TOKENS, 190, 0.7))
    code = np.outer(lognormal(INPUT_TOKENS, 1900, 0.9), lognormal(OUTPUT_TOKENS, 40, 0.9))
    long = np.outer(lognormal(INPUT_TOKENS, 20_000, 0.8), lognormal(OUTPUT_TOKENS, 400, 0.7))
    mix = chance.dirichlet([1.0, 0.7, 0.15])
    share = mix[0] * conversation + mix[1] * code + mix[2] * long
    share = share * np.exp(chance.normal(0, 0.2, share.shape))
    flat: Array = (share / share.sum()).ravel()
    return flat


def services(count: int, seed: int) -> list[Service]:
    """Services whose rows are: devices of each type, budget per hour, watts."""
    chance = np.random.default_rng(seed)
    found = []
    for number in range(count):
        model = MODELS[int(chance.choice(len(MODELS), p=[0.2, 0.3, 0.2, 0.15, 0.15]))]
        ttft_s, tpot_s = float(chance.choice([0.5, 1, 2, 5])), float(chance.choice([0.025, 0.04, 0.06, 0.1]))
        rate = float(np.exp(chance.uniform(np.log(0.05), np.log(200))))
        rates = sizes(chance) * rate
        options = []
        for position, gpu in enumerate(GPUS):
            for degree in (1, 2, 4, 8):
                for bytes_per_weight in (2.0, 1.0):
                    column = throughput(model, gpu, degree, bytes_per_weight, ttft_s, tpot_s) * chance.uniform(0.9, 1.1)
                    if (column > 0).any():
                        use = np.zeros(len(GPUS) + 2)
                        use[position] = degree
                        use[-2], use[-1] = degree * gpu.price, degree * gpu.watts
                        with np.errstate(divide="ignore"):
                            cheap = float((degree * gpu.price / column[column > 0]).min())
                        options.append((cheap / float((column > 0).mean()), column, use))
        # The twelve that look best, as a user's shortlist would, and always the one that serves most sizes.
        options.sort(key=lambda option: option[0])
        widest = max(options, key=lambda option: (int((option[1] > 0).sum()), -option[0]))
        shortlist = options[:VARIANTS] if widest in options[:VARIANTS] else [*options[: VARIANTS - 1], widest]
        columns = np.stack([column for _, column, _ in shortlist], axis=1)
        usage = np.stack([use for _, _, use in shortlist], axis=1)
        served = (columns > 0).any(axis=1)
        found.append(
            Service(
                key=f"team/s{number:04}",
                priority=int(chance.choice([50, 100, 200])),
                rates=rates[served],
                throughput=columns[served] * 0.8,
                cost=usage[-2].copy(),
                use=usage,
            )
        )
    return found


def fleet(
    count: int, seed: int, *, inventory: float = 0.8, budget: float | None = None, power: float | None = None
) -> Problem:
    """A fleet with `inventory` of the devices that it would take if nothing were scarce, at least eight of a type;
    `budget` and `power` as shares of what that would cost and draw, absent for no limit."""
    members = services(count, seed)
    wanted = np.zeros(len(GPUS) + 2)
    for service in members:
        price = np.where(np.isfinite(service.load), service.cost[None, :] * service.load, np.inf)
        best = price.argmin(axis=1)
        load = np.bincount(best, weights=service.load[np.arange(len(best)), best], minlength=service.variants)
        wanted += service.use @ np.ceil(load * 0.999)
    limits = np.maximum(np.floor(wanted * inventory), 8.0)
    limits[-2] = wanted[-2] * (budget if budget is not None else 1e3)
    limits[-1] = wanted[-1] * (power if power is not None else 1e3)
    return Problem(tuple(members), (*(gpu.name for gpu in GPUS), "budget", "power"), limits)


def in_force(problem: Problem, replicas: tuple[tuple[int, ...], ...], *, price: float = 0.1) -> Problem:
    """The same fleet with these replicas in force, and change at `price` of a replica's cost."""
    changed = [
        replace(service, previous=counts, switching=price * service.cost)
        for service, counts in zip(problem.services, replicas, strict=True)
    ]
    return Problem(tuple(changed), problem.rows, problem.limits)
