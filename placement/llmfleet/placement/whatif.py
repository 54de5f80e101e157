"""What if: edits of a solve's inputs, as a user writes them.

In flow `PlanInputs` and edits in text; out flow the inputs with all edits made, in the given order. What such inputs
would mean is the solver's to say: `comparison` holds two plans against each other.

    price:h100=6.5               price of one device-hour, in the type's capacity class
    inventory:l4=+2              devices that exist
    limit:l4=none                the most devices that the fleet may use; none: as many as there are
    objective:chat.ttft=400ms    latency at the percentile that the service asks for, of ttft or of tpot
    rate:team/chat=x1.5          requests per second of a service, all sizes alike

The value is the new one (`8`), a difference (`+2`, `-2`) or a factor (`x1.5`). A latency has a unit, ms or s; nothing
else has one. A service is named `namespace/name`, or `name` where it is the only one of that name. An edit keeps to
the ranges of the field it edits: whatever could not be written into the object cannot be supposed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from llmfleet.api import GPUType, LLMService
from llmfleet.api.meta import ApiModel
from llmfleet.placement.inputs import PlanInputs

SYNTAX = "price:TYPE=6.5, inventory:TYPE=+2, limit:TYPE=4, objective:SERVICE.ttft=400ms or rate:SERVICE=x1.5"
"""One edit of each kind, for messages."""

_EDIT = re.compile(r"(?P<kind>[a-z]+):(?P<target>[^=]+)=(?P<value>.*)", re.DOTALL)
_NUMBER = re.compile(r"(?P<how>[+x-]?)(?P<number>\d+(\.\d+)?)(?P<unit>[a-z/]*)")
_MILLISECONDS = {"ms": 1.0, "s": 1000.0}

Model = TypeVar("Model", bound=ApiModel)


class WhatIfError(ValueError):
    """An edit that cannot be made. The message names the edit, what was read and what is accepted."""


@dataclass(frozen=True)
class Edit:
    """One edit, read but not yet made."""

    text: str
    """As it was written."""
    kind: str
    """What is edited: a key of the table above."""
    target: str
    """GPU type, service, or service and metric."""
    value: str
    """Right-hand side."""

    def refused(self, reason: str) -> WhatIfError:
        """The error of this edit."""
        return WhatIfError(f"{self.text}: {reason}")


@dataclass(frozen=True)
class _Amount:
    """A right-hand side: a new value, a difference or a factor."""

    how: str
    number: float

    def of(self, before: float) -> float:
        """The value that comes of an earlier one."""
        match self.how:
            case "+":
                return before + self.number
            case "-":
                return before - self.number
            case "x":
                return before * self.number
        return self.number


def parse_edit(text: str) -> Edit:
    """Reads one edit. Raises WhatIfError where it has not the form of one; its names are not looked up yet."""
    match = _EDIT.fullmatch(text.strip())
    if match is None or match["kind"] not in _EDITORS:
        raise WhatIfError(f"{text}: not an edit; accepted are {SYNTAX}")
    return Edit(text.strip(), match["kind"], match["target"].strip(), match["value"].strip())


def edited(inputs: PlanInputs, edits: Iterable[str]) -> PlanInputs:
    """The inputs with all edits made, one after the other, so that a later one sees what an earlier one left.

    Raises WhatIfError.
    """
    for edit in map(parse_edit, edits):
        inputs = _EDITORS[edit.kind](inputs, edit)
    return inputs


def _price(inputs: PlanInputs, edit: Edit) -> PlanInputs:
    gpu_type = _gpu_type(inputs, edit)
    price = gpu_type.spec.price_per_hour
    field = "spot" if gpu_type.spec.capacity_class == "spot" else "on_demand"
    amount = _amount(edit, "a price per device-hour such as 6.5, +0.5, -0.5 or x0.8").of(
        gpu_type.spec.device_price_per_hour
    )
    return _with_type(inputs, edit, gpu_type, price_per_hour=_with(edit, price, **{field: amount}))


def _inventory(inputs: PlanInputs, edit: Edit) -> PlanInputs:
    name = _gpu_type(inputs, edit).metadata.name
    before = inputs.inventory.get(name, 0)
    after = _devices(edit, "a number of devices such as 8, +2, -2 or x2", before)
    return _with(edit, inputs, inventory={**inputs.inventory, name: after})


def _limit(inputs: PlanInputs, edit: Edit) -> PlanInputs:
    gpu_type = _gpu_type(inputs, edit)
    if edit.value == "none":
        return _with_type(inputs, edit, gpu_type, limit=None)
    limit = _devices(edit, "a number of devices such as 8, +2, -2 or x2, or none", gpu_type.spec.limit)
    return _with_type(inputs, edit, gpu_type, limit=limit)


def _objective(inputs: PlanInputs, edit: Edit) -> PlanInputs:
    name, _, metric = edit.target.rpartition(".")
    if metric not in ("ttft", "tpot"):
        raise edit.refused(f"read {edit.target!r} as SERVICE.METRIC; accepted as METRIC are ttft and tpot")
    service = _service(inputs, edit, name)
    target = service.spec.objective.ttft if metric == "ttft" else service.spec.objective.tpot
    accepted = "a latency such as 400ms, 0.4s, +10ms, -10ms or x0.5"
    amount = _amount(edit, accepted, units=_MILLISECONDS).of(target.milliseconds)
    objective = _with(edit, service.spec.objective, **{metric: _with(edit, target, milliseconds=amount)})
    return _with_service(inputs, edit, service, objective=objective)


def _rate(inputs: PlanInputs, edit: Edit) -> PlanInputs:
    service = _service(inputs, edit, edit.target)
    amount = _amount(edit, "requests per second such as 12, +2, -2 or x1.5")
    traffic = service.spec.traffic
    observed = inputs.demand.get(service.key)
    if traffic.mode == "observe" and observed is not None:
        before = sum(observed.rps)
        after = amount.of(before)
        if after < 0:
            raise edit.refused(f"this makes {after:g} requests per second; accepted is 0 or more")
        if before == 0 and after > 0:
            raise edit.refused(f"no request of {service.key} was observed, so nobody knows of which sizes")
        scale = after / before if before else 0.0
        demand = _with(edit, observed, rps=[scale * rps for rps in observed.rps])
        return _with(edit, inputs, demand={**inputs.demand, service.key: demand})
    if traffic.requests_per_second is None or traffic.sizes is None:
        raise edit.refused(f"{service.key} has no demand to edit: neither spec.traffic says one nor was one observed")
    rate = amount.of(traffic.requests_per_second)
    return _with_service(inputs, edit, service, traffic=_with(edit, traffic, requests_per_second=rate))


_EDITORS: Mapping[str, Callable[[PlanInputs, Edit], PlanInputs]] = {
    "price": _price,
    "inventory": _inventory,
    "limit": _limit,
    "objective": _objective,
    "rate": _rate,
}


def _amount(edit: Edit, accepted: str, *, units: Mapping[str, float] | None = None) -> _Amount:
    """The right-hand side in the field's unit."""
    match = _NUMBER.fullmatch(edit.value)
    if match is None:
        raise edit.refused(f"read the value {edit.value!r}; accepted is {accepted}")
    amount, unit = _Amount(match["how"], float(match["number"])), match["unit"]
    if not math.isfinite(amount.number):
        raise edit.refused(f"read the value {edit.value!r}; accepted is {accepted}")
    scaled = units is not None and amount.how != "x"
    if scaled and units is not None and unit in units:
        return replace(amount, number=amount.number * units[unit])
    if scaled or unit:
        raise edit.refused(f"read the unit {unit!r} in {edit.value!r}; accepted is {accepted}")
    return amount


