"""`llmfleet explain`: why a service's plan is as it is, in words and figures."""

from __future__ import annotations

import json
from collections.abc import Iterator

import yaml

from llmfleet.api import CONDITION_READY, CONDITION_SHADOW, LLMService, Plan
from llmfleet.cli.refused import RefusedError
from llmfleet.cli.render import Format
from llmfleet.placement import PlanInputs
from llmfleet.placement.explain import Explanation, explain


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


def explanation_of(plan: Plan, inputs: PlanInputs, service: LLMService) -> Explanation:
    """Explains one service of a plan.

    Raises RefusedError where the objects have changed since the plan was made, and would now be refused.
    """
    try:
        return explain(plan, inputs, service.key)
    except ValueError as error:
        raise RefusedError(f"{service.key} cannot be explained: {error}") from error


def write_explanation(explanation: Explanation, plan: Plan, service: LLMService, form: Format) -> None:
    """Writes an explanation to standard output."""
    match form:
        case Format.JSON:
            print(json.dumps(explanation.to_wire(), indent=2))
        case Format.YAML:
            print(yaml.safe_dump(explanation.to_wire(), sort_keys=False), end="")
        case Format.TABLE:
            for line in in_words(explanation, plan, service):
                print(line)


def in_words(explanation: Explanation, plan: Plan, service: LLMService) -> Iterator[str]:
    """An explanation as lines of text, with what the service's conditions say is not so."""
    if explanation.refusal is not None:
        yield f"{explanation.key} has no plan: {explanation.refusal.reason}"
        yield f"  {explanation.refusal.message}"
        return
    total = explanation.cost_per_hour
    served = explanation.demand_rps - explanation.unserved_rps
    rates = f"{served:.3g} of {explanation.demand_rps:.3g} requests per second"
    yield f"{explanation.key}: {rates} for {total:.2f} per hour"
    yield f"plan {plan.plan_id}"
    for condition in service.status.conditions:
        if condition.status == "False" and condition.type != CONDITION_READY:  # Ready repeats one of the others
            yield f"{condition.type} is False ({condition.reason}): {condition.message}"
        elif condition.type == CONDITION_SHADOW:
            yield f"{condition.reason}: {condition.message}"
    if explanation.shortfall is not None:
        yield from ("", "Short", f"  {explanation.shortfall}")
    yield from ("", "Chosen")
    for variant in explanation.chosen:
        yield (
            f"  {variant.replicas} x {variant.name}: {variant.served_rps:.3g} requests per second for "
            f"{variant.cost_per_hour:.2f} per hour, {variant.utilization:.0%} of what was measured"
        )
        if variant.cost_per_hour_without is None:
            yield f"    without {variant.name}, more demand would go unserved"
        else:
            yield f"    without {variant.name}, the service would cost {_beside(variant.cost_per_hour_without, total)}"
    if not explanation.chosen:
        yield "  nothing: there is no demand and no lower bound on replicas"
    if explanation.single_types:
        yield from ("", "On one GPU type alone")
    for single in explanation.single_types:
        missing = f"; {single.devices_missing} devices are missing" if single.devices_missing else ""
        yield f"  {_mix(single.replicas)}: {_beside(single.cost_per_hour, total)}{missing}"
    if explanation.next_best is not None:
        yield from ("", "Next best set of variants")
        yield f"  {_mix(explanation.next_best.replicas)}: {_beside(explanation.next_best.cost_per_hour, total)}"
    if explanation.binding:
        yield from ("", "Bound by")
        yield from (f"  {constraint}" for constraint in explanation.binding)
    if explanation.rejected:
        yield from ("", "Not used")
        yield from (f"  {rejected.name} ({rejected.reason}): {rejected.message}" for rejected in explanation.rejected)
    if explanation.warnings:
        yield from ("", "Warnings")
        yield from (f"  {warning}" for warning in explanation.warnings)


def _mix(replicas: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in replicas.items() if count) or "no replicas"


def _beside(cost: float, total: float) -> str:
    """A cost per hour and how far it is from what is planned."""
    return f"{cost:.2f} per hour" + (f" ({(cost - total) / total:+.0%})" if total > 0 else "")
