"""Options of `llmfleet profile`; what it does is in `profiling/`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmfleet.cli.refused import RefusedError

if TYPE_CHECKING:
    from llmfleet.api import Buckets


def profile(
    url: Annotated[
        str, typer.Option(metavar="URL", help="Where the engine answers, for example http://10.0.0.5:8000.")
    ],
    gpu_type: Annotated[str, typer.Option(metavar="TYPE", help="Name of the GPUType that it runs on.")],
    filename: Annotated[
        Path | None,
        typer.Option(
            "-f",
            "--filename",
            metavar="FILE",
            help="ModelProfile whose buckets are measured, and into which the measurement is put.",
            show_default=False,
        ),
    ] = None,
    input_tokens: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Without -f: upper edges over the prompt's length.", show_default=False),
    ] = None,
    output_tokens: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Without -f: upper edges over the answer's length.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(metavar="N", min=1, help="Devices of the engine.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Model name to ask for.", show_default="the only one that the engine serves"),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Requests in flight at once, ascending; a bucket is done at the one that brings no more throughput.",
            show_default="1,2,4,...,256",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", help="Least time for each point.")] = 20.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random prompts.")] = 0,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", envvar="LLMFLEET_API_KEY", help="Sent to the engine as bearer token.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Where the result goes; may be the file of -f.",
            show_default="standard output",
        ),
    ] = None,
) -> None:
    """Measure a running engine and write what a ModelProfile needs.

    Start one engine with the arguments that it will be served with and nothing else on its devices. Each size bucket
    is measured at rising concurrency, with random prompts that share nothing, until more brings no more throughput.
    With -f the result is the whole ModelProfile, without it the one item of `spec.measurements`.

    \b
    Examples:
      llmfleet profile --url http://10.0.0.5:8000 --gpu-type l4 -f profile.yaml -o profile.yaml
      llmfleet profile --url http://10.0.0.6:8000 --gpu-type h100 --tensor-parallel 2 -f profile.yaml -o profile.yaml
      llmfleet profile --url http://127.0.0.1:8000 --gpu-type l4 --input-tokens 512,2048 --output-tokens 128
    """
    import asyncio

    from llmfleet.cli.profiling import ProfileSettings, measurement_yaml, merge_measurement, profile_engine
    from llmfleet.cli.profiling.settings import DEFAULT_CONCURRENCIES

    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output.parent} is no folder", param_hint="-o")
    settings = ProfileSettings(
        url=url,
        gpu_type=gpu_type,
        buckets=_buckets(filename, input_tokens, output_tokens),
        tensor_parallel=tensor_parallel,
        model=model,
        api_key=api_key,
        concurrencies=DEFAULT_CONCURRENCIES if concurrency is None else _numbers(concurrency, "--concurrency"),
        seconds_per_point=seconds,
        seed=seed,
    )
    measurement = asyncio.run(profile_engine(settings, lambda line: print(line, file=sys.stderr, flush=True)))
    if filename is None:
        text = measurement_yaml(measurement)
    else:
        text = merge_measurement(_read(filename), measurement, str(filename))
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")


def _buckets(filename: Path | None, input_tokens: str | None, output_tokens: str | None) -> Buckets:
    from pydantic import ValidationError

    from llmfleet.api import Buckets
    from llmfleet.cli.profiling import buckets_of

    if filename is not None:
        if input_tokens is not None or output_tokens is not None:
            raise typer.BadParameter("is for measuring without -f", param_hint="--input-tokens or --output-tokens")
        return buckets_of(_read(filename), str(filename))
    if input_tokens is None or output_tokens is None:
        raise typer.BadParameter("give -f, or --input-tokens and --output-tokens", param_hint="the buckets")
    edges = {
        "inputTokens": _numbers(input_tokens, "--input-tokens"),
        "outputTokens": _numbers(output_tokens, "--output-tokens"),
    }
    try:
        return Buckets.model_validate(edges)
    except ValidationError as error:
        message = str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
        raise typer.BadParameter(message, param_hint="the buckets") from error


def _numbers(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 1,2,4", param_hint=option)
    return [int(part) for part in parts]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path}: cannot be read: {error}") from error
