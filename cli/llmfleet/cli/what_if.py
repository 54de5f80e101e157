"""`llmfleet plan --what-if`: a plan with edits beside the plan without them.

The plan without the edits counts as the one in force when the edits are made, as it would in a cluster: so what is
shown is what the operator would do, and no change is shown that would not be worth its price.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import yaml
from rich.console import Console
from rich.table import Table

from llmfleet.api import Plan
from llmfleet.cli.planning import solved
from llmfleet.cli.refused import RefusedError
from llmfleet.cli.render import WIDE, Format
from llmfleet.placement import PlanInputs
from llmfleet.placement.comparison import PlanDifference, Standing, difference
from llmfleet.placement.whatif import WhatIfError, edited


def suppose(inputs: PlanInputs, edits: list[str], decided: Plan) -> tuple[Plan, PlanDifference]:
    """The plan with edits, and how it differs from `decided`, the one without. Raises RefusedError."""
    try:
        supposed = edited(inputs, edits)
    except WhatIfError as error:
        raise RefusedError(f"--what-if {error}") from error
    after = solved(supposed, decided)
    return after, difference(decided, after, edits=edits)


def write_difference(found: PlanDifference, form: Format, *, devices: str) -> None:
    """Writes a difference to standard output. `devices` says where the inventory without the edits comes from."""
    match form:
        case Format.JSON:
            print(json.dumps(found.to_wire(), indent=2))
        case Format.YAML:
            print(yaml.safe_dump(found.to_wire(), sort_keys=False), end="")
        case Format.TABLE:
            console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
            console.print(_table(found))
            console.print()
            for line in _remarks(found, devices):
                console.print(line, markup=False, soft_wrap=True)


def _table(found: PlanDifference) -> Table:
    """The services that change, and the total; a service that stays as it is would hide them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("SERVICE", "REPLICAS"):
        table.add_column(heading)
    for heading in ("COST/H", "DIFFERENCE", "UNSERVED/S"):
        table.add_column(heading, justify="right")
    for service in found.services:
        if service.changed:
            before, after = service.before or Standing(), service.after or Standing()
            table.add_row(
                service.key,
                _arrow(_mix(before), _mix(after)),
                _arrow(f"{before.cost_per_hour:.2f}", f"{after.cost_per_hour:.2f}"),
                f"{after.cost_per_hour - before.cost_per_hour:+.2f}",
                _arrow(f"{before.unserved_rps:.3g}", f"{after.unserved_rps:.3g}"),
            )
    table.add_row(
        "TOTAL",
        "",
        _arrow(f"{found.before.cost_per_hour:.2f}", f"{found.after.cost_per_hour:.2f}"),
        f"{found.after.cost_per_hour - found.before.cost_per_hour:+.2f}",
        _arrow(f"{found.before.unserved_rps:.3g}", f"{found.after.unserved_rps:.3g}"),
    )
    return table


def _remarks(found: PlanDifference, devices: str) -> Iterator[str]:
    yield f"with {', '.join(found.edits)} (devices before: {devices})"
    same = sum(not service.changed for service in found.services)
    if same:
        yield f"{same} of {len(found.services)} services stay as they are"
    for service in found.services:
        before = None if service.before is None else service.before.refusal
        after = None if service.after is None else service.after.refusal
        if after is not None and after != before:
            yield f"{service.key}: would be REFUSED: {after}"
        elif before is not None and after is None:
            yield f"{service.key}: would no longer be refused ({before})"


def _mix(standing: Standing) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(standing.replicas.items())) or "none"


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"
