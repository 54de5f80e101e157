"""Bad input: which services are refused, with which words, and which are only warned about."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llmfleet.api import GPUType, LLMService, ModelProfile, Refusal, ServicePlan
from llmfleet.placement import Demand, PlanInputs, explain, plan
from placement_testing.fleets import corners, fleet, gpu_type, point, profile, rates_profile, replicas, service

TYPES = [gpu_type("l4", 1.0), gpu_type("h100", 4.0)]
PROFILE = rates_profile({"l4": [4, 1], "h100": [16, 8]})
AMPLE = {"l4": 10, "h100": 10}


def refusal_of(
    asked: LLMService,
    *profiles: ModelProfile,
    types: list[GPUType] = TYPES,
    inventory: dict[str, int] = AMPLE,
    demand: dict[str, list[float]] | None = None,
) -> Refusal:
    decided, _ = plan(fleet([asked], profiles, types, inventory=inventory, demand=demand), None)
    assert decided.services == []
    (refusal,) = decided.refusals
    assert refusal.key == asked.key
    return refusal


def planned(
    asked: LLMService,
    *profiles: ModelProfile,
    types: list[GPUType] = TYPES,
    inventory: dict[str, int] = AMPLE,
    demand: dict[str, list[float]] | None = None,
) -> ServicePlan:
    decided, _ = plan(fleet([asked], profiles, types, inventory=inventory, demand=demand), None)
    assert decided.refusals == []
    return decided.services[0]


def test_a_missing_profile_is_named_with_those_that_exist() -> None:
    refusal = refusal_of(service(profile="nope"), PROFILE, rates_profile({"l4": [1, 1]}, name="q"))
    assert refusal.reason == "ProfileNotFound"
    assert "spec.profile is 'nope'" in refusal.message
    assert "p, q" in refusal.message


def test_a_profile_of_another_namespace_does_not_count() -> None:
    elsewhere = PROFILE.model_copy(update={"metadata": PROFILE.metadata.model_copy(update={"namespace": "other"})})
    assert refusal_of(service(), elsewhere).reason == "ProfileNotFound"


def test_only_unknown_types_are_refused_and_one_unknown_type_among_known_ones_is_a_warning() -> None:
    refusal = refusal_of(service(gpuTypes=["l40"]), PROFILE)
    assert refusal.reason == "UnknownGPUType"
    assert "spec.gpuTypes is l40" in refusal.message
    assert "h100, l4" in refusal.message
    kept = planned(service(gpuTypes=["l40", "l4"]), PROFILE, demand={"s": [1, 0]})
    assert kept.replicas == {"l4": 1}
    assert any("l40" in warning for warning in kept.warnings)


def test_a_profile_that_measured_only_unknown_types_is_refused() -> None:
    refusal = refusal_of(service(), rates_profile({"tpu": [1, 1]}))
    assert refusal.reason == "UnknownGPUType"
    assert "ModelProfile team/p" in refusal.message
    assert "tpu" in refusal.message


def test_a_profile_without_a_measurement_on_any_allowed_type_is_incomplete() -> None:
    refusal = refusal_of(service(gpuTypes=["l4"]), rates_profile({"h100": [1, 1]}))
    assert refusal.reason == "ProfileIncomplete"
    assert "covers h100" in refusal.message
    assert "may only use l4" in refusal.message


def test_a_model_that_fits_nowhere_is_refused_with_the_context_that_would_fit() -> None:
    small = [gpu_type("l4", 1.0, memory_gib=14), gpu_type("h100", 1.0, memory_gib=13)]
    # 10 GiB weights + 64 KiB x 65536 = 4 GiB + 1 GiB overhead = 15 GiB; 12.6 GiB usable leave 1.6 GiB of KV.
    refusal = refusal_of(service(context_length=65536), PROFILE, types=small)
    assert refusal.reason == "ModelDoesNotFit"
    assert "15.0 GiB on each of 1 x l4, which has 12.6 GiB usable" in refusal.message
    longest = int(refusal.message.split("contextLength of at most ")[1].split(",")[0])
    assert longest == pytest.approx(1.6 * 2**20 / 64, abs=1)
    assert planned(service(context_length=longest), PROFILE, types=small)
    assert refusal_of(service(context_length=longest + 1), PROFILE, types=small).reason == "ModelDoesNotFit"


def test_a_bucket_that_no_variant_measured_is_refused_even_without_demand() -> None:
    holes = profile({"l4": [point((512, 128), 1.0)], "h100": [point((512, 128), 1.0)]})
    refusal = refusal_of(service(), holes)
    assert refusal.reason == "ProfileIncomplete"
    assert "h100, l4 have no point at input 4096 output 128" in refusal.message


def test_a_hole_of_one_variant_keeps_only_that_variant_out_of_the_bucket() -> None:
    holes = profile({"l4": [point((512, 128), 4.0)], "h100": [point(c, 16.0) for c in corners((512, 4096), (128,))]})
    kept = planned(service(), holes, demand={"s": [1, 1]})
    assert {r.variant for r in kept.routes if r.bucket == 1} == {"h100"}
    assert any("no point of l4 at input 4096 output 128" in warning for warning in kept.warnings)


def test_a_bucket_beyond_the_context_needs_no_measurement() -> None:
    holes = profile({"l4": [point((512, 128), 4.0)]})
    assert planned(service(context_length=513), holes)
    assert refusal_of(service(context_length=514), holes).reason == "ProfileIncomplete"


def test_an_objective_that_nothing_meets_is_refused_with_one_that_would_be_met() -> None:
    expected = {"mode": "expected", "requestsPerSecond": 1, "sizes": [{"inputTokens": 4000, "outputTokens": 100}]}
    slow = profile(
        {
            "l4": [point(c, 1.0, ttft_ms=1500, tpot_ms=70) for c in corners((512, 4096), (128,))],
            "h100": [point(c, 1.0, ttft_ms=900, tpot_ms=60) for c in corners((512, 4096), (128,))],
        }
    )
    refusal = refusal_of(service(traffic=expected), slow)
    assert refusal.reason == "ObjectiveUnreachable"
    assert "TTFT p95 <= 1000 ms and TPOT p95 <= 50 ms" in refusal.message
    assert "input 4096 output 128" in refusal.message
    assert "h100 with TTFT 918.1 ms and TPOT 61.21 ms" in refusal.message
    assert "ttft.milliseconds >= 1000 with tpot.milliseconds >= 61.21" in refusal.message
    reachable = {"ttft": {"milliseconds": 1000}, "tpot": {"milliseconds": 61.21}}
    assert planned(service(traffic=expected, objective=reachable), slow).replicas == {"h100": 1}


def test_one_unreachable_bucket_refuses_what_the_user_expects_but_not_what_was_observed() -> None:
    half = rates_profile({"l4": [4, 0]})
    sizes = [{"inputTokens": 100, "outputTokens": 10}, {"inputTokens": 4000, "outputTokens": 10}]
    traffic = {"mode": "expected", "requestsPerSecond": 2, "sizes": sizes}
    assert refusal_of(service(traffic=traffic), half).reason == "ObjectiveUnreachable"
    kept = planned(service(), half, demand={"s": [3, 0.5]})
    assert kept.replicas == {"l4": 1}
    assert kept.unserved_rps == 0.5
    assert kept.shortfall is not None
    assert "0.5 requests per second are of sizes that no variant serves" in kept.shortfall
    assert {route.bucket for route in kept.routes} == {0}
    assert refusal_of(service(), half, demand={"s": [0, 0.5]}).reason == "ObjectiveUnreachable"


def test_an_objective_that_nothing_meets_is_refused_without_demand_too() -> None:
    assert refusal_of(service(), rates_profile({"l4": [0, 0]})).reason == "ObjectiveUnreachable"


def test_no_device_at_all_is_refused_with_what_there_is() -> None:
    limited = [gpu_type("l4", 1.0, limit=5), gpu_type("h100", 4.0)]
    refusal = refusal_of(service(), PROFILE, types=limited, inventory={"l4": 0})
    assert refusal.reason == "NoInventory"
    assert "GPUType l4, of which the cluster has 0 and the limit is 5" in refusal.message
    assert "GPUType h100, of which the cluster has 0" in refusal.message


def test_a_limit_of_zero_takes_the_replicas_away_and_says_so() -> None:
    """A refusal would leave the plan in force, and with it the engines that the limit is to take away."""
    limited = [gpu_type("l4", 1.0, limit=0), gpu_type("h100", 4.0)]
    for rate, words in ((3.0, "short of 3 of 3 requests per second"), (0.0, "the cluster has 7 and the limit is 0")):
        none = planned(service(), PROFILE, types=limited, inventory={"l4": 7}, demand={"s": [rate, 0]})
        assert none.replicas == {}
        assert none.shortfall is not None
        assert words in none.shortfall


def test_fewer_devices_than_one_replica_takes_are_no_inventory() -> None:
    pair = rates_profile({"l4-tp2": [4, 1]})
    assert refusal_of(service(), pair, inventory={"l4": 1}).reason == "NoInventory"
    assert planned(service(), pair, inventory={"l4": 2}, demand={"s": [1, 0]}).replicas == {"l4-tp2": 1}


def test_what_hardware_cannot_do_is_a_warning_of_the_service() -> None:
    figures = {"memoryBandwidthGbPerSecond": 300, "denseTflops": 121}
    warned = planned(service(), PROFILE, types=[gpu_type("l4", 1.0, hardware=figures), TYPES[1]])
    assert any("l4 cannot do" in warning and "tpotMs.p50 of 20 ms" in warning for warning in warned.warnings)


def test_expected_sizes_outside_context_or_buckets_are_warned_about() -> None:
    sizes = [{"inputTokens": 5000, "outputTokens": 10}, {"inputTokens": 8000, "outputTokens": 500}]
    traffic = {"mode": "expected", "requestsPerSecond": 1, "sizes": sizes}
    warnings = planned(service(traffic=traffic), PROFILE).warnings
    assert any("5000 input and 10 output tokens lie above the last bucket (4096, 128)" in w for w in warnings)
    assert any("8000 + 500 tokens exceed spec.model.contextLength 8192" in w for w in warnings)


def test_a_profile_of_another_model_is_warned_about() -> None:
    other = rates_profile({"l4": [4, 1]}, model="org/other")
    assert any("measured org/other" in warning for warning in planned(service(), other).warnings)


def test_a_rate_without_sizes_cannot_be_planned_and_says_so() -> None:
    kept = planned(service(traffic={"requestsPerSecond": 3}), PROFILE)
    assert kept.demand_rps == 0
    assert any("spec.traffic.sizes is absent" in warning for warning in kept.warnings)


def test_a_caller_that_mixes_up_its_inputs_gets_an_error_that_names_them() -> None:
    with pytest.raises(ValidationError, match=r"demand\['team/s'\].rps: 3 values, but ModelProfile p has 2 buckets"):
        fleet([service()], [PROFILE], TYPES, inventory={}, demand={"s": [1, 1, 1]})
    with pytest.raises(ValidationError, match="services: given more than once: team/s"):
        fleet([service(), service()], [PROFILE], TYPES, inventory={})
    with pytest.raises(ValidationError, match="finite"):
        Demand(rps=[float("nan")])
    nowhere = service().model_copy(update={"metadata": service().metadata.model_copy(update={"namespace": None})})
    with pytest.raises(ValidationError, match=r"services: 's' has no metadata.namespace"):
        PlanInputs(services=[nowhere])


def test_refused_and_planned_services_stand_side_by_side() -> None:
    decided, _ = plan(
        fleet(
            [service("good"), service("bad", profile="nope")],
            [PROFILE],
            TYPES,
            inventory=AMPLE,
            demand={"good": [4, 0]},
        ),
        None,
    )
    assert replicas(decided, "good") == {"l4": 1}
    assert [refusal.key for refusal in decided.refusals] == ["team/bad"]


def test_the_engines_of_a_refused_service_keep_their_devices() -> None:
    """A refusal takes no engine away, so what it holds is not free for others: they would wait for it for ever."""
    both = rates_profile({"l4": [4, 1], "h100": [4, 1]})
    services = [service("a"), service("b", profile="q")]
    profiles = [both, rates_profile({"l4": [4, 1], "h100": [4, 1]}, name="q")]
    sound = fleet(services, profiles, TYPES, inventory={"l4": 4, "h100": 4}, demand={"a": [12, 0], "b": [4, 0]})
    before, _ = plan(sound, None)
    assert (replicas(before, "a"), replicas(before, "b")) == ({"l4": 3}, {"l4": 1})

    now = {"a": [12, 0], "b": [8, 0]}
    broken = fleet(services, profiles[1:], TYPES, inventory={"l4": 4, "h100": 4}, demand=now)
    decided = before
    for _ in range(2):
        decided, _ = plan(broken, decided)
        assert [refusal.key for refusal in decided.refusals] == ["team/a"]
        assert replicas(decided, "b") == {"l4": 1, "h100": 1}
        assert decided.cost_per_hour == 5.0
        because = {said.name: said.message for said in explain(decided, broken, "team/b").rejected}
        assert because == {}
    mended, _ = plan(fleet(services, profiles, TYPES, inventory={"l4": 4, "h100": 4}, demand=now), decided)
    assert mended.kept == []
    assert replicas(mended, "a") in ({"l4": 3}, {"l4": 2, "h100": 1})


def test_a_service_that_does_not_parse_any_more_keeps_its_devices_as_a_refused_one_does() -> None:
    profiles = [rates_profile({"l4": [4, 1], "h100": [4, 1]})]
    inventory, demand = {"l4": 4, "h100": 4}, {"a": [12, 0], "b": [8, 0]}
    before, _ = plan(fleet([service("a")], profiles, TYPES, inventory=inventory, demand=demand), None)
    assert replicas(before, "a") == {"l4": 3}

    without = fleet([service("b")], profiles, TYPES, inventory=inventory, demand=demand)
    unreadable = without.model_copy(update={"unreadable": ["team/a", "team/never-planned"]})
    decided = before
    for _ in range(2):
        decided, _ = plan(unreadable, decided)
        assert [kept.key for kept in decided.kept] == ["team/a"]
        assert replicas(decided, "b") == {"l4": 1, "h100": 1}
    freed, _ = plan(without, decided)
    assert (freed.kept, replicas(freed, "b")) == ([], {"l4": 2})
