"""`llmfleet profile import`: results of other tools and a model's config.json, into a ModelProfile's YAML.

The formats are understood in `placement/performance/importers`; here files become text, refusals become the command
line's, and the outcome is put in its place by `document.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from llmfleet.api import DEFAULT_CONFIGURATION, Architecture, Configuration, Measurement
from llmfleet.cli.profiling.document import (
    architecture_yaml,
    buckets_of,
    configuration_of,
    measurement_yaml,
    merge_architecture,
    merge_measurement,
    model_of,
)
from llmfleet.cli.refused import RefusedError
from llmfleet.placement.performance.architecture import ConfigError, architecture_of
from llmfleet.placement.performance.importers import Imported, ImportRefusedError, at_corners, combined, read_benchmark
from llmfleet.placement.performance.importers.aibrix import KnownObjective


@dataclass(frozen=True)
class ImportedVariant:
    """What was measured, as the command line says."""

    gpu_type: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    configuration: str = DEFAULT_CONFIGURATION


def objective(ttft_ms: float | None, tpot_ms: float | None, percentile: float) -> KnownObjective | None:
    """The objective given on the command line, None where none was. Raises RefusedError for half of one."""
    if ttft_ms is None and tpot_ms is None:
        return None
    if ttft_ms is None or tpot_ms is None or min(ttft_ms, tpot_ms) <= 0 or not 0 < percentile < 100:
        raise RefusedError(
            f"--ttft-ms {ttft_ms} --tpot-ms {tpot_ms} --percentile {percentile:g}: accepted are both times above 0 "
            "and a percentile between 0 and 100"
        )
    return KnownObjective(ttft_ms, tpot_ms, percentile)


def read(text: str, name: str, stated: KnownObjective | None) -> Imported:
    """What one result file says. Raises RefusedError with path and value."""
    try:
        return read_benchmark(text, name, stated)
    except ImportRefusedError as refused:
        raise RefusedError(str(refused)) from refused


def architecture(text: str, name: str, weight_bits: float, expert_bits: float | None, kv_bits: float) -> Architecture:
    """The shape that a config.json describes. Raises RefusedError with the field."""
    try:
        parsed = json.loads(text)
        if not isinstance(parsed, dict):
            raise ConfigError("accepted is a JSON object")
        return architecture_of(parsed, dense_bits=weight_bits, expert_bits=expert_bits, kv_bits=kv_bits)
    except json.JSONDecodeError as error:
        raise RefusedError(f"{name}: not JSON: {error}") from error
    except ConfigError as error:
        raise RefusedError(f"{name}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise RefusedError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def with_architecture(profile_yaml: str | None, shape: Architecture, name: str) -> str:
    """The profile with its architecture; without a profile the architecture alone."""
    return architecture_yaml(shape) if profile_yaml is None else merge_architecture(profile_yaml, shape, name)


def with_results(
    profile_yaml: str | None, name: str, results: list[Imported], variant: ImportedVariant
) -> tuple[str, list[str]]:
    """(the profile with the measurement, or the measurement alone; what was filled in, repaired or left out).

    Raises RefusedError where results contradict each other or the variant, fit no bucket, or leave one without a run.
    """
    configuration = None
    if profile_yaml is not None:
        configuration = configuration_of(profile_yaml, variant.configuration, name)
    try:
        found = combined(results)
        if profile_yaml is not None:
            found = at_corners(found, buckets_of(profile_yaml, name))
    except ImportRefusedError as refused:
        raise RefusedError(str(refused)) from refused
    notes = [*found.notes, *_agreement(found, variant, configuration)]
    model = None if profile_yaml is None else model_of(profile_yaml, name)
    if configuration is not None and configuration.model is not None:
        model = configuration.model
    if model is not None and found.model not in ("", model):
        notes.append(f"the files name the model {found.model}, {name} names {model}")
    try:
        measurement = Measurement(
            gpu_type=variant.gpu_type,
            tensor_parallel=variant.tensor_parallel,
            pipeline_parallel=variant.pipeline_parallel,
            configuration=variant.configuration,
            engine=found.engine,
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            points=found.points,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise RefusedError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if profile_yaml is None:
        return measurement_yaml(measurement), notes
    return merge_measurement(profile_yaml, measurement, name), notes


def _agreement(found: Imported, variant: ImportedVariant, configuration: Configuration | None) -> list[str]:
    """What the files say of the engine and the variant leaves open, in words. Raises RefusedError where they differ."""
    wanted: dict[str, object] = {
        "tensor_parallel": variant.tensor_parallel,
        "pipeline_parallel": variant.pipeline_parallel,
    }
    options = ("quantization", "kv_cache_dtype", "max_num_batched_tokens", "max_num_seqs")
    if configuration is not None:
        wanted |= {option: value for option in options if (value := getattr(configuration, option)) is not None}
    notes = []
    for fact, value in found.run_with.items():
        if fact in wanted and str(wanted[fact]) != value:
            raise RefusedError(
                f"the files say {fact} {value}, but the variant has {wanted[fact]}; accepted are --tensor-parallel, "
                "--pipeline-parallel and --configuration as it was measured"
            )
        if fact not in wanted:
            notes.append(f"the files say {fact} {value}, which configuration {variant.configuration} leaves open")
    return notes
