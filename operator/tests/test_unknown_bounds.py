"""What nobody understands opens nothing: no device, no watt, no plan more than before."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from e2e.operator.objects import gpu_type, policy
from llmfleet.api import Buckets, LatencyCoefficients, PlannedVariant, ServicePlan
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.invalid import InvalidObject, bounds_of_unknown, claims_of_unknown
from llmfleet.operator.inventory import Inventory, observe_inventory
from llmfleet.operator.parse import EPOCH

Json = dict[str, Any]
LATENCY = LatencyCoefficients(ttft_base_ms=1, ttft_ms_per_input_token=0, tpot_base_ms=1, tpot_ms_per_running=0)
TYPES = ("l4", "h100", "a100")


def broken_domain(name: str = "rack", gpu_types: Any = None, **more: Any) -> InvalidObject:
    spec = {} if gpu_types is None else {"gpuTypes": gpu_types}
    return InvalidObject("PowerDomain", None, name, "u", 1, "budgetWatts: -1", spec=spec, **more)


def plan(service: str, **replicas: int) -> ServicePlan:
    variants = [
        PlannedVariant(
            name=name,
            gpu_type=name,
            tensor_parallel=2,
            pipeline_parallel=1,
            replicas=count,
            devices=2,
            cost_per_replica_hour=1.0,
            latency=LATENCY,
        )
        for name, count in replicas.items()
    ]
    return ServicePlan(
        namespace="team",
        service=service,
        buckets=Buckets(input_tokens=[1], output_tokens=[1]),
        variants=variants,
        routes=[],
        demand=[0.0],
        unserved_rps=0.0,
        cost_per_hour=0.0,
    )


def test_the_types_of_a_power_domain_that_never_parsed_get_no_device_beyond_the_plans_in_force() -> None:
    bounds = bounds_of_unknown(
        [broken_domain(gpu_types=["l4", "moon"])], TYPES, [plan("a", l4=2), plan("b", l4=1, h100=4)]
    )
    assert bounds == {"l4": (6, "PowerDomain rack does not parse, and no version of it that did is known")}


def test_where_the_types_cannot_be_read_either_it_is_every_type() -> None:
    for unreadable in (None, "l4", [], [1]):
        bounds = bounds_of_unknown([broken_domain(gpu_types=unreadable)], TYPES, [plan("b", h100=4)])
        assert {name: most for name, (most, _) in bounds.items()} == {"l4": 0, "h100": 8, "a100": 0}


def test_a_domain_with_a_version_in_force_or_on_its_way_out_closes_nothing() -> None:
    cache = Cache()
    for version, watts in ((1, 4000), (2, -1)):
        meta = {"name": "rack", "uid": "u", "generation": version, "resourceVersion": str(version)}
        spec = {"gpuTypes": ["l4"], "budgetWatts": watts}
        cache.apply(observe("PowerDomain", {"kind": "PowerDomain", "metadata": meta, "spec": spec}))
    invalid = [*cache.invalid.values(), broken_domain("leaving", ["h100"], deleting=True)]
    assert bounds_of_unknown(invalid, TYPES, []) == {}


def node(name: str, **labels: str) -> Json:
    ready = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"example.com/gpu": "8"}}
    return {"metadata": {"name": name, "uid": name, "resourceVersion": "1", "labels": labels}, "status": ready}


def inventory(cache: Cache, *plans: ServicePlan) -> Inventory:
    return observe_inventory(
        cache.gpu_types,
        cache.nodes.values(),
        (),
        (),
        cache.policy,
        EPOCH,
        claims=claims_of_unknown(cache.invalid.values()),
        bounds=bounds_of_unknown(cache.invalid.values(), cache.gpu_types, plans),
    )


def put(cache: Cache, obj: Json, version: int = 1) -> None:
    meta = {**obj["metadata"], "uid": obj["metadata"]["name"], "resourceVersion": str(version), "generation": version}
    cache.apply(observe(obj.get("kind", "Node"), {**obj, "metadata": meta}))


def test_the_devices_of_a_type_that_never_parsed_are_not_counted_for_a_broader_type() -> None:
    cache = Cache()
    put(cache, node("plain"))
    put(cache, node("fast", tier="fast"))
    put(cache, gpu_type("broad", "example.com/gpu", 1.0))
    assert inventory(cache).devices == {"broad": 16}
    narrow = gpu_type("narrow", "example.com/gpu", -1.0)
    narrow["spec"]["nodeSelector"] = {"tier": "fast"}
    put(cache, narrow)
    assert inventory(cache).devices == {"broad": 8}
    narrow["spec"]["pricePerHour"]["onDemand"] = 1.0
    put(cache, narrow, version=2)
    assert inventory(cache).devices == {"broad": 8, "narrow": 8}


def test_the_type_says_why_it_gets_no_more_and_what_it_gives_up_does_not_come_back() -> None:
    cache = Cache()
    put(cache, node("plain"))
    put(cache, gpu_type("l4", "example.com/gpu", 1.0))
    domain = {"kind": "PowerDomain", "metadata": {"name": "rack"}, "spec": {"gpuTypes": ["l4"], "budgetWatts": -1}}
    put(cache, domain)
    held = inventory(cache, plan("a", l4=2))
    assert held.devices == {"l4": 4}
    assert held.statuses["l4"].available_devices == 4
    (available,) = held.statuses["l4"].conditions
    assert (available.status, available.reason) == ("False", "LimitUnknown")
    assert "PowerDomain rack does not parse" in available.message
    assert inventory(cache, plan("a", l4=1)).devices == {"l4": 2}
    domain["spec"] = {"gpuTypes": ["l4"], "budgetWatts": 4000}
    put(cache, domain, version=2)
    assert inventory(cache, plan("a", l4=1)).devices == {"l4": 8}


def test_a_policy_that_never_parsed_lets_nothing_be_applied() -> None:
    cache = Cache()
    put(cache, policy(budgetPerHour=-5))
    assert cache.policy.mode == "shadow"
    put(cache, policy(budgetPerHour=5), version=2)
    assert (cache.policy.mode, cache.policy.budget_per_hour) == ("apply", 5)
    put(cache, policy(budgetPerHour=-5), version=3)
    assert (cache.policy.mode, cache.policy.budget_per_hour) == ("apply", 5)


names = st.sampled_from([*TYPES, "moon"])
plans = st.lists(st.dictionaries(st.sampled_from(TYPES), st.integers(0, 5)), max_size=4)


@given(st.lists(st.one_of(st.none(), st.lists(names, min_size=1)), max_size=3), plans)
def test_every_type_that_an_unknown_domain_may_bound_is_bounded_by_what_runs_and_no_other(
    domains: list[list[str] | None], running: list[dict[str, int]]
) -> None:
    in_force = [plan(f"s{number}", **replicas) for number, replicas in enumerate(running)]
    invalid = [broken_domain(f"d{number}", listed) for number, listed in enumerate(domains)]
    bounds = bounds_of_unknown(invalid, TYPES, in_force)
    assert set(bounds) == {name for name in TYPES if any(listed is None or name in listed for listed in domains)}
    for name, (most, _) in bounds.items():
        assert most == sum(2 * replicas.get(name, 0) for replicas in running)
