"""Every decision of the gateway, and no I/O: which variant, which replica, what to expect, what was demanded.

    Split        a bucket's fractions -> a low-variance sequence of variants
    SizeModel    bytes of a prompt -> tokens; what to expect of the answer -> bucket
    Replica      one engine as this gateway sees it: in flight, reports, predicted latency, ejection
    choice       the replicas of a variant -> the one with the least predicted latency
    DemandCount  arrivals and completions by bucket, sizes, what engines took -> DemandReport
    WaitingRoom  who of those who wait is next: class, tenants' service so far, urgency
    RateBook     what a key's tenant may ask for, by requests and tokens
    Router       all but these two together, behind one interface for the transport and the simulator

Time comes in through a clock; nothing here sleeps, logs or opens a socket.
"""

from llmfleet.gateway.policy.admission import Claim, WaitingRoom, expected_service, service_of
from llmfleet.gateway.policy.rates import RateBook
from llmfleet.gateway.policy.reports import EngineReport
from llmfleet.gateway.policy.router import Router
from llmfleet.gateway.policy.sizes import RequestShape, Usage
from llmfleet.gateway.policy.ticket import Ticket

__all__ = [
    "Claim",
    "EngineReport",
    "RateBook",
    "RequestShape",
    "Router",
    "Ticket",
    "Usage",
    "WaitingRoom",
    "expected_service",
    "service_of",
]
