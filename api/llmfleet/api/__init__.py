"""llmfleet's API: custom resources, and the documents that plan and data plane exchange.

    GPUType, ModelProfile, LLMService, FleetPolicy     what people apply        (CRDs, `crds/`)
    Forecast                                           what demand is expected to come
    Plan                                               what a solve decided
    RoutingTable                                       plan -> gateway          (a ConfigMap per service)
    DemandReport                                       gateway -> plan          (admin port)

This package imports pydantic and nothing else, and everything imports this package.
"""

from llmfleet.api.configuration import DEFAULT_CONFIGURATION, Configuration
from llmfleet.api.demand import (
    ALL_SERVICES,
    DEMAND_PATH,
    DETAIL_QUERY,
    DemandReport,
    ObservedSums,
    Part,
    ServiceDemand,
    SizeSums,
    VariantLoad,
)
from llmfleet.api.fingerprint import Adapter, Compatibility, Fingerprint, compatibility, differences
from llmfleet.api.fleetpolicy import POLICY_NAME, FleetPolicy, FleetPolicySpec
from llmfleet.api.forecast import Forecast, ForecastPoint, ServiceForecast
from llmfleet.api.gputype import GPUType, GPUTypeSpec, GPUTypeStatus
from llmfleet.api.llmservice import (
    CONDITION_ENGINES_READY,
    CONDITION_PLANNED,
    CONDITION_READY,
    CONDITION_SHADOW,
    LLMService,
    LLMServiceSpec,
    LLMServiceStatus,
    VariantStatus,
)
from llmfleet.api.meta import API_VERSION, GROUP, VERSION, Condition, ObjectMeta, Resource
from llmfleet.api.migration import DestinationPhase, Feature, Reason, SourcePhase, TailFate
from llmfleet.api.modelprofile import (
    Architecture,
    Buckets,
    Correction,
    CorrectionBin,
    MeasuredPoint,
    Measurement,
    ModelProfile,
    ModelProfileStatus,
    Percentiles,
    SeenRange,
)
from llmfleet.api.observed import Learnt, ObservedCell, ObservedVariant
from llmfleet.api.plan import Alternative, BucketSizes, NextBest, Plan, PlannedVariant, Refusal, ServicePlan
from llmfleet.api.pod import PodOverlay
from llmfleet.api.powerdomain import PowerDomain, PowerDomainSpec
from llmfleet.api.routing import LatencyCoefficients, Route, RoutedVariant, RoutingTable

KINDS: tuple[type[Resource], ...] = (FleetPolicy, GPUType, LLMService, ModelProfile, PowerDomain)
"""Every custom resource, in the order in which their CRDs are written."""

__all__ = [
    "ALL_SERVICES",
    "API_VERSION",
    "CONDITION_ENGINES_READY",
    "CONDITION_PLANNED",
    "CONDITION_READY",
    "CONDITION_SHADOW",
    "DEFAULT_CONFIGURATION",
    "DEMAND_PATH",
    "DETAIL_QUERY",
    "GROUP",
    "KINDS",
    "POLICY_NAME",
    "VERSION",
    "Adapter",
    "Alternative",
    "Architecture",
    "BucketSizes",
    "Buckets",
    "Compatibility",
    "Condition",
    "Configuration",
    "Correction",
    "CorrectionBin",
    "DemandReport",
    "DestinationPhase",
    "Feature",
    "Fingerprint",
    "FleetPolicy",
    "FleetPolicySpec",
    "Forecast",
    "ForecastPoint",
    "GPUType",
    "GPUTypeSpec",
    "GPUTypeStatus",
    "LLMService",
    "LLMServiceSpec",
    "LLMServiceStatus",
    "LatencyCoefficients",
    "Learnt",
    "MeasuredPoint",
    "Measurement",
    "ModelProfile",
    "ModelProfileStatus",
    "NextBest",
    "ObjectMeta",
    "ObservedCell",
    "ObservedSums",
    "ObservedVariant",
    "Part",
    "Percentiles",
    "Plan",
    "PlannedVariant",
    "PodOverlay",
    "PowerDomain",
    "PowerDomainSpec",
    "Reason",
    "Refusal",
    "Resource",
    "Route",
    "RoutedVariant",
    "RoutingTable",
    "SeenRange",
    "ServiceDemand",
    "ServiceForecast",
    "ServicePlan",
    "SizeSums",
    "SourcePhase",
    "TailFate",
    "VariantLoad",
    "VariantStatus",
    "compatibility",
    "differences",
]
