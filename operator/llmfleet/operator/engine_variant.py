"""A variant as the operator runs it: how many devices, which labels, which arguments its engines start with.

    PlannedVariant --Variant.of--> Variant --engine_args--> the command line of vLLM
                                           --labels-------> what Deployment and pods say of it

The plan carries a variant's configuration whole, so engines are rendered from service, GPUType and plan alone: a
profile that was deleted or does not parse takes no engine away. The configuration's options stand before the
service's own, and a service that sets the same ones is refused: of two equal options vLLM takes the last, and the
engine would run otherwise than it was measured and planned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from llmfleet.api import Configuration, LLMService, PlannedVariant
from llmfleet.operator.model import LABEL_GPU_TYPE, LABEL_PIPELINE_PARALLEL, LABEL_TENSOR_PARALLEL
from llmfleet.operator.overlay import MOUNT_WEIGHTS, InvalidSpec


@dataclass(frozen=True, slots=True)
class Variant:
    """A way of serving, as the plan names it."""

    name: str
    gpu_type: str
    tensor_parallel: int
    pipeline_parallel: int = 1
    configuration: Configuration | None = None
    """None: the default one, or not known because nothing of it is planned."""

    @classmethod
    def of(cls, planned: PlannedVariant) -> Self:
        """The variant that a plan gives replicas to."""
        layout = (planned.tensor_parallel, planned.pipeline_parallel)
        return cls(planned.name, planned.gpu_type, *layout, planned.configuration)

    @property
    def devices(self) -> int:
        """Devices per replica."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def labels(self) -> dict[str, str]:
        """What Deployment and pods say of it, beside its name."""
        stages = {LABEL_PIPELINE_PARALLEL: str(self.pipeline_parallel)} if self.pipeline_parallel > 1 else {}
        return {LABEL_GPU_TYPE: self.gpu_type, LABEL_TENSOR_PARALLEL: str(self.tensor_parallel), **stages}


def check_configuration(service: LLMService, configuration: Configuration | None) -> None:
    """Refuses a service whose own arguments would change what its configuration sets. Raises `overlay.InvalidSpec`."""
    if configuration is None:
        return
    contradicting = configuration.contradicted_by(service.spec.engine.args)
    if contradicting is not None:
        raise InvalidSpec(
            "InvalidEngineArgs",
            f"LLMService {service.key}: spec.engine.args",
            contradicting,
            f"options that configuration {configuration.name} of ModelProfile {service.spec.profile} does not set, or "
            "spec.configurations without it",
        )


def engine_args(service: LLMService, variant: Variant, port: int) -> list[str]:
    """Arguments of an engine that listens on `port`: the operator's, the configuration's, then the service's own."""
    engine, stages, configuration = service.spec.engine, variant.pipeline_parallel, variant.configuration
    path, revision = _weights(service, configuration)
    return [
        # `vllm serve` takes the model by position, the server module only by option.
        *([path] if engine.command[-1] == "serve" else ["--model", path]),
        *("--served-model-name", service.served_name),
        *(("--revision", revision) if revision is not None else ()),
        *("--max-model-len", str(service.spec.model.context_length)),
        *("--tensor-parallel-size", str(variant.tensor_parallel)),
        *(("--pipeline-parallel-size", str(stages)) if stages > 1 else ()),
        *(configuration.engine_args() if configuration is not None else ()),
        *("--host", "0.0.0.0"),
        *("--port", str(port)),
        *engine.args,
    ]


def revision(service: LLMService, variant: Variant) -> list[str | None]:
    """What makes two engines go on with each other's answers: the same weights, in the same precision."""
    model, configuration = service.spec.model, variant.configuration
    path, of_hub = _weights(service, configuration)
    return [model.source, model.claim, path, of_hub, configuration.quantization if configuration is not None else None]


def _weights(service: LLMService, configuration: Configuration | None) -> tuple[str, str | None]:
    """(repository or path, revision): the configuration's, where it has other weights than the service names."""
    model = service.spec.model
    name, revision = model.name, model.revision
    if configuration is not None and configuration.model is not None:
        name, revision = configuration.model, None
    if configuration is not None and configuration.revision is not None:
        revision = configuration.revision
    return (f"{MOUNT_WEIGHTS}/{name.lstrip('/')}" if model.source == "pvc" else name), revision
