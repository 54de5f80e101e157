"""PowerDomain: GPU types whose devices draw from one supply, and what that supply gives.

Written by the platform team. Nodes are not named here: the plan decides how many devices of a type run, not on which
of its nodes. Where racks have supplies of their own, each rack's nodes are a GPUType of their own, by `nodeSelector`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from llmfleet.api.meta import ApiModel, Conditions, Name, PrinterColumn, Resource, UniqueBy


class PowerDomainSpec(ApiModel):
    """Which devices, and how much power."""

    gpu_types: Annotated[list[Name], UniqueBy(), Field(min_length=1, max_length=64)]
    """Names of the GPUTypes whose devices draw from it. A type may be in several domains, such as a rack and its room:
    all of them hold. A type without `watts` counts as nothing, and that is said."""
    budget_watts: float = Field(gt=0, le=1e9)
    """Most power that all planned replicas of these types may draw together, at `watts.peak` of each device, in watts.
    Services go short by priority, lowest first."""


class PowerDomainStatus(ApiModel):
    """Whether the domain is in force."""

    conditions: Conditions
    """Accepted: the spec parses and is in force; its message names types that count as nothing. While it does not, and
    no version that did is known, services get no more devices of its types than they have."""
    last_accepted: str | None = None
    """The last version that parsed, as JSON: it counts while a later one does not."""


class PowerDomain(Resource):
    """GPU types that share a power budget."""

    KIND: ClassVar[str] = "PowerDomain"
    PLURAL: ClassVar[str] = "powerdomains"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("pdom",)
    NAMESPACED: ClassVar[bool] = False
    PRINTER_COLUMNS: ClassVar[tuple[PrinterColumn, ...]] = (
        PrinterColumn(name="Watts", type="number", json_path=".spec.budgetWatts"),
        PrinterColumn(name="Types", type="string", json_path=".spec.gpuTypes"),
        PrinterColumn(name="Accepted", type="string", json_path='.status.conditions[?(@.type=="Accepted")].status'),
        PrinterColumn(name="Age", type="date", json_path=".metadata.creationTimestamp"),
    )

    spec: PowerDomainSpec
    status: PowerDomainStatus = Field(default_factory=PowerDomainStatus)
