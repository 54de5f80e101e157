"""Precision and engine arguments as decisions: what is planned, what it takes, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfleet.api import Configuration, Plan, PlannedVariant, ServicePlan
from llmfleet.placement import Demand, PlanInputs, plan, violations
from llmfleet.placement.performance.variant_model import AtMost, variant_model
from placement_testing.fleets import fleet, gpu_type, profile, rates_profile, replicas, service

FP8: dict[str, Any] = {"name": "fp8", "quantization": "fp8", "weightsGib": 5}
BOTH = ["default", "fp8"]
DEMAND = {"s": [4.0, 0.0]}


def planned(inputs: PlanInputs) -> Plan:
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    return decided


def only(inputs: PlanInputs) -> ServicePlan:
    decided = planned(inputs)
    assert decided.refusals == []
    return decided.services[0]


def variant(inputs: PlanInputs) -> PlannedVariant:
    (found,) = only(inputs).variants
    return found


def refusal(inputs: PlanInputs) -> tuple[str, str]:
    (refused,) = planned(inputs).refusals
    return refused.reason, refused.message


def one_type(rates: dict[str, list[float]], /, *, node: int | None = None, **spec: Any) -> PlanInputs:
    """One service on GPUs of one type. `rates`: of one replica in the two buckets, by variant."""
    configurations = spec.pop("profile_configurations", [FP8])
    own = {"configurations": spec.pop("configurations", BOTH), **spec}
    types = [gpu_type("l4", 1.0, watts={"idle": 10, "peak": 72}, **({} if node is None else {"devicesPerNode": node}))]
    measured = rates_profile(rates, configurations=configurations)
    return fleet([service(**own)], [measured], types, inventory={"l4": 64}, demand=DEMAND)


def test_a_faster_precision_is_planned_where_the_service_allows_it() -> None:
    rates = {"l4": [1.0, 1.0], "l4+fp8": [2.0, 2.0]}
    chosen = variant(one_type(rates))
    assert chosen.name == "l4-fp8"
    assert chosen.configuration == Configuration.model_validate(FP8)


def test_a_precision_that_the_service_does_not_name_is_not_used_and_that_is_said() -> None:
    inputs = one_type({"l4": [1.0, 1.0], "l4+fp8": [2.0, 2.0]}, configurations=["default"])
    assert variant(inputs).name == "l4"
    assert variant(inputs).configuration is None


def test_a_service_may_be_run_in_another_precision_only() -> None:
    inputs = one_type({"l4": [9.0, 9.0], "l4+fp8": [2.0, 2.0]}, configurations=["fp8"])
    assert set(replicas(planned(inputs), "s")) == {"l4-fp8"}


def test_what_does_not_fit_in_16_bits_may_fit_in_eight() -> None:
    types = [gpu_type("l4", 1.0, memory_gib=10)]
    measured = rates_profile({"l4": [9.0, 9.0], "l4+fp8": [2.0, 2.0]}, configurations=[FP8])

    def inputs(*allowed: str) -> PlanInputs:
        one = service(configurations=list(allowed), context_length=8192)
        return fleet([one], [measured], types, inventory={"l4": 8}, demand=DEMAND)

    assert variant(inputs("default", "fp8")).name == "l4-fp8"
    reason, message = refusal(inputs("default"))
    assert reason == "ModelDoesNotFit"
    assert "the weights (10 GiB)" in message
    assert "a smaller configuration" in message


def test_stages_take_devices_cost_and_watts() -> None:
    chosen = variant(one_type({"l4-tp2-pp2": [9.0, 9.0]}, replicas={"min": 1, "max": 1}))
    assert (chosen.name, chosen.tensor_parallel, chosen.pipeline_parallel, chosen.devices) == ("l4-tp2-pp2", 2, 2, 4)
    assert (chosen.cost_per_replica_hour, chosen.watts_per_replica) == (4.0, 288.0)


def test_a_replica_larger_than_a_node_is_refused_with_path_and_value() -> None:
    reason, message = refusal(one_type({"l4-tp2-pp4": [9.0, 9.0]}, node=4))
    assert reason == "ReplicaLargerThanNode"
    assert "l4-tp2-pp4 takes 8 devices of one node, and spec.devicesPerNode of GPUType l4 is 4" in message
    assert "tensorParallel times pipelineParallel" in message


def test_beside_one_that_fits_a_node_a_larger_one_is_only_left_out_and_said() -> None:
    service_plan = only(one_type({"l4-tp8": [99.0, 99.0], "l4-tp4": [9.0, 9.0]}, node=4))
    assert set(service_plan.replicas) == {"l4-tp4"}
    assert any("l4-tp8 takes 8 devices of one node" in warning for warning in service_plan.warnings)


def test_a_service_that_names_no_configuration_of_its_profile_is_refused() -> None:
    reason, message = refusal(one_type({"l4": [1.0, 1.0]}, configurations=["fp9"]))
    assert reason == "NoConfiguration"
    assert "spec.configurations is fp9" in message
    assert "it has default, fp8" in message


def test_a_misspelt_one_beside_a_right_one_is_warned_about() -> None:
    service_plan = only(one_type({"l4": [1.0, 1.0]}, configurations=["default", "fp9"]))
    assert set(service_plan.replicas) == {"l4"}
    assert any("names fp9, which ModelProfile team/p does not have" in warning for warning in service_plan.warnings)


def test_a_service_s_own_arguments_keep_it_from_a_configuration_that_sets_the_same() -> None:
    rates = {"l4": [1.0, 1.0], "l4+fp8": [2.0, 2.0]}
    service_plan = only(one_type(rates, engine={"args": ["-q", "awq"]}))
    assert set(service_plan.replicas) == {"l4"}
    assert any("has -q, which configuration fp8" in warning for warning in service_plan.warnings)


def test_a_changed_configuration_is_another_plan() -> None:
    rates = {"l4": [1.0, 1.0], "l4+fp8": [2.0, 2.0]}
    changed = FP8 | {"maxNumSeqs": 8}
    ids = {planned(one_type(rates, profile_configurations=[one])).plan_id for one in (FP8, changed)}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configuration": None}, "configuration of team/s l4-fp8: default, allowed is one of fp8"),
        (
            {"configuration": Configuration.model_validate(FP8 | {"weightsGib": 4})},
            "one of ModelProfile team/p, as it is there",
        ),
        ({"pipeline_parallel": 2}, "variant of team/s l4-fp8"),
    ],
)
def test_the_checker_finds_engines_that_would_not_run_as_the_profile_says(
    changes: dict[str, Any], message: str
) -> None:
    inputs = one_type({"l4": [1.0, 1.0], "l4+fp8": [2.0, 2.0]}, configurations=["fp8"])
    decided = planned(inputs)
    (part,) = decided.services
    (right,) = part.variants
    wrong = part.model_copy(update={"variants": [right.model_copy(update=changes)]})
    found = violations(inputs, decided.model_copy(update={"services": [wrong]}))
    assert any(message in str(violation) for violation in found)


def test_the_checker_finds_options_that_the_service_sets_too_and_weights_of_another_model() -> None:
    other = FP8 | {"model": "org/model-fp8"}
    inputs = one_type({"l4+fp8": [2.0, 2.0]}, configurations=["fp8"], profile_configurations=[other])
    decided = planned(inputs)
    own = inputs.services[0].spec
    for update, message in (
        ({"engine": own.engine.model_copy(update={"args": ["-q", "x"]})}, "nothing that spec.engine.args sets, as -q"),
        ({"model": own.model.model_copy(update={"name": "org/tuned"})}, "the weights of org/tuned"),
    ):
        edited = inputs.services[0].model_copy(update={"spec": own.model_copy(update=update)})
        found = violations(inputs.model_copy(update={"services": [edited]}), decided)
        assert any(message in str(violation) for violation in found)


SHAPE = {
    "layers": 32,
    "hiddenSize": 4096,
    "denseParametersBillion": 7.5,
    "attentionLayers": 32,
    "keyValueHeads": 8,
    "kvValuesPerToken": 2048,
    "prefillAttentionWidth": 8192,
    "decodeAttentionWidth": 8192,
}


def test_a_precision_that_was_never_measured_is_predicted_with_its_own_bits() -> None:
    eight = FP8 | {"weightBits": 8, "weightsGib": 8.5}
    measured = profile({}, configurations=[eight], architecture=SHAPE, weightsGib=15)
    h100 = gpu_type("h100-sxm", 4.0)
    fast, slow = (variant_model(measured.configured(name), h100, 1, now=0.0) for name in ("fp8", "default"))
    assert fast is not None
    assert slow is not None
    assert float(fast.predict(512, 128, 8).tpot_ms) < 0.75 * float(slow.predict(512, 128, 8).tpot_ms)
    inputs = fleet([service(configurations=BOTH)], [measured], [h100], inventory={"h100-sxm": 8}, demand={"s": [9, 0]})
    assert variant(inputs).name == "h100-sxm-fp8"


def test_speculation_and_stages_are_never_predicted() -> None:
    guess = {"name": "ngram", "speculativeConfig": '{"method": "ngram", "num_speculative_tokens": 3}'}
    measured = profile({}, configurations=[guess], architecture=SHAPE)
    h100 = gpu_type("h100-sxm", 4.0)
    assert variant_model(measured.configured("ngram"), h100, 1, now=0.0) is None
    assert variant_model(measured.configured("default"), h100, 1, 2, now=0.0) is None
    inputs = fleet([service(configurations=["ngram"])], [measured], [h100], inventory={"h100-sxm": 8})
    reason, _ = refusal(inputs)
    assert reason == "ProfileIncomplete"


def test_beyond_its_most_sequences_nothing_is_predicted() -> None:
    measured = profile({}, configurations=[{"name": "few", "maxNumSeqs": 4}], architecture=SHAPE)
    model = variant_model(measured.configured("few"), gpu_type("h100-sxm", 4.0), 1, now=0.0)
    assert isinstance(model, AtMost)
    assert model.predict(512, 128, np.array([1, 4, 5, 64])).known.tolist() == [True, True, False, False]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=4, max_size=4), st.sampled_from([0.3, 1.1, 4.7]))
def test_a_further_configuration_never_makes_a_fleet_dearer_nor_serves_less(rates: list[float], load: float) -> None:
    measured = {"l4": rates[:2], "l4+fp8": rates[2:]}

    def solved(*allowed: str) -> tuple[float, float]:
        inputs = one_type(measured, configurations=list(allowed))
        inputs = inputs.model_copy(update={"demand": {"team/s": Demand(rps=[load, load])}})
        decided = planned(inputs)
        unserved = 2 * load if decided.refusals else decided.services[0].unserved_rps
        return round(unserved, 4), round(decided.cost_per_hour, 6)

    assert solved("default", "fp8") <= solved("default")
    assert solved("default", "fp8") <= solved("fp8")
