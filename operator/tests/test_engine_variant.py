"""Engines of another precision or layout: what they are started with, what they hold, and when they are restarted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from llmfleet.api import (
    Buckets,
    Configuration,
    FleetPolicySpec,
    GPUType,
    GPUTypeStatus,
    LatencyCoefficients,
    LLMService,
    PlannedVariant,
    ServicePlan,
)
from llmfleet.operator.engine_variant import Variant
from llmfleet.operator.inventory import free_devices, wanted_devices
from llmfleet.operator.model import ApplyDeployment, Observed, PlannedService, WriteStatus
from llmfleet.operator.overlay import InvalidSpec
from llmfleet.operator.parse import deployment_from_object
from llmfleet.operator.reconcile import reconcile
from llmfleet.operator.render import deployment, inputs_hash, render_template

LATENCY = LatencyCoefficients(ttft_base_ms=1, ttft_ms_per_input_token=0, tpot_base_ms=1, tpot_ms_per_running=0)


def gpu_type() -> GPUType:
    body = {"resourceName": "nvidia.com/gpu", "memoryGib": 24, "pricePerHour": {"onDemand": 1}}
    return GPUType.parse({"metadata": {"name": "l4"}, "spec": body})


def llm_service(model: dict[str, Any] | None = None, **spec: Any) -> LLMService:
    body = {
        "model": {"name": "org/model", "contextLength": 4096, **(model or {})},
        "profile": "p",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
        **spec,
    }
    return LLMService.parse({"metadata": {"name": "chat", "namespace": "ns", "uid": "u-1"}, "spec": body})


def configuration(**fields: Any) -> Configuration:
    return Configuration.model_validate({"name": "fp8", "weightsGib": 8, **fields})


PLAN = ServicePlan(
    namespace="ns",
    service="chat",
    buckets=Buckets(input_tokens=[512], output_tokens=[128]),
    variants=[
        PlannedVariant(
            name="l4-tp2-pp2",
            gpu_type="l4",
            tensor_parallel=2,
            pipeline_parallel=2,
            configuration=configuration(),
            replicas=5,
            cost_per_replica_hour=4,
            latency=LATENCY,
        )
    ],
    routes=[],
    demand=[0.0],
    unserved_rps=0,
    cost_per_hour=20,
)


def run_in(run: Configuration) -> ServicePlan:
    """The plan with its engines in another configuration."""
    return PLAN.model_copy(update={"variants": [PLAN.variants[0].model_copy(update={"configuration": run})]})


def args(
    service: LLMService, tensor_parallel: int = 1, pipeline_parallel: int = 1, *, run: Configuration | None = None
) -> list[str]:
    variant = Variant("l4-x", "l4", tensor_parallel, pipeline_parallel, run)
    container = render_template(service, gpu_type(), variant)["spec"]["containers"][0]
    found: list[str] = container["args"]
    return found


def hashed(run: Configuration | None, pipeline_parallel: int = 1) -> str:
    return inputs_hash(llm_service(), gpu_type(), Variant("l4", "l4", 1, pipeline_parallel, run))


def test_a_configuration_s_options_stand_between_the_operator_s_and_the_service_s_own() -> None:
    own = llm_service(engine={"args": ["--enforce-eager"]})
    assert args(own, run=configuration(quantization="fp8", kvCacheDtype="fp8", kvKibPerToken=1, maxNumSeqs=64)) == [
        *("org/model", "--served-model-name", "chat", "--max-model-len", "4096", "--tensor-parallel-size", "1"),
        *("--quantization", "fp8", "--kv-cache-dtype", "fp8", "--max-num-seqs", "64"),
        *("--host", "0.0.0.0", "--port", "8000", "--enforce-eager"),
    ]


def test_stages_are_rendered_and_every_stage_has_its_devices() -> None:
    assert "--pipeline-parallel-size" not in args(llm_service(), 2, 1)
    found = args(llm_service(), 2, 4)
    assert found[found.index("--pipeline-parallel-size") + 1] == "4"
    pod = render_template(llm_service(), gpu_type(), Variant("l4-tp2-pp4", "l4", 2, 4))["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert pod["volumes"][0]["emptyDir"]["sizeLimit"] == "16Gi"


@pytest.mark.parametrize(
    ("model", "other", "path", "revision"),
    [
        ({}, {}, "org/model", None),
        ({"revision": "v1"}, {}, "org/model", "v1"),
        ({"revision": "v1"}, {"model": "org/model-fp8"}, "org/model-fp8", None),
        ({"revision": "v1"}, {"model": "org/model-fp8", "revision": "v2"}, "org/model-fp8", "v2"),
        ({"revision": "v1"}, {"revision": "gptq"}, "org/model", "gptq"),
        ({"source": "pvc", "name": "org/model", "claim": "c"}, {"model": "org/fp8"}, "/weights/org/fp8", None),
        ({"source": "path", "name": "/models/a"}, {"model": "/models/a-fp8"}, "/models/a-fp8", None),
    ],
)
def test_other_weights_take_the_place_of_the_service_s_with_their_own_revision(
    model: dict[str, Any], other: dict[str, Any], path: str, revision: str | None
) -> None:
    found = args(llm_service(model), run=configuration(**other))
    assert found[0] == path
    assert (found[found.index("--revision") + 1] if "--revision" in found else None) == revision


def test_a_service_that_sets_the_same_option_is_refused_with_what_to_write() -> None:
    own = llm_service(engine={"args": ["--enforce-eager", "--quantization=awq"]})
    with pytest.raises(InvalidSpec, match="options that configuration fp8 of ModelProfile p does not set") as refused:
        args(own, run=configuration(quantization="fp8"))
    assert (refused.value.reason, refused.value.value) == ("InvalidEngineArgs", "--quantization=awq")
    assert "--quantization=awq" in args(own)


def test_what_changes_the_engine_changes_the_inputs_hash_and_memory_figures_do_not() -> None:
    runs = [None, configuration(), configuration(quantization="fp8"), configuration(model="org/other")]
    hashes = {hashed(run) for run in runs} | {hashed(None, 2)}
    assert len(hashes) == 5
    assert hashed(configuration(weightsGib=9, overheadGib=3, weightBits=8)) == hashed(configuration())


def test_engines_of_plain_variants_are_not_restarted_by_a_version_that_knows_configurations() -> None:
    assert hashed(None) == "45710bfcf40d41f3"


def test_stages_count_as_devices_wherever_devices_are_counted() -> None:
    variant = Variant("l4-tp2-pp2", "l4", 2, 2)
    made = deployment(
        llm_service(),
        variant,
        template=render_template(llm_service(), gpu_type(), variant),
        inputs="i",
        replicas=3,
        surge=True,
        max_unavailable=1,
        startup_deadline_seconds=1800,
    )
    seen = deployment_from_object(made)
    assert (seen.tensor_parallel, seen.pipeline_parallel, seen.devices) == (2, 2, 4)
    assert variant.labels.items() <= made["spec"]["template"]["metadata"]["labels"].items()
    assert free_devices({"l4": GPUTypeStatus(available_devices=20, conditions=[])}, [seen], []) == {"l4": 8}
    assert wanted_devices([PLAN], [seen], {}) == {"l4": 8}
    assert Variant.of(PLAN.variants[0]) == Variant("l4-tp2-pp2", "l4", 2, 2, configuration())


def test_a_plan_of_a_configuration_becomes_engines_that_run_in_it_and_a_status_of_their_devices() -> None:
    seen = Observed(
        service=llm_service(),
        deployments=(),
        pods=(),
        routing=None,
        gpu_types={"l4": gpu_type()},
        free_devices={"l4": 20},
        unfit_nodes=frozenset(),
        policy=FleetPolicySpec(),
        now=datetime(2026, 1, 1, tzinfo=UTC),
    )
    actions = reconcile(PlannedService(plan_id="p", plan=run_in(configuration(maxNumSeqs=64))), seen)
    (applied,) = [action.manifest for action in actions if isinstance(action, ApplyDeployment)]
    assert applied["spec"]["replicas"] == 5
    assert "--max-num-seqs" in applied["spec"]["template"]["spec"]["containers"][0]["args"]
    (status,) = [action.status for action in actions if isinstance(action, WriteStatus)]
    (variant,) = status.variants
    assert (variant.name, variant.tensor_parallel, variant.devices) == ("l4-tp2-pp2", 2, 4)
    assert reconcile(PlannedService(plan_id="p", plan=PLAN), seen) != actions