def _devices(edit: Edit, accepted: str, before: int | None) -> int:
    amount = _amount(edit, accepted)
    if before is None and amount.how:
        raise edit.refused(f"GPUType {edit.target} has no limit that {edit.value!r} could change; accepted is a number")
    after = amount.of(before or 0)
    if after != round(after) or after < 0:
        raise edit.refused(f"this makes {after:g} devices; accepted is a whole number, 0 or more")
    return round(after)


def _gpu_type(inputs: PlanInputs, edit: Edit) -> GPUType:
    for gpu_type in inputs.gpu_types:
        if gpu_type.metadata.name == edit.target:
            return gpu_type
    known = ", ".join(sorted(gpu_type.metadata.name for gpu_type in inputs.gpu_types)) or "none"
    raise edit.refused(f"there is no GPUType {edit.target!r}; there are {known}")


def _service(inputs: PlanInputs, edit: Edit, name: str) -> LLMService:
    found = [s for s in inputs.services if name in (s.key, s.metadata.name)]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(sorted(service.key for service in found or inputs.services)) or "none"
    if found:
        raise edit.refused(f"several LLMServices are called {name!r}; say which of {keys}")
    raise edit.refused(f"there is no LLMService {name!r}; there are {keys}")


def _with(edit: Edit, model: Model, **changes: Any) -> Model:
    """A copy with changes, checked as the object itself is."""
    try:
        return type(model).model_validate({**dict(model), **changes})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(to_camel(str(part)) for part in first["loc"])
        raise edit.refused(f"this makes {field} {first['input']!r}: {first['msg']}") from error


def _with_type(inputs: PlanInputs, edit: Edit, gpu_type: GPUType, **changes: Any) -> PlanInputs:
    changed = _with(edit, gpu_type, spec=_with(edit, gpu_type.spec, **changes))
    return _with(edit, inputs, gpu_types=[changed if t is gpu_type else t for t in inputs.gpu_types])


def _with_service(inputs: PlanInputs, edit: Edit, service: LLMService, **changes: Any) -> PlanInputs:
    changed = _with(edit, service, spec=_with(edit, service.spec, **changes))
    return _with(edit, inputs, services=[changed if s is service else s for s in inputs.services])
