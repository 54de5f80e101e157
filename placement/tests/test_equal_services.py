"""Services with equal numbers in one scarce fleet: each is solved by a program of its own, on threads of their own."""

from __future__ import annotations

from llmfleet.placement import plan, violations
from placement_testing.fleets import fleet, gpu_type, rates_profile, service


def test_equal_services_are_solved_side_by_side() -> None:
    names = [f"s{number:02}" for number in range(12)]
    inputs = fleet(
        [*(service(name, priority=900) for name in names), service("last")],
        [rates_profile({"l4": [4, 0]})],
        [gpu_type("l4", 1.0)],
        inventory={"l4": 12},
        demand={"last": [4, 0], **{name: [1, 1] for name in names}},
    )
    for _ in range(5):
        decided, _ = plan(inputs, None)
        assert violations(inputs, decided) == []
        assert {one.service: one.replicas for one in decided.services} == {
            "last": {},
            **{name: {"l4": 1} for name in names},
        }
