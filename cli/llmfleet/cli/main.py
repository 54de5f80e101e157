"""The `llmfleet` command, which is also `kubectl llmfleet`.

    plan       solve from files                        explain    why a service's plan is as it is
    profile    measure a running engine                operator   run the operator
    gateway    run the gateway

This module only names commands and options; each command imports what it needs when it runs, so that `llmfleet
--help` and `llmfleet plan` need neither kopf nor a Kubernetes client.

Whatever goes wrong is one line on standard error. Exit code 1: an input was refused. Exit code 2: the command was
used wrongly. What was asked for is on standard output and nothing else is.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from llmfleet.cli.refused import RefusedError

_PLUGIN = "kubectl-llmfleet"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

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
    list[str] | None, typer.Argument(metavar="FILE", help="More files, so that `-f *.yaml` works.")
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
Namespace = Annotated[
    str, typer.Option("-n", "--namespace", help="Namespace of objects that name none, and of SERVICE.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llmfleet {version('llmfleet')}")
        raise typer.Exit


@app.callback()
def llmfleet(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The cheapest mix of GPU types that keeps an LLM service's latency objective."""


@app.command()
def plan(
    filename: Filenames = None,
    more: MoreFilenames = None,
    inventory: Inventory = None,
    previous: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The plan in force, as `-o json` wrote it: changing it has a price.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="table|json|yaml", help="Form.")] = "table",
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
      kubectl get llms,mprof,gput,fleetp,nodes,pods -A -o yaml | llmfleet plan -f -
    """
    from llmfleet.cli.manifests import read_manifests
    from llmfleet.cli.planning import plan_files, read_plan
    from llmfleet.cli.render import Format, write_plan

    if output not in list(Format):
        raise typer.BadParameter(f"{output!r} is not one of {', '.join(Format)}", param_hint="-o")
    manifests = read_manifests(_some(filename, more), namespace=namespace)
    decided, devices = plan_files(manifests, inventory, read_plan(previous) if previous is not None else None)
    write_plan(decided, Format(output), devices=devices.source)
    if decided.refusals:
        first = decided.refusals[0]
        total = len(decided.refusals) + len(decided.services)
        raise RefusedError(
            f"{len(decided.refusals)} of {total} services refused, first {first.key}: {first.reason}: {first.message}"
        )


def _some(filename: list[str] | None, more: list[str] | None) -> list[str]:
    files = [*(filename or []), *(more or [])]
    if not files:
        raise typer.BadParameter("at least one file is needed", param_hint="-f")
    return files


def main() -> None:
    """Entry point of `llmfleet` and `kubectl-llmfleet`."""
    sys.exit(run(sys.argv[1:], name=Path(sys.argv[0]).name))


def run(arguments: list[str], *, name: str = "llmfleet") -> int:
    """Runs one command and returns its exit code. `name` is what the user called the program."""
    program = "kubectl llmfleet" if name == _PLUGIN else "llmfleet"
    try:
        code = typer.main.get_command(app).main(arguments, prog_name=program, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except RefusedError as error:
        _complain(program, str(error))
        return 1
    except typer.TyperException as error:
        _complain(program, error.format_message())
        return error.exit_code
    except typer.Abort:
        _complain(program, "interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output (`head`, say) has gone; nothing is left to be told to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _complain(program: str, message: str) -> None:
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
