"""`llmfleet plan`: the operator's own solve, on objects and inventory from files, without a cluster."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from llmfleet.api import FleetPolicySpec, Plan
from llmfleet.cli.devices import Devices, devices
from llmfleet.cli.manifests import Manifests
from llmfleet.cli.refused import RefusedError
from llmfleet.placement import PlanInputs, plan


def plan_files(manifests: Manifests, inventory: str | None, previous: Plan | None) -> tuple[Plan, Devices]:
    """Plans what the files hold; also says with how many devices. Raises RefusedError."""
    inputs, counted = inputs_of(manifests, inventory)
    decided, _ = plan(inputs, previous)
    return decided, counted


def inputs_of(manifests: Manifests, inventory: str | None) -> tuple[PlanInputs, Devices]:
    """Everything that the solve depends on. Raises RefusedError where there is nothing to plan."""
    if not manifests.services:
        raise RefusedError("the files hold no LLMService: there is nothing to plan")
    counted = devices(manifests, inventory, datetime.now(UTC))
    inputs = PlanInputs(
        services=manifests.services,
        profiles=manifests.profiles,
        gpu_types=manifests.gpu_types,
        inventory=dict(counted.count),
        policy=manifests.policy.spec if manifests.policy is not None else FleetPolicySpec(),
    )
    return inputs, counted


def read_plan(path: Path) -> Plan:
    """A plan as `-o json` wrote it. Raises RefusedError."""
    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"), extra="forbid")
    except OSError as error:
        raise RefusedError(f"--previous {path}: cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else "not UTF-8 text"
        raise RefusedError(f"--previous {path}: not a plan as `llmfleet plan -o json` writes it: {reason}") from error
