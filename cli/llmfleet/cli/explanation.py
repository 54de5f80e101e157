"""`llmfleet explain`: why a service's plan is as it is, in words and figures."""

from __future__ import annotations

import json
from collections.abc import Iterator

import yaml
from pydantic import Field

from llmfleet.api import CONDITION_READY, CONDITION_SHADOW, Alternative, LLMService, Plan
from llmfleet.cli.refused import RefusedError
from llmfleet.cli.render import Format, forecast_in_words, nodes_in_words
from llmfleet.cli.size_map import map_in_words
from llmfleet.placement import PlanInputs
from llmfleet.placement.changes import Changes, changes_since
from llmfleet.placement.comparison import Standing
from llmfleet.placement.explain import Corrected, Explanation, explain
from llmfleet.placement.other_ways import otherwise_staged
from llmfleet.placement.size_map import SizeCell, size_map
from llmfleet.placement.worth import Worth, worth_of_more


class Account(Explanation):
    """An explanation with what solving the service again has shown."""

    worth: list[Worth] = Field(default_factory=list)
    """What a step of each constraint would bring, the most helpful first."""
    sizes: list[SizeCell] = Field(default_factory=list)
    """Which variant answers which size most cheaply, and where the plan sends it."""
    otherwise_staged: Alternative | None = None
    """What it would cost with prefill and decode together, where the plan has them apart, or apart, where engines
    cannot hand over yet; absent where the service does not allow it or that is no other plan."""
    changes: Changes | None = None
    """What changed since an earlier plan and why; absent without one."""


def find_service(inputs: PlanInputs, name: str, namespace: str | None) -> LLMService:
    """A service by its name; without a namespace, the only one of that name. Raises RefusedError."""
    found = [
        service
        for service in inputs.services
        if service.metadata.name == name and namespace in (None, service.metadata.namespace)
    ]
    if not found:
        wanted = name if namespace is None else f"{namespace}/{name}"
        known = ", ".join(sorted(service.key for service in inputs.services))
        raise RefusedError(f"there is no LLMService {wanted}; there are {known or 'none'}")
    if len(found) > 1:
        keys = ", ".join(sorted(service.key for service in found))
        raise RefusedError(f"several LLMServices are called {name}: {keys}; say which with -n")
    return found[0]


def explanation_of(plan: Plan, inputs: PlanInputs, service: LLMService, previous: Plan | None = None) -> Account:
    """Explains one service of a plan, and where there is an earlier one, what changed since.

    Raises RefusedError where the objects have changed since the plan was made, and would now be refused.
    """
    try:
        return Account(
            **dict(explain(plan, inputs, service.key)),
            worth=worth_of_more(inputs, plan, service.key),
            sizes=size_map(plan, inputs, service.key),
            otherwise_staged=otherwise_staged(inputs, plan, service.key),
            changes=None if previous is None else changes_since(previous, plan, inputs, service.key),
        )
    except ValueError as error:
        raise RefusedError(f"{service.key} cannot be explained: {error}") from error


def write_explanation(explanation: Account, plan: Plan, service: LLMService, form: Format) -> None:
    """Writes an explanation to standard output."""
    match form:
        case Format.JSON:
            print(json.dumps(explanation.to_wire(), indent=2))
        case Format.YAML:
            print(yaml.safe_dump(explanation.to_wire(), sort_keys=False), end="")
        case Format.TABLE:
            for line in in_words(explanation, plan, service):
                print(line)


