"""What operator and planner process say to each other: JSON documents, each after its length in four bytes.

    operator -> planner    Put / Drop    one object of the inputs changed
                           Solve         plan with what you have
                           Learn         say what profiles learn from what was seen
    planner -> operator    Solved        the plan, as differences to the one before
                           Part          some of the services of the Solved before it
                           Rejected      there was one, and it breaks constraints
                           Learned       what profiles have learnt
                           Failed        it could not, and why

Both sides keep the objects by key and send only what changed, so that a fleet of a thousand services costs its
events and not its size. A planner that is started anew gets everything again.

The services of a plan follow it in parts, which the operator reads one per turn of its event loop: a thousand of them
in one document are a tenth of a second in which it could do nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field, TypeAdapter

from llmfleet.api import BucketSizes, Correction, FleetPolicySpec, Learnt, ObservedVariant, Plan, Refusal, ServicePlan
from llmfleet.api.meta import ApiModel

_LENGTH_BYTES = 4
_PART = 20
"""Service plans in one part: two milliseconds of reading."""


class Put(ApiModel):
    """An object as it now is. It replaces the one with the same kind and key."""

    op: Literal["put"] = "put"
    kind: str
    key: str
    object: dict[str, Any]


class Drop(ApiModel):
    """An object that is gone."""

    op: Literal["drop"] = "drop"
    kind: str
    key: str


class MeasuredDemand(ApiModel):
    """What gateways saw of one service, as in `placement.Demand`."""

    rps: list[float]
    """Requests per second by bucket."""
    sizes: list[BucketSizes] | None = None
    """How long these requests are, by bucket; None: nothing is known."""


class Solve(ApiModel):
    """Plans the whole fleet."""

    op: Literal["solve"] = "solve"
    inventory: dict[str, int]
    demand: dict[str, MeasuredDemand]
    policy: FleetPolicySpec
    unreadable: list[str] = Field(default_factory=list)
    """Keys of services that exist but do not parse: they keep their part of the plan in force."""
    previous: Plan | None = None
    """The plan in force, for a planner that has not made one itself."""
    at: float = 0.0
    """As in `PlanInputs`."""


class Learn(ApiModel):
    """Says what profiles learn from what was seen of their engines."""

    op: Literal["learn"] = "learn"
    observed: list[ObservedVariant]
    corrections: dict[str, list[Correction]]
    """What profiles say so far, by key."""
    at: float
    """When, in seconds since 1970."""


class Solved(ApiModel):
    """A plan. `services` holds only those that differ from the last answer of the same planner process, but all of them
    where the policy's mode is another than at that answer."""

    op: Literal["solved"] = "solved"
    plan: Plan
    gone: list[str]
    """Keys that were planned in the last answer and are not in this one."""
    busy_s: float
    """Time that the planner process spent on it."""
    rss_bytes: int
    """Memory of the planner process."""
    parts: int = Field(default=0, ge=0)
    """On the wire: how many parts follow, which hold the plan's `services` and `kept`."""


class Part(ApiModel):
    """Some service plans of a Solved."""

    op: Literal["part"] = "part"
    services: list[ServicePlan]
    kept: list[ServicePlan]


class Rejected(ApiModel):
    """A plan that the independent check found to break constraints, and that is dropped."""

    op: Literal["rejected"] = "rejected"
    violations: list[str]
    """The first of them, in words."""
    count: int
    """How many there are."""


class Learned(ApiModel):
    """What profiles have learnt."""

    op: Literal["learned"] = "learned"
    profiles: list[Learnt]


class Failed(ApiModel):
    """A request that raised."""

    op: Literal["failed"] = "failed"
    error: str


Request = Annotated[Put | Drop | Solve | Learn, Field(discriminator="op")]
Response = Annotated[Solved | Part | Rejected | Learned | Failed, Field(discriminator="op")]
REQUEST: TypeAdapter[Put | Drop | Solve | Learn] = TypeAdapter(Request)
RESPONSE: TypeAdapter[Solved | Part | Rejected | Learned | Failed] = TypeAdapter(Response)


def encode(message: Put | Drop | Solve | Learn | Solved | Part | Rejected | Learned | Failed) -> bytes:
    """One frame."""
    body = message.model_dump_json(by_alias=True).encode()
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def frames(answer: Solved | Rejected | Learned | Failed) -> Iterator[bytes]:
    """An answer as `read_response` reads it: in one frame, or in one and its parts."""
    if not isinstance(answer, Solved):
        yield encode(answer)
        return
    services, kept = answer.plan.services, answer.plan.kept
    starts = range(0, max(len(services), len(kept)), _PART)
    head = answer.plan.model_copy(update={"services": [], "kept": []})
    yield encode(answer.model_copy(update={"plan": head, "parts": len(starts)}))
    for start in starts:
        yield encode(Part(services=services[start : start + _PART], kept=kept[start : start + _PART]))


def read_request(stream: BinaryIO) -> Put | Drop | Solve | Learn | None:
    """Next request from a blocking stream; None at its end."""
    header = stream.read(_LENGTH_BYTES)
    if len(header) < _LENGTH_BYTES:
        return None
    return REQUEST.validate_json(stream.read(int.from_bytes(header, "big")))


async def read_response(stream: asyncio.StreamReader) -> Solved | Rejected | Learned | Failed:
    """Next response, whole. Raises asyncio.IncompleteReadError when the planner is gone."""
    answer = await _read_frame(stream)
    assert not isinstance(answer, Part)
    if not isinstance(answer, Solved):
        return answer
    services, kept = list[ServicePlan](), list[ServicePlan]()
    for _ in range(answer.parts):
        await asyncio.sleep(0)
        part = await _read_frame(stream)
        assert isinstance(part, Part)
        services += part.services
        kept += part.kept
    plan = answer.plan.model_copy(update={"services": services, "kept": kept})
    return answer.model_copy(update={"plan": plan, "parts": 0})


async def _read_frame(stream: asyncio.StreamReader) -> Solved | Part | Rejected | Learned | Failed:
    header = await stream.readexactly(_LENGTH_BYTES)
    return RESPONSE.validate_json(await stream.readexactly(int.from_bytes(header, "big")))


def differences(before: dict[str, ServicePlan], after: dict[str, ServicePlan]) -> tuple[list[ServicePlan], list[str]]:
    """(service plans that are new or changed, keys that are gone)."""
    changed = [plan for key, plan in after.items() if before.get(key) != plan]
    return changed, [key for key in before if key not in after]


def refusals_by_key(plan: Plan) -> dict[str, Refusal]:
    """Refusals by service key."""
    return {refusal.key: refusal for refusal in plan.refusals}
