"""From what files hold to what a solve depends on, and to a plan that was checked."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from llmfleet.api import FleetPolicySpec, Plan
from llmfleet.cli.devices import Devices, devices
from llmfleet.cli.manifests import Manifests
from llmfleet.cli.refused import RefusedError
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.conflicts import with_conflicts


def inputs_of(
    manifests: Manifests, inventory: str | None, *, time_limit_s: float | None = None, gap: float | None = None
) -> tuple[PlanInputs, Devices]:
    """Everything that the solve depends on, and where the number of devices comes from.

    `time_limit_s` and `gap` win over the FleetPolicy. Raises RefusedError where there is nothing to plan, one of them
    is not what the policy would accept, or `inventory` (the value of `--inventory`) is no inventory.
    """
    if not manifests.services:
        raise RefusedError("the files hold no LLMService: there is nothing to plan")
    counted = devices(manifests, inventory, datetime.now(UTC))
    inputs = PlanInputs(
        services=manifests.services,
        profiles=manifests.profiles,
        gpu_types=manifests.gpu_types,
        power_domains=manifests.power_domains,
        inventory=dict(counted.count),
        policy=_policy(manifests, time_limit_s, gap),
        can_hand_over=True,
    )
    return inputs, counted


def _policy(manifests: Manifests, time_limit_s: float | None, gap: float | None) -> FleetPolicySpec:
    policy = manifests.policy.spec if manifests.policy is not None else FleetPolicySpec()
    for option, field, value in (
        ("--time-limit", "solve_time_limit_seconds", time_limit_s),
        ("--gap", "optimality_gap", gap),
    ):
        if value is not None:
            try:
                policy = FleetPolicySpec.model_validate({**dict(policy), field: value})
            except ValidationError as error:
                reason = error.errors(include_url=False)[0]["msg"]
                raise RefusedError(f"{option} {value:g}: {reason[0].lower()}{reason[1:]}") from error
    return policy


def solved(inputs: PlanInputs, previous: Plan | None) -> Plan:
    """The plan. Raises RefusedError where it breaks a constraint of its own inputs, which no input should achieve."""
    decided, _ = plan(inputs, previous)
    broken = violations(inputs, decided, previous)
    if broken:
        raise RefusedError(
            f"the plan breaks {len(broken)} of its own constraints, so it is not shown; this is a bug of llmfleet, "
            f"please report it with these files: {broken[0]}"
        )
    return with_conflicts(inputs, decided)


def read_plan(path: Path | None) -> Plan | None:
    """A plan as `-o json` wrote it; None without a path. Raises RefusedError."""
    if path is None:
        return None
    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"), extra="forbid")
    except OSError as error:
        raise RefusedError(f"--previous {path}: cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else "not UTF-8 text"
        raise RefusedError(f"--previous {path}: not a plan as `llmfleet plan -o json` writes it: {reason}") from error
