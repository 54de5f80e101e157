"""A fleet without machines: the real policies on modelled engines, in simulated time.

    spec        EngineSpec: what a step of an engine costs, and what its scheduler may put into one
    engine      one engine with continuous batching, a pure discrete-event model
    arrivals    when requests come: those of a trace, or drawn
    traces      trace files as arrivals
    replay      arrivals through the gateway's own policy and a plan's routing table into the engines
    attainment  whether an objective was kept, with what a finite run can prove
    fit         the spec under which the model shows what a real engine showed

The engine model exists to judge plans, so it shares no formula with the planner: `placement` reckons with rates and
percentiles, this moves tokens.
"""

from llmfleet.simulator.arrivals import Arrival
from llmfleet.simulator.attainment import ObjectiveAttainment, attainment
from llmfleet.simulator.engine import Engine, Event, Job
from llmfleet.simulator.replay import SecondStage, Served, replay, routing_table, staged_tables
from llmfleet.simulator.spec import EngineSpec, StepTime

__all__ = [
    "Arrival",
    "Engine",
    "EngineSpec",
    "Event",
    "Job",
    "ObjectiveAttainment",
    "SecondStage",
    "Served",
    "StepTime",
    "attainment",
    "replay",
    "routing_table",
    "staged_tables",
]
