"""`llmfleet profile --buckets-from`: the fewest buckets that suit the requests of a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from llmfleet.api import Buckets
from llmfleet.cli.refused import RefusedError
from llmfleet.cli.traces import read_sizes
from llmfleet.placement.workload import Histogram, fitted_buckets

_LEAST_OUTPUT_TOKENS = 2
"""Shorter answers cannot be measured: the time per output token is that between tokens."""


def buckets_from(trace: Path, most_excess: float) -> tuple[Buckets, str]:
    """Buckets fitted to a trace, and a line that says how well they fit. Raises RefusedError."""
    sizes = read_sizes(trace)
    workload = Histogram.of_trace(sizes, 1.0)
    workload = replace(workload, output_tokens=np.maximum(workload.output_tokens, _LEAST_OUTPUT_TOKENS))
    try:
        found = fitted_buckets(workload, most_excess)
    except ValueError as error:
        raise RefusedError(f"{trace}: {error} (--bucket-excess)") from error
    return found.buckets, (
        f"{len(found.buckets.input_tokens)} input and {len(found.buckets.output_tokens)} output edges for the "
        f"{sizes.requests} requests of {trace}: prompts are over-estimated by {found.input_excess:.1%}, answers by "
        f"{found.output_excess:.1%}"
    )


def buckets_yaml(buckets: Buckets) -> str:
    """Buckets as they stand under `spec` of a ModelProfile."""
    text: str = yaml.safe_dump({"buckets": buckets.to_wire()}, sort_keys=False, default_flow_style=None, width=120)
    return text
