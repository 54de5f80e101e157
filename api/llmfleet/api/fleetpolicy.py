"""FleetPolicy: how the whole fleet is planned and rolled. One object, named `default`; absent means all defaults."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from llmfleet.api.meta import ApiModel, Conditions, Name, PrinterColumn, Resource, Rule, UniqueBy, cel

POLICY_NAME = "default"
HELD_BACK = "maxStartsPerPlan of FleetPolicy default"
"""Named among what binds a service's plan that is a step on the way to a better one."""


class NamespaceLimit(ApiModel):
    """The most that all services of a namespace may take together."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Rule(
                "has(self.costPerHour) || has(self.devices)",
                "costPerHour, devices or both are required",
                got=("namespace %s with neither", "self.namespace"),
            )
        )
    )

    namespace: Name
    """The namespace; one that does not exist limits nobody."""
    cost_per_hour: float | None = Field(default=None, ge=0, le=1e9)
    """Most that the planned replicas of its services may cost per hour, in the currency of the GPUTypes' prices; idle
    devices of nodes billed whole are no namespace's own. Absent: no limit."""
    devices: dict[str, Annotated[int, Field(ge=0, le=1_000_000)]] | None = Field(
        default=None, min_length=1, max_length=64
    )
    """Most devices that they may use, by GPUType name; a type that is not named is not limited."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.cost_per_hour is None and self.devices is None:
            raise ValueError(f"costPerHour, devices or both are required, got namespace {self.namespace} with neither")
        return self


class FleetPolicySpec(ApiModel):
    """Knobs of planning and rollout, with defaults that hold for most clusters."""

    mode: Literal["apply", "shadow"] = "apply"
    """`apply`: plans are carried out. `shadow`: they are computed and shown in each service's condition `Shadow`, and
    what was in force before stays in force; a service that had no plan gets none."""
    utilization_target: float = Field(default=0.9, ge=0.01, le=1)
    """Share of the load at which replicas just keep the objective that new plans give them; bursts and small pools are
    reckoned with in that load. A plan in force stays while its own share is between the square of this and 1, so that
    a load that wavers moves nothing."""
    replan_interval_seconds: float = Field(default=30, ge=1, le=3600)
    """Longest time between two solves while nothing changes, in seconds."""
    debounce_seconds: float = Field(default=0.2, ge=0, le=60)
    """How long changes are collected before a solve, in seconds."""
    solve_time_limit_seconds: float = Field(default=20, ge=0.1, le=600)
    """Time after which a solve is ended; the last good plan then stays in force."""
    optimality_gap: float = Field(default=0.01, ge=0, le=0.5)
    """Relative gap to the proven bound at which a solve may stop, and up to which fewer variants are preferred."""
    switching_cost_fraction: float = Field(default=0.02, ge=0, le=1)
    """Price of adding or removing one replica, as a share of its cost per hour. Keeps a stable load on a stable
    plan: a change must save more than this."""
    budget_per_hour: float | None = Field(default=None, gt=0, le=1e9)
    """Most that all planned replicas together may cost per hour, in the currency of the GPUTypes' prices. Services go
    short by priority, lowest first. Absent: no limit."""
    max_starts_per_plan: int | None = Field(default=None, ge=1, le=10_000)
    """Most replicas of one variant that one plan starts in place of others of the same service: what would replace
    more is reached in steps, one in each `replanIntervalSeconds`. It yields where demand would go unserved otherwise,
    or where a step does not fit beside the other limits. Absent: no limit."""
    namespace_limits: Annotated[list[NamespaceLimit], UniqueBy("namespace")] = Field(
        default_factory=list, max_length=256
    )
    """What the services of a namespace may take, beside all else that limits them. Within a namespace services go short
    by priority, lowest first. Engines of services that cannot be planned count."""
    demand_window_seconds: float = Field(default=60, ge=1, le=3600)
    """Window over which the gateways' request counts become a rate, in seconds."""
    pending_deadline_seconds: int = Field(default=120, ge=1, le=86_400)
    """How long an engine pod may stay Pending before its capacity counts as unavailable, in seconds."""
    unavailable_seconds: int = Field(default=600, ge=1, le=86_400)
    """How long such capacity stays unavailable before it is tried again, in seconds."""
    max_unavailable_engines: int = Field(default=1, ge=1, le=1000)
    """Engines per service that a template change may replace at once where there is no room for a surge."""


class FleetPolicyStatus(ApiModel):
    """Whether the policy is in force."""

    conditions: Conditions
    """Accepted: the spec parses and is in force. While it does not and no version that did is known, it counts as
    `mode: shadow` with all defaults; so does every `mode` of such a spec that is not `apply`."""
    last_accepted: str | None = None
    """The last version that parsed, as JSON: it counts while a later one does not."""


class FleetPolicy(Resource):
    """How the whole fleet is planned and rolled; one object named `default`."""

    KIND: ClassVar[str] = "FleetPolicy"
    PLURAL: ClassVar[str] = "fleetpolicies"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("fleetp",)
    NAMESPACED: ClassVar[bool] = False
    PRINTER_COLUMNS: ClassVar[tuple[PrinterColumn, ...]] = (
        PrinterColumn(name="Mode", type="string", json_path=".spec.mode"),
        PrinterColumn(name="Utilization", type="number", json_path=".spec.utilizationTarget"),
        PrinterColumn(name="Accepted", type="string", json_path='.status.conditions[?(@.type=="Accepted")].status'),
        PrinterColumn(name="Age", type="date", json_path=".metadata.creationTimestamp"),
    )
    NAME_RULE: ClassVar[tuple[str, str] | None] = (
        f"^{POLICY_NAME}$",
        f"metadata.name of the FleetPolicy must be {POLICY_NAME}: there is one per cluster",
    )

    spec: FleetPolicySpec = Field(default_factory=FleetPolicySpec)
    status: FleetPolicyStatus = Field(default_factory=FleetPolicyStatus)
