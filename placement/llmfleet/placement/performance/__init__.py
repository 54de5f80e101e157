"""Performance: how fast one replica of a variant is at a load, how sure that is, and what load it may be given.

model.py        the interface: latency at (input tokens, output tokens, requests in flight), error, source
measured.py     out of a ModelProfile's points: interpolated inside their shapes, never better than what was seen
prior.py        out of the kernel measurements of `aiconfigurator-core`, where that optional package is installed
roofline.py     out of published hardware figures (hardware.py) and the model's architecture (architecture.py)
correction.py   what an engine in service is seen to do, as a bounded factor on any of the three
observation.py  what gateways saw of an engine, set against what was predicted for it
prefix.py       any of these where a share of every prompt is in the prefix cache
mixture.py      one replica under a mix of sizes
capacity.py     the largest load at which TTFT and TPOT both hold at their percentile
figures.py      all that a plan reads off a variant, remembered
throughput.py   what is read off the measured points directly
"""

from llmfleet.placement.performance.model import (
    BoolArray,
    FloatArray,
    Layered,
    PerformanceModel,
    Prediction,
    Source,
)
from llmfleet.placement.performance.throughput import (
    Miss,
    ThroughputColumn,
    closest_miss,
    fit_latency,
    implausibilities,
    meets,
    missed_by,
    points_at,
    throughput_column,
)

__all__ = [
    "BoolArray",
    "FloatArray",
    "Layered",
    "Miss",
    "PerformanceModel",
    "Prediction",
    "Source",
    "ThroughputColumn",
    "closest_miss",
    "fit_latency",
    "implausibilities",
    "meets",
    "missed_by",
    "points_at",
    "throughput_column",
]
