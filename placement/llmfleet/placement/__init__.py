"""Placement: which GPU types, how many replicas, and which requests go where, for the whole fleet in one solve.

    plan(inputs, previous, warm=None) -> (Plan, WarmState)

Pure: no Kubernetes, no files, no network; the clock is an argument. `PlanInputs` is everything a plan depends on.
"""

from llmfleet.placement.fleet import WarmState
from llmfleet.placement.inputs import Demand, PlanInputs
from llmfleet.placement.planner import plan

__all__ = ["Demand", "PlanInputs", "WarmState", "plan"]
