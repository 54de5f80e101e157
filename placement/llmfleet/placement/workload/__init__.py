"""The workload: how many requests per second of which sizes, from wherever it is known.

    traces      lines of a trace file -> requests
    histogram   requests, what a user expects, or what gateways counted -> cells of sizes with their rates
    demand      one service's histogram by bucket of its profile, which is where a workload enters a plan

Pure: lines in, numbers out. Knows nothing of GPUs, latency or cost.
"""

from llmfleet.placement.workload.demand import BucketDemand, bucket_demand
from llmfleet.placement.workload.histogram import Histogram, TraceSizes, lower_edges, trace_sizes
from llmfleet.placement.workload.traces import Request, TraceError, requests_of

__all__ = [
    "BucketDemand",
    "Histogram",
    "Request",
    "TraceError",
    "TraceSizes",
    "bucket_demand",
    "lower_edges",
    "requests_of",
    "trace_sizes",
]
