"""Options of `llmfleet profile`; what it does is in `profiling/`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmfleet.cli.refused import RefusedError

if TYPE_CHECKING:
    from llmfleet.api import Buckets


profile_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@profile_app.callback()
def profile(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where the engine answers, for example http://10.0.0.5:8000.", show_default=False
        ),
    ] = None,
    gpu_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Name of the GPUType that it runs on.", show_default=False)
    ] = None,
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
    buckets_from: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Without -f: edges fitted to a trace's requests (forms as for `llmfleet plan --trace`). Without --url "
            "they are only printed, as they stand in a ModelProfile.",
            show_default=False,
        ),
    ] = None,
    bucket_excess: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="With --buckets-from: tokens that a request may be over-estimated by, in the mean, on each axis; the "
            "fewest edges that keep to it are chosen.",
        ),
    ] = 0.25,
    tensor_parallel: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="Devices of the engine that share every layer.")
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="Stages of such devices, within one node.")
    ] = 1,
    configuration: Annotated[
        str,
        typer.Option(metavar="NAME", help="How the engine was started: a name of the profile's spec.configurations."),
    ] = "default",
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
    With -f the result is the whole ModelProfile, without it the one item of `spec.measurements`. With -f and
    neither --url nor --gpu-type, the command that the engine has to be started with is printed. The subcommand `import`
    takes what another tool has measured instead.

    \b
    Examples:
      llmfleet profile --url http://10.0.0.5:8000 --gpu-type l4 -f profile.yaml -o profile.yaml
      llmfleet profile --url http://10.0.0.6:8000 --gpu-type h100 --tensor-parallel 2 -f profile.yaml -o profile.yaml
      llmfleet profile --url http://127.0.0.1:8000 --gpu-type l4 --input-tokens 512,2048 --output-tokens 128
      llmfleet profile --configuration fp8 -f profile.yaml
      llmfleet profile --url http://10.0.0.7:8000 --gpu-type l4 --configuration fp8 -f profile.yaml -o profile.yaml
      llmfleet profile --buckets-from requests.csv
    """
    if context.invoked_subcommand is not None:
        return
    if buckets_from is not None and url is None and gpu_type is None:
        from llmfleet.cli.profiling.fitting import buckets_yaml

        print(buckets_yaml(_buckets(filename, input_tokens, output_tokens, buckets_from, bucket_excess)), end="")
        return
    if filename is not None and url is None and gpu_type is None:
        print(_start_command(_read(filename), str(filename), configuration, tensor_parallel, pipeline_parallel))
        return
    if url is None or gpu_type is None:
        raise typer.BadParameter("is required", param_hint="--url" if url is None else "--gpu-type")
    import asyncio

    from llmfleet.cli.profiling import (
        ProfileSettings,
        configuration_of,
        measurement_yaml,
        merge_measurement,
        profile_engine,
    )
    from llmfleet.cli.profiling.settings import DEFAULT_CONCURRENCIES

    if configuration != "default" and filename is None:
        raise typer.BadParameter("needs -f, the ModelProfile that describes it", param_hint="--configuration")
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output.parent} is no folder", param_hint="-o")
    settings = ProfileSettings(
        url=url,
        gpu_type=gpu_type,
        buckets=_buckets(filename, input_tokens, output_tokens, buckets_from, bucket_excess),
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        configuration=(None if filename is None else configuration_of(_read(filename), configuration, str(filename))),
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


@profile_app.command("import")
def import_results(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Results of `vllm bench serve`, guidellm, or AIBrix profiles (JSON)."),
    ] = None,
    gpu_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Name of the GPUType that was measured.", show_default=False)
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="Devices of the engine that share every layer.")
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="Stages of such devices, within one node.")
    ] = 1,
    configuration: Annotated[
        str,
        typer.Option(metavar="NAME", help="How the engine was started: a name of the profile's spec.configurations."),
    ] = "default",
    filename: Annotated[
        Path | None,
        typer.Option(
            "-f",
            "--filename",
            metavar="FILE",
            help="ModelProfile into which the result is put.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The model's Hugging Face config.json; its shape becomes spec.architecture.",
            show_default=False,
        ),
    ] = None,
    weight_bits: Annotated[float, typer.Option(metavar="N", help="With --config: bits of a weight as served.")] = 16.0,
    expert_bits: Annotated[
        float | None,
        typer.Option(metavar="N", help="With --config: bits of an expert's weight.", show_default="--weight-bits"),
    ] = None,
    kv_bits: Annotated[float, typer.Option(metavar="N", help="With --config: bits of a number in the cache.")] = 16.0,
    ttft_ms: Annotated[
        float | None,
        typer.Option(metavar="MS", help="For AIBrix profiles that state no objective: its TTFT.", show_default=False),
    ] = None,
    tpot_ms: Annotated[float | None, typer.Option(metavar="MS", help="The same: its TPOT.", show_default=False)] = None,
    percentile: Annotated[float, typer.Option(metavar="P", help="The same: its percentile; 50 for the mean.")] = 99.0,
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
    """Take what other tools have measured, or a model's architecture, into a ModelProfile.

    Every bucket's upper corner needs a run of its sizes, or up to a quarter above. What a file says of the engine
    (`vllm bench serve --metadata tp=2 quantization=fp8`) must agree with the options here. What it leaves open is
    filled in pessimistically and said on standard error; what contradicts itself is repaired towards the worse, and
    said too.

    \b
    Examples:
      llmfleet profile import c*.json --gpu-type l4 -f profile.yaml -o profile.yaml
      llmfleet profile import --config config.json --weight-bits 8 -f profile.yaml -o profile.yaml
    """
    from llmfleet.cli.profiling import importing

    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output.parent} is no folder", param_hint="-o")
    if not files and config is None:
        raise typer.BadParameter("give result files, or --config", param_hint="FILE")
    if files and gpu_type is None:
        raise typer.BadParameter("is required with result files", param_hint="--gpu-type")
    if config is not None and files and filename is None:
        raise typer.BadParameter("with both, give -f", param_hint="FILE and --config")
    text = None if filename is None else _read(filename)
    name = str(filename)
    if config is not None:
        shape = importing.architecture(_read(config), str(config), weight_bits, expert_bits, kv_bits)
        text = importing.with_architecture(text, shape, name)
    if files and gpu_type is not None:
        stated = importing.objective(ttft_ms, tpot_ms, percentile)
        results = [importing.read(_read(path), str(path), stated) for path in files]
        variant = importing.ImportedVariant(gpu_type, tensor_parallel, pipeline_parallel, configuration)
        text, notes = importing.with_results(text, name, results, variant)
        for note in notes:
            print(note, file=sys.stderr)
    if text is not None and output is None:
        print(text, end="")
    elif text is not None and output is not None:
        output.write_text(text, encoding="utf-8")


