"""The workload: how many requests per second of which sizes, from wherever it is known.

    traces      lines of a trace file -> requests
    histogram   requests, what a user expects, or what gateways counted -> cells of sizes with their rates
    edges       the buckets that suit a histogram: the fewest that keep the over-estimate of its tokens below a bound
    sizes       what was seen of a bucket's requests -> the size that stands for them
    demand      one service's histogram by bucket of its profile, which is where a workload enters a plan

Pure: lines in, numbers out. Knows nothing of GPUs, latency or cost.
"""

from llmfleet.placement.workload.ahead import startup_seconds
from llmfleet.placement.workload.demand import BucketDemand, bucket_demand, known_sizes, settled_demand
from llmfleet.placement.workload.edges import FittedBuckets, fitted_buckets
from llmfleet.placement.workload.histogram import Histogram, TraceSizes, lower_edges, trace_sizes
from llmfleet.placement.workload.sizes import planned_sizes, settled
from llmfleet.placement.workload.traces import Request, TraceError, requests_of

__all__ = [
    "BucketDemand",
    "FittedBuckets",
    "Histogram",
    "Request",
    "TraceError",
    "TraceSizes",
    "bucket_demand",
    "fitted_buckets",
    "known_sizes",
    "lower_edges",
    "planned_sizes",
    "requests_of",
    "settled",
    "settled_demand",
    "startup_seconds",
    "trace_sizes",
]
