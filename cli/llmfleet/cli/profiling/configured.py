"""The engine that a measurement is made on: what it has to be started with, and whether it was, as far as it says.

    Configuration --start_command--> a `vllm serve` line to start it with
    what the engine says of itself --require_configuration--> or a refusal

A measurement filed under another precision than it was made in would buy the wrong number of engines of the wrong
weights. vLLM names the weights it serves and the type of its cache; how the weights are quantized it does not say.
"""

from __future__ import annotations

import shlex

from llmfleet.api import Configuration
from llmfleet.cli.profiling.engine import ServedModel
from llmfleet.cli.refused import RefusedError


def start_command(
    model: str, configuration: Configuration | None, tensor_parallel: int, pipeline_parallel: int, context_tokens: int
) -> str:
    """The `vllm serve` line of a variant; the service's own `engine.args` come on top."""
    weights, revision = model, None
    if configuration is not None:
        weights, revision = configuration.model or model, configuration.revision
    return shlex.join(
        [
            *("vllm", "serve", weights),
            *(("--revision", revision) if revision is not None else ()),
            *("--max-model-len", str(context_tokens)),
            *(("--tensor-parallel-size", str(tensor_parallel)) if tensor_parallel > 1 else ()),
            *(("--pipeline-parallel-size", str(pipeline_parallel)) if pipeline_parallel > 1 else ()),
            *(configuration.engine_args() if configuration is not None else ()),
        ]
    )


def require_configuration(configuration: Configuration, model: ServedModel, cache_dtype: str | None) -> None:
    """Raises RefusedError where the engine says that it runs otherwise. A local copy of the weights counts by its last
    folder's name."""
    wanted = configuration.model
    if wanted is not None and model.weights is not None and _last(model.weights) != _last(wanted):
        raise RefusedError(
            f"the engine serves the weights {model.weights}; accepted for configuration {configuration.name} are those "
            f"of {wanted}"
        )
    wanted = configuration.kv_cache_dtype
    if wanted is not None and cache_dtype is not None and cache_dtype != wanted:
        raise RefusedError(
            f"the engine's KV cache is of type {cache_dtype}; accepted for configuration {configuration.name} is "
            f"--kv-cache-dtype {wanted}"
        )


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
