"""A plan as text: a table for people, JSON and YAML for programs, all of the same plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import StrEnum

import typer
import yaml
from rich.console import Console
from rich.table import Table

from llmfleet.api import Plan, PlannedVariant, ServicePlan
from llmfleet.api.plan import PlannedForecast, PlannedNodes

WIDE = 250
"""Columns where the output is no terminal: lines are for `grep`, not for wrapping."""


class Format(StrEnum):
    """How a plan is written."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def form_of(text: str) -> Format:
    """The form that `-o` names. Raises typer.BadParameter."""
    if text not in list(Format):
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(Format)}", param_hint="-o")
    return Format(text)


def write_plan(plan: Plan, form: Format, *, devices: str) -> None:
    """Writes a plan to standard output. `devices` says where the inventory comes from."""
    match form:
        case Format.JSON:
            print(json.dumps(plan.to_wire(), indent=2))
        case Format.YAML:
            print(yaml.safe_dump(plan.to_wire(), sort_keys=False), end="")
        case Format.TABLE:
            console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
            _write_table(plan, console)
            for line in _remarks(plan, devices):
                console.print(line, markup=False, soft_wrap=True)


def _write_table(plan: Plan, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("SERVICE")
    table.add_column("VARIANT")
    for heading in ("REPLICAS", "DEVICES", "REQUESTS/S", "COST/H", "WATTS"):
        table.add_column(heading, justify="right")
    for service in plan.services:
        for variant in service.variants:
            table.add_row(
                service.key,
                variant.name,
                str(variant.replicas),
                str(variant.replicas * variant.devices),
                f"{_requests_per_second(service, variant):.3g}",
                f"{variant.replicas * variant.cost_per_replica_hour:.2f}",
                "" if variant.watts_per_replica is None else f"{variant.replicas * variant.watts_per_replica:.0f}",
            )
        if not service.variants:
            table.add_row(service.key, "-", "0", "0", "0", f"{service.cost_per_hour:.2f}", "")
    if plan.services:
        console.print(table)
        console.print()


def _requests_per_second(service: ServicePlan, variant: PlannedVariant) -> float:
    """What the routing table sends to a variant, in requests per second."""
    return sum(
        route.fraction * service.demand[route.bucket] for route in service.routes if route.variant == variant.name
    )


def _remarks(plan: Plan, devices: str) -> Iterator[str]:
    watts = "" if plan.watts is None else f", {plan.watts:.0f} W at most"
    yield f"plan {plan.plan_id}: {plan.cost_per_hour:.2f} per hour{watts} ({_proof(plan)}; devices: {devices})"
    for one in plan.nodes or []:
        yield nodes_in_words(one)
    for service in plan.services:
        if not any(service.demand):
            yield f"{service.key}: no demand: spec.traffic expects none, and no --trace was given"
        if service.forecast is not None:
            yield f"{service.key}: {forecast_in_words(service.demand_rps, service.forecast)}"
        if service.cost_per_million_tokens is not None:
            yield f"{service.key}: {service.cost_per_million_tokens:.2f} per million tokens"
        if service.next_best is not None:
            mix = ", ".join(f"{count} {name}" for name, count in service.next_best.replicas.items() if count)
            yield f"{service.key}: next best {service.next_best.cost_per_hour:.2f} per hour with {mix}"
        if service.binding:
            yield f"{service.key}: bound by {', '.join(service.binding)}"
        if service.shortfall is not None:
            yield f"{service.key}: SHORT: {service.shortfall}"
        if service.conflict:
            yield f"{service.key}: cannot all hold while all is served: {', '.join(service.conflict)}"
        for warning in service.warnings:
            yield f"{service.key}: warning: {warning}"
    for refusal in plan.refusals:
        yield f"{refusal.key}: REFUSED: {refusal.reason}: {refusal.message}"


def forecast_in_words(demand_rps: float, one: PlannedForecast) -> str:
    """What is planned for before it is asked for."""
    return (
        f"{one.rps:.3g} of {demand_rps:.3g} requests per second are forecast, {one.percentile:g} % sure to be no more, "
        f"within the {one.within_seconds:g} s that replicas take to start"
    )


def nodes_in_words(one: PlannedNodes) -> str:
    """What is paid for and not used of a type that is billed by the node."""
    total = one.nodes * one.devices_per_node
    nodes = f"{one.nodes} node{'s' if one.nodes != 1 else ''} of {one.devices_per_node}"
    idle = f"{one.idle_devices} of {total} devices idle, {one.idle_cost_per_hour:.2f} per hour"
    return f"GPUType {one.gpu_type}: {nodes}, {idle if one.idle_devices else 'all devices in use'}"


def _proof(plan: Plan) -> str:
    gap = "no bound proven" if plan.gap_cost is None else f"within {100 * plan.gap_cost:.2g} % of the proven bound"
    return f"{plan.status}, {gap}, solved in {plan.solve_seconds:.2f} s"