def _start_command(text: str, name: str, configuration: str, tensor_parallel: int, pipeline_parallel: int) -> str:
    from llmfleet.cli.profiling import buckets_of, configuration_of, model_of, start_command

    edges = buckets_of(text, name)
    return start_command(
        model_of(text, name),
        configuration_of(text, configuration, name),
        tensor_parallel,
        pipeline_parallel,
        edges.input_tokens[-1] + edges.output_tokens[-1],
    )


def _buckets(
    filename: Path | None,
    input_tokens: str | None,
    output_tokens: str | None,
    trace: Path | None,
    excess: float,
) -> Buckets:
    """The buckets, from the one place that says them; how well they fit a trace goes to standard error."""
    from pydantic import ValidationError

    from llmfleet.api import Buckets
    from llmfleet.cli.profiling import buckets_of

    sources = "-f, --buckets-from, or --input-tokens and --output-tokens"
    listed = input_tokens is not None or output_tokens is not None
    if sum((filename is not None, trace is not None, listed)) != 1:
        raise typer.BadParameter(f"give one of {sources}", param_hint="the buckets")
    if filename is not None:
        return buckets_of(_read(filename), str(filename))
    if trace is not None:
        from llmfleet.cli.profiling.fitting import buckets_from

        fitted, note = buckets_from(trace, excess)
        print(note, file=sys.stderr)
        return fitted
    if input_tokens is None or output_tokens is None:
        raise typer.BadParameter(f"give one of {sources}", param_hint="the buckets")
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
