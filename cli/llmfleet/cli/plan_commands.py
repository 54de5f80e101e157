"""Options of `llmfleet plan` and `llmfleet explain`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmfleet.cli.refused import RefusedError

if TYPE_CHECKING:
    from llmfleet.placement import PlanInputs

Filenames = Annotated[
    list[str] | None,
    typer.Option(
        "-f",
        "--filename",
        metavar="FILE",
        help="YAML or JSON file, folder, or - for standard input. May be repeated.",
        show_default=False,
    ),
]
MoreFilenames = Annotated[
    list[str] | None, typer.Argument(metavar="FILE", help="More files, so that `-f *.yaml` works.", show_default=False)
]
Inventory = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE=N,...|FILE",
        help="Devices on nodes by GPUType, or a file with such a map. Without it: Nodes in the files, else the status "
        "of the GPUTypes in the files, else as many as needed. `spec.provisionable` is added.",
        show_default=False,
    ),
]
Previous = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The plan in force, as `llmfleet plan -o json` wrote it: changing it has a price.",
        show_default=False,
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Time after which the solve ends with the best plan found; wins over the FleetPolicy's "
        "solveTimeLimitSeconds.",
        show_default=False,
    ),
]
Gap = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Relative gap to the proven bound at which the solve may stop, such as 0.01; wins over the FleetPolicy's "
        "optimalityGap.",
        show_default=False,
    ),
]
Trace = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SERVICE=FILE[,rps=R]",
        help="Plan a service for the requests of a trace, at the trace's rate or at R requests per second; wins over "
        "spec.traffic. The file: Azure's LLM inference CSV, Mooncake's JSON lines, or CSV with the columns "
        "arrival_s,input_tokens,output_tokens. May be repeated.",
        show_default=False,
    ),
]
Forecasts = Annotated[
    Path | None,
    typer.Option(
        "--forecast",
        metavar="FILE",
        help="Demand that is expected to come (docs/reference/forecast.schema.json), as JSON or YAML. What is planned "
        "for is the larger of what is and what comes before a replica started now would serve.",
        show_default=False,
    ),
]
WhatIf = Annotated[
    list[str] | None,
    typer.Option(
        metavar="EDIT",
        help="Show what this edit would change, in place of the plan: price:TYPE=6.5, inventory:TYPE=+2, "
        "limit:TYPE=4, objective:SERVICE.ttft=400ms, rate:SERVICE=x1.5. A value is new (8), a difference (+2, -2) or a "
        "factor (x1.5). May be repeated: all edits together.",
        show_default=False,
    ),
]
Output = Annotated[str, typer.Option("-o", "--output", metavar="table|json|yaml", help="Form of the output.")]
Namespace = Annotated[
    str, typer.Option("-n", "--namespace", metavar="NAME", help="Namespace of objects that name none.")
]


def plan(
    filename: Filenames = None,
    more: MoreFilenames = None,
    inventory: Inventory = None,
    previous: Previous = None,
    time_limit: TimeLimit = None,
    gap: Gap = None,
    trace: Trace = None,
    forecast: Forecasts = None,
    what_if: WhatIf = None,
    output: Output = "table",
    namespace: Namespace = "default",
) -> None:
    """Solve a fleet from files, without a cluster.

    Reads LLMServices, ModelProfiles, GPUTypes and a FleetPolicy, and prints which GPU types serve what, with how many
    replicas and at what cost: the same solve that the operator runs. Exit code 1 if a service is refused.

    \b
    Examples:
      llmfleet plan -f examples/quickstart --inventory l4=8,a100-80gb=8
      llmfleet plan -f fleet.yaml -o json > plan.json
      llmfleet plan -f fleet.yaml --previous plan.json
      llmfleet plan -f fleet.yaml --trace team/chat=requests.csv,rps=20
      llmfleet plan -f fleet.yaml --forecast tomorrow.yaml
      llmfleet plan -f fleet.yaml --what-if rate:chat=x2 --what-if price:h100-80gb=6.5
      kubectl get llms,mprof,gput,fleetp,nodes,pods -A -o yaml | llmfleet plan -f -
    """
    files = [*(filename or []), *(more or [])]
    if not files:
        raise typer.BadParameter("at least one file is needed", param_hint="-f")
    from llmfleet.cli.forecasts import with_forecast
    from llmfleet.cli.manifests import read_manifests
    from llmfleet.cli.planning import inputs_of, read_plan, solved
    from llmfleet.cli.render import Format, form_of, write_plan
    from llmfleet.placement.other_ways import with_alternatives

    form = form_of(output)
    inputs, devices = inputs_of(read_manifests(files, namespace=namespace), inventory, time_limit_s=time_limit, gap=gap)
    inputs = with_forecast(_traced(inputs, trace), forecast)
    decided = solved(inputs, read_plan(previous))
    if what_if:
        from llmfleet.cli.what_if import suppose, write_difference

        decided, found = suppose(inputs, what_if, decided)
        write_difference(found, form, devices=devices.source)
    else:
        if form is not Format.TABLE:
            decided = with_alternatives(inputs, decided)
        write_plan(decided, form, devices=devices.source)
    if decided.refusals:
        first = decided.refusals[0]
        count, total = len(decided.refusals), len(decided.refusals) + len(decided.services)
        raise RefusedError(f"{count} of {total} services refused, first {first.key}: {first.reason}: {first.message}")


def explain(
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="Name of an LLMService.", show_default=False)],
    more: MoreFilenames = None,
    filename: Filenames = None,
    inventory: Inventory = None,
    previous: Previous = None,
    trace: Trace = None,
    forecast: Forecasts = None,
    output: Output = "table",
    namespace: Annotated[
        str | None,
        typer.Option(
            "-n",
            "--namespace",
            metavar="NAME",
            help="Namespace of SERVICE; needed where several have this name.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say why a service's plan is as it is.

    Which variants were chosen and what the service would cost without each; what one GPU type alone would cost; the
    next best plan; which constraints bind and what a little more of each would be worth; why every other type is not
    used; and with --previous, what changed since that plan and why. Without -f it explains the plan in force in the
    cluster that KUBECONFIG names; with -f it solves from files, as `llmfleet plan` does.

    \b
    Examples:
      llmfleet explain chat -n quickstart
      llmfleet explain chat -f examples/quickstart --inventory l4=8,a100-80gb=8
      llmfleet explain chat -f fleet.yaml --previous plan.json
      llmfleet explain chat -o json
    """
    from llmfleet.cli.explanation import explanation_of, find_service, write_explanation
    from llmfleet.cli.render import form_of

    form = form_of(output)
    files = [*(filename or []), *(more or [])]
    before = None
    if files:
        from llmfleet.cli.forecasts import with_forecast
        from llmfleet.cli.manifests import read_manifests
        from llmfleet.cli.planning import inputs_of, read_plan, solved

        inputs, _ = inputs_of(read_manifests(files, namespace=namespace or "default"), inventory)
        inputs, before = with_forecast(_traced(inputs, trace), forecast), read_plan(previous)
        decided = solved(inputs, before)
    elif inventory is not None or previous is not None or trace or forecast is not None:
        raise typer.BadParameter(
            "is for files: give -f as well, or neither", param_hint="--inventory, --previous, --trace or --forecast"
        )
    else:
        from llmfleet.cli.cluster import read_fleet

        fleet = read_fleet()
        for note in fleet.notes:
            print(note, file=sys.stderr)
        inputs, decided = fleet.inputs, fleet.plan
    found = find_service(inputs, service, namespace)
    write_explanation(explanation_of(decided, inputs, found, before), decided, found, form)


def _traced(inputs: PlanInputs, trace: list[str] | None) -> PlanInputs:
    """The inputs with the demand of these traces; what there is to know about each goes to standard error."""
    if not trace:
        return inputs
    from llmfleet.cli.traces import with_traces

    inputs, notes = with_traces(inputs, trace)
    for note in notes:
        print(note, file=sys.stderr)
    return inputs
