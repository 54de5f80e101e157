"""The `llmfleet` command, which is also `kubectl llmfleet`.

    plan       solve from files                        explain    why a service's plan is as it is
    profile    measure a running engine                operator   run the operator
    gateway    run the gateway                     requests   what runs on which engine
    drain      leave an engine                     migrate    move a running request

A command's module names its options and says what it does; what it needs is imported when it runs, so that `llmfleet
--help` and `llmfleet plan` need neither kopf nor a Kubernetes client, and an image carries only what its part runs.

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

from llmfleet.cli.engine_commands import drain, migrate, requests
from llmfleet.cli.plan_commands import explain, plan
from llmfleet.cli.profile_command import profile_app
from llmfleet.cli.refused import RefusedError
from llmfleet.cli.server_commands import gateway, operator

_PLUGIN = "kubectl-llmfleet"
_INTERRUPTED = 130
_WIDTH = 100

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH},
)


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


for command in (plan, explain, operator, gateway, requests, drain, migrate):
    app.command()(command)
app.add_typer(profile_app, name="profile")


def main() -> None:
    """Entry point of `llmfleet` and `kubectl-llmfleet`."""
    sys.exit(run(sys.argv[1:], name=Path(sys.argv[0]).name))


def run(arguments: list[str], *, name: str = "llmfleet") -> int:
    """Runs one command and returns its exit code; without arguments it is `--help`. `name` is what the user called the
    program."""
    program = "kubectl llmfleet" if name == _PLUGIN else "llmfleet"
    try:
        code = typer.main.get_command(app).main(arguments or ["--help"], prog_name=program, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except RefusedError as error:
        return _complain(program, str(error), 1)
    except typer.TyperException as error:
        return _complain(program, error.format_message(), error.exit_code)
    except typer.Abort:
        return _complain(program, "interrupted", _INTERRUPTED)
    except ModuleNotFoundError as error:
        part = next((argument for argument in arguments if not argument.startswith("-")), "cli")
        needed = part if part in ("operator", "gateway") else "cli"
        return _complain(program, f"{error.name} is not installed: this needs `pip install llmfleet[{needed}]`", 1)
    except BrokenPipeError:
        # The reader of our output (`head`, say) has gone; nothing is left to be told to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _complain(program: str, message: str, code: int) -> int:
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