def in_words(explanation: Account, plan: Plan, service: LLMService) -> Iterator[str]:
    """An explanation as lines of text, with what the service's conditions say is not so."""
    if explanation.refusal is not None:
        yield f"{explanation.key} has no plan: {explanation.refusal.reason}"
        yield f"  {explanation.refusal.message}"
        return
    total = explanation.cost_per_hour
    served = explanation.demand_rps - explanation.unserved_rps
    rates = f"{served:.3g} of {explanation.demand_rps:.3g} requests per second"
    yield f"{explanation.key}: {rates} for {total:.2f} per hour"
    planned = plan.service(explanation.key)
    if planned is not None and planned.forecast is not None:
        yield forecast_in_words(planned.demand_rps, planned.forecast)
    yield f"plan {plan.plan_id}"
    for condition in service.status.conditions:
        if condition.status == "False" and condition.type != CONDITION_READY:  # Ready repeats one of the others
            yield f"{condition.type} is False ({condition.reason}): {condition.message}"
        elif condition.type == CONDITION_SHADOW:
            yield f"{condition.reason}: {condition.message}"
    if explanation.changes is not None:
        yield from ("", "Since the earlier plan")
        yield from _since(explanation.changes)
    if explanation.shortfall is not None:
        yield from ("", "Short", f"  {explanation.shortfall}")
        if planned is not None and planned.conflict:
            yield f"  limits that cannot all hold while all is served: {', '.join(planned.conflict)}"
    if explanation.losses:
        yield from ("", "After the loss of")
        for loss in explanation.losses:
            kept = loss.share * explanation.demand_rps
            lost = " and ".join(loss.gpu_types)
            yield f"  {lost}: {kept - loss.unserved_rps:.3g} of {kept:.3g} requests per second go on"
    yield from ("", "Chosen")
    for variant in explanation.chosen:
        yield (
            f"  {variant.replicas} x {variant.name}: {variant.served_rps:.3g} requests per second for "
            f"{variant.cost_per_hour:.2f} per hour, {variant.utilization:.0%} of what they hold"
        )
        if variant.corrected is not None:
            yield f"    {_learnt(variant.corrected)}"
        if variant.cost_per_hour_without is None:
            yield f"    without {variant.name}, more demand would go unserved"
        else:
            yield f"    without {variant.name}, the service would cost {_beside(variant.cost_per_hour_without, total)}"
    for one in explanation.nodes:
        yield f"  {nodes_in_words(one)}"
    if explanation.idle_cost_per_hour:
        yield f"  {explanation.idle_cost_per_hour:.2f} per hour for its share of idle devices"
    if not explanation.chosen:
        yield "  nothing: there is no demand and no lower bound on replicas"
    sizes = list(map_in_words(explanation.sizes))
    if sizes:
        yield from ("", "Cheapest variant by size, and how much cheaper than the next")
        yield from (f"  {line}" for line in sizes)
    if explanation.single_types:
        yield from ("", "On one GPU type alone")
    for single in explanation.single_types:
        missing = f"; {single.devices_missing} devices are missing" if single.devices_missing else ""
        yield f"  {_mix(single.replicas)}: {_beside(single.cost_per_hour, total)}{missing}"
    if explanation.next_best is not None:
        yield from ("", "Next best set of variants")
        yield f"  {_mix(explanation.next_best.replicas)}: {_beside(explanation.next_best.cost_per_hour, total)}"
    if explanation.otherwise_staged is not None:
        other = explanation.otherwise_staged
        apart = "apart" if other.kind == "disaggregated" else "together"
        yield from ("", f"With prefill and decode {apart}", f"  {_mix(other.replicas)}: {other.reason}")
    if explanation.binding:
        yield from ("", "Bound by")
        yield from (f"  {constraint}" for constraint in explanation.binding)
    if explanation.worth:
        yield from ("", "What more would be worth")
        yield from (f"  {worth.relaxed}: {_gain(worth)}" for worth in explanation.worth)
    if explanation.rejected:
        yield from ("", "Not used")
        yield from (f"  {rejected.name} ({rejected.reason}): {rejected.message}" for rejected in explanation.rejected)
    if explanation.warnings:
        yield from ("", "Warnings")
        yield from (f"  {warning}" for warning in explanation.warnings)


def _learnt(corrected: Corrected) -> str:
    factors = {"TTFT": corrected.ttft_factor, "TPOT": corrected.tpot_factor}
    said = [f"{metric} up to {factor:.2f} times" for metric, factor in factors.items() if abs(factor - 1) >= 0.005]
    return f"its engines in service: {' and '.join(said) + ' what' if said else 'as fast as'} the profile says"


def _gain(worth: Worth) -> str:
    if not worth.helps:
        return "nothing"
    cost, served = worth.cost_per_hour, -worth.unserved_rps
    price = (
        f"for {cost:.2f} per hour more" if cost > 0 else f"and saves {-cost:.2f} per hour" if cost < 0 else "at no cost"
    )
    gain = f"serves {served:.3g} more requests per second {price}" if served > 0 else f"saves {-cost:.2f} per hour"
    return f"{gain} ({_mix(worth.replicas)})"


def _since(changes: Changes) -> Iterator[str]:
    before, after = changes.difference.before, changes.difference.after or Standing()
    if before is None:
        yield "  the service is new"
        return
    if not changes.moved:
        yield f"  the same replicas for {_beside(after.cost_per_hour, before.cost_per_hour)}"
        return
    now, then = f"{after.cost_per_hour:.2f} per hour", f"{before.cost_per_hour:.2f}"
    yield f"  {_mix(after.replicas)} for {now}, where there were {_mix(before.replicas)} for {then}"
    for cause in changes.causes:
        yield f"  {'because' if cause.decisive else 'also'}: {cause.message}"


def _mix(replicas: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in replicas.items() if count) or "no replicas"


def _beside(cost: float, total: float) -> str:
    """A cost per hour and how far it is from what is planned."""
    return f"{cost:.2f} per hour" + (f" ({(cost - total) / total:+.0%})" if total > 0 else "")
