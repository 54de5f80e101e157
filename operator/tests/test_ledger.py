"""The ledger gives the sums that the fleet-wide functions give, and promises no room twice."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Buckets, GPUTypeStatus, LatencyCoefficients, PlannedVariant, ServicePlan
from llmfleet.operator.cache import Cache, Observation
from llmfleet.operator.inventory import free_devices, wanted_devices
from llmfleet.operator.ledger import DeviceLedger
from llmfleet.operator.model import ObservedDeployment, ObservedPod

TYPES = ("l4", "h100")
SERVICES = ("a", "b", "c")


def deployment(service: str, kind: str, replicas: int, tensor_parallel: int = 1) -> ObservedDeployment:
    name = f"{service}-{kind}"
    return ObservedDeployment(
        namespace="ns",
        name=name,
        uid=name,
        service=service,
        variant=kind,
        gpu_type=kind,
        tensor_parallel=tensor_parallel,
        replicas=replicas,
        template={},
        input_hash="h",
    )


def pod(service: str, kind: str, number: int) -> ObservedPod:
    name = f"{service}-{kind}-{number}"
    return ObservedPod(
        namespace="ns",
        name=name,
        uid=name,
        service=service,
        variant=kind,
        gpu_type=kind,
        template_hash="h",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        scheduled=True,
        ready=True,
        phase="Running",
        devices=1,
    )


def plan(service: str, replicas: dict[str, int]) -> ServicePlan:
    latency = LatencyCoefficients(ttft_base_ms=1, ttft_ms_per_input_token=0, tpot_base_ms=1, tpot_ms_per_running=0)
    variants = [
        PlannedVariant(
            name=kind, gpu_type=kind, tensor_parallel=1, replicas=count, cost_per_replica_hour=1, latency=latency
        )
        for kind, count in replicas.items()
    ]
    return ServicePlan(
        namespace="ns",
        service=service,
        buckets=Buckets(input_tokens=[1], output_tokens=[1]),
        variants=variants,
        routes=[],
        demand=[1.0],
        unserved_rps=0,
        cost_per_hour=1,
    )


def statuses(available: int) -> dict[str, GPUTypeStatus]:
    return dict.fromkeys(TYPES, GPUTypeStatus(available_devices=available))


steps = st.lists(
    st.tuples(
        st.sampled_from(["deployment", "pods", "plan", "available"]),
        st.sampled_from(SERVICES),
        st.sampled_from(TYPES),
        st.integers(0, 6),
    ),
    max_size=20,
)


@given(steps)
def test_sums_kept_by_service_are_those_over_the_whole_fleet(steps: list[tuple[str, str, str, int]]) -> None:
    cache, plans, available = Cache(), dict[str, ServicePlan](), 8
    ledger = DeviceLedger(cache)
    ledger.set_statuses(statuses(available))
    for version, (what, service, kind, number) in enumerate(steps, start=1):
        key = f"ns/{service}"
        if what == "available":
            available = number
            ledger.set_statuses(statuses(available))
        elif what == "plan":
            plans[key] = plan(service, {kind: number})
            ledger.set_plans(plans, [key])
        elif what == "deployment":
            value = deployment(service, kind, number)
            cache.apply(Observation("Deployment", f"ns/{value.name}", value.uid, version, value))
            ledger.mark(key)
        else:
            for index in range(6):
                engine = pod(service, kind, index)
                uid = f"{engine.uid}-{version}"
                if index < number:
                    cache.apply(Observation("Pod", f"ns/{engine.name}", uid, version, engine))
                elif engine.name in cache.pods.get(key, {}):
                    cache.apply(Observation("Pod", f"ns/{engine.name}", uid, version, None))
            ledger.mark(key)

        deployments = [one for group in cache.deployments.values() for one in group.values()]
        pods = [one for group in cache.pods.values() for one in group.values()]
        free = free_devices(statuses(available), deployments, pods)
        assert ledger.free() == free
        assert ledger.wanted() == wanted_devices(plans.values(), deployments, free)


def test_room_that_one_service_was_promised_is_not_there_for_the_next_before_anything_is_written() -> None:
    ledger = DeviceLedger(Cache())
    ledger.set_statuses(statuses(4))
    ledger.hold("ns/a", [deployment("a", "l4", 3)])
    assert ledger.free() == {"l4": 1, "h100": 4}
    ledger.release("ns/a")
    assert ledger.free() == {"l4": 4, "h100": 4}


def test_a_service_waits_for_room_while_its_plan_asks_for_more_than_it_has() -> None:
    cache = Cache()
    ledger = DeviceLedger(cache)
    ledger.set_statuses(statuses(4))
    ledger.set_plans({"ns/a": plan("a", {"l4": 2}), "ns/b": plan("b", {"l4": 1})}, ["ns/a", "ns/b"])
    for name, replicas in (("a", 1), ("b", 1)):
        value = deployment(name, "l4", replicas)
        cache.apply(Observation("Deployment", f"ns/{value.name}", value.uid, 1, value))
        ledger.mark(f"ns/{name}")
    assert ledger.waiting() == ["ns/a"]


def test_engines_that_were_there_before_their_gpu_type_count_when_it_comes() -> None:
    cache = Cache()
    ledger = DeviceLedger(cache)
    value: Any = deployment("a", "l4", 3)
    cache.apply(Observation("Deployment", "ns/a-l4", "u", 1, value))
    ledger.mark("ns/a")
    assert ledger.free() == {}
    ledger.set_statuses(statuses(4))
    assert ledger.free() == {"l4": 1, "h100": 4}
