"""The planner process: holds the inputs of the plan, solves when asked, answers with what changed.

A solve takes seconds of one core and the solver's libraries take memory, so neither is in the operator's process. It
imports only `api` and `placement`. It answers on the file that was its standard output; anything that a library
prints goes to standard error instead, and so cannot break a frame. It ends when its input ends.

In shadow mode nobody carries the plan out, so every solve starts from the plan in force, not from the last answer.

Every plan is checked before it is answered. One that breaks a constraint is a bug in the solver: it is dropped with all
that the solver remembers, and the plan in force stays what the next solve starts from.
"""

from __future__ import annotations

import os
import resource
import sys
import time
import traceback
from typing import Any, BinaryIO

from llmfleet.api import GPUType, LLMService, ModelProfile, Plan, PowerDomain, ServicePlan
from llmfleet.operator.planner_protocol import (
    Drop,
    Failed,
    Learn,
    Learned,
    Put,
    Rejected,
    Solve,
    Solved,
    differences,
    frames,
    read_request,
)
from llmfleet.placement import Demand, PlanInputs, WarmState, plan, violations
from llmfleet.placement.conflicts import with_conflicts
from llmfleet.placement.learning import learn, news

_MODELS: dict[str, type[GPUType | LLMService | ModelProfile | PowerDomain]] = {
    model.KIND: model for model in (GPUType, LLMService, ModelProfile, PowerDomain)
}

_REPORTED = 10
"""Violations of one plan that are told; more say nothing new."""


class Planner:
    """Inputs by kind and key, and the last plan."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[str, Any]] = {kind: {} for kind in _MODELS}
        self._previous: Plan | None = None
        self._warm: WarmState | None = None
        self._answered: dict[str, ServicePlan] = {}
        self._shadow = False

    def put(self, message: Put) -> None:
        """Stores an object, unless it is one that says nothing new to a plan."""
        held, new = self._objects[message.kind].get(message.key), _MODELS[message.kind].parse(message.object)
        if isinstance(held, ModelProfile) and isinstance(new, ModelProfile) and not news(held, new):
            return
        self._objects[message.kind][message.key] = new

    def drop(self, message: Drop) -> None:
        """Forgets an object."""
        self._objects[message.kind].pop(message.key, None)

    def solve(self, message: Solve) -> Solved | Rejected:
        """Plans with the stored objects."""
        began = time.perf_counter()
        inputs = PlanInputs(
            services=list(self._objects[LLMService.KIND].values()),
            unreadable=message.unreadable,
            profiles=list(self._objects[ModelProfile.KIND].values()),
            gpu_types=list(self._objects[GPUType.KIND].values()),
            power_domains=list(self._objects[PowerDomain.KIND].values()),
            inventory=message.inventory,
            demand={key: Demand(rps=one.rps, sizes=one.sizes) for key, one in message.demand.items()},
            policy=message.policy,
            at=message.at,
        )
        self._previous = self._previous or message.previous
        decided, self._warm = plan(inputs, self._previous, self._warm)
        broken = violations(inputs, decided, self._previous)
        if broken:
            self._warm = None
            return Rejected(violations=[str(violation) for violation in broken[:_REPORTED]], count=len(broken))
        before = [] if self._previous is None else self._previous.services
        decided = with_conflicts(inputs, decided, [*before, *self._answered.values()])
        shadow = message.policy.mode == "shadow"
        if not shadow:
            self._previous = decided
        planned = {service.key: service for service in decided.services}
        changed, gone = differences(self._answered, planned)
        if shadow != self._shadow:
            changed = list(planned.values())
        self._answered, self._shadow = planned, shadow
        return Solved(
            plan=decided.model_copy(update={"services": changed}),
            gone=gone,
            busy_s=time.perf_counter() - began,
            rss_bytes=_rss_bytes(),
        )

    def learn(self, message: Learn) -> Learned:
        """What the stored profiles learn."""
        return Learned(
            profiles=learn(
                self._objects[LLMService.KIND],
                self._objects[ModelProfile.KIND],
                self._objects[GPUType.KIND],
                message.corrections,
                message.observed,
                at=message.at,
            )
        )


def _rss_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def serve(requests: BinaryIO, responses: BinaryIO) -> None:
    """Answers requests until there are no more."""
    planner = Planner()
    while (message := read_request(requests)) is not None:
        if isinstance(message, Put):
            planner.put(message)
        elif isinstance(message, Drop):
            planner.drop(message)
        else:
            try:
                answer: Solved | Rejected | Learned | Failed = (
                    planner.learn(message) if isinstance(message, Learn) else planner.solve(message)
                )
            except Exception:
                # Whatever one request meets, the next one may be given other inputs.
                answer = Failed(error=traceback.format_exc())
            for frame in frames(answer):
                responses.write(frame)
            responses.flush()


def main() -> None:
    """Entry of `python -m llmfleet.operator.planner_worker`."""
    responses = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, responses)


if __name__ == "__main__":
    main()
