"""How far a plan has to look ahead, and what demand it then has to be ready for.

    ServiceForecast, demand of now, start-up time --demand_ahead--> the most of each bucket until a replica started now
                                                                    would serve

A replica that is started now serves when its start-up time is over: what comes before that must be prepared for now or
never. What comes later the next plans see in time. The demand of now always counts, so that a forecast can only add:
one that is too low takes nothing away. The longest start-up time among the variants that may be chosen counts for all,
since which one will be is not known before it is planned.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from llmfleet.api import GPUType, LLMService, ServiceForecast
from llmfleet.placement.workload.histogram import FloatArray


def startup_seconds(service: LLMService, gpu_types: Iterable[GPUType]) -> float:
    """Seconds from a plan to the moment when the slowest of what it may start serves: a node where an autoscaler may
    have to add one, and the engine."""
    nodes = [one.spec.provisionable.startup_seconds for one in gpu_types if one.spec.provisionable is not None]
    return float(max(nodes, default=0) + service.spec.engine.startup_seconds)


def demand_ahead(forecast: ServiceForecast, now_rps: FloatArray, within_s: float) -> FloatArray:
    """The most requests per second of each bucket from now until `within_s` seconds later, shape (buckets,)."""
    times = np.array([0.0, *(point.after_seconds for point in forecast.points)])
    rates = np.array([now_rps, *(point.rps for point in forecast.points)])
    inside = rates[times <= within_s].max(axis=0)
    # The last known rate stands for what comes after: all points are then inside.
    at_the_end = np.array([np.interp(within_s, times, bucket) for bucket in rates.T])
    most: FloatArray = np.maximum(np.maximum(inside, at_the_end), now_rps)
    return most
