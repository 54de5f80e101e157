"""The Kubernetes kinds that the operator reads and writes, as raw JSON.

lightkube has generated structs for built-in kinds. They drop fields that they do not know and cost a second copy of
each object, while everything here goes straight from JSON to the small records of `parse`. So each kind is a
lightkube *generic* resource: a dictionary with an address.

`WATCHED` is the table of what is watched, with the label selector that the API server filters by. Pods are watched
without one: pods of others use devices too, and that is inventory.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightkube.generic_resource import (
    GenericGlobalResource,
    GenericNamespacedResource,
    create_global_resource,
    create_namespaced_resource,
)

from llmfleet.api import GROUP, VERSION, FleetPolicy, GPUType, LLMService, ModelProfile, PowerDomain
from llmfleet.api.meta import COMPONENT_ENGINE, COMPONENT_ROUTING, LABEL_COMPONENT

DEPLOYMENTS = create_namespaced_resource("apps", "v1", "Deployment", "deployments")
CONFIG_MAPS = create_namespaced_resource("", "v1", "ConfigMap", "configmaps")
PODS = create_namespaced_resource("", "v1", "Pod", "pods")
SECRETS = create_namespaced_resource("", "v1", "Secret", "secrets")
EVENTS = create_namespaced_resource("", "v1", "Event", "events")
LEASES = create_namespaced_resource("coordination.k8s.io", "v1", "Lease", "leases")
NODES = create_global_resource("", "v1", "Node", "nodes")
LLM_SERVICES = create_namespaced_resource(GROUP, VERSION, LLMService.KIND, LLMService.PLURAL)
MODEL_PROFILES = create_namespaced_resource(GROUP, VERSION, ModelProfile.KIND, ModelProfile.PLURAL)
GPU_TYPES = create_global_resource(GROUP, VERSION, GPUType.KIND, GPUType.PLURAL)
POWER_DOMAINS = create_global_resource(GROUP, VERSION, PowerDomain.KIND, PowerDomain.PLURAL)
FLEET_POLICIES = create_global_resource(GROUP, VERSION, FleetPolicy.KIND, FleetPolicy.PLURAL)


@dataclass(frozen=True, slots=True)
class WatchedKind:
    """One kind that is listed and watched."""

    kind: str
    """Name of the kind; the key under which the cache knows it."""
    resource: type[GenericNamespacedResource] | type[GenericGlobalResource]
    """Address for lightkube."""
    group: str
    version: str
    plural: str
    labels: tuple[tuple[str, str], ...] = ()
    """Labels that the API server filters by."""

    @property
    def namespaced(self) -> bool:
        """Whether objects of this kind live in namespaces."""
        return issubclass(self.resource, GenericNamespacedResource)


WATCHED: tuple[WatchedKind, ...] = (
    WatchedKind("FleetPolicy", FLEET_POLICIES, GROUP, VERSION, FleetPolicy.PLURAL),
    WatchedKind("GPUType", GPU_TYPES, GROUP, VERSION, GPUType.PLURAL),
    WatchedKind("PowerDomain", POWER_DOMAINS, GROUP, VERSION, PowerDomain.PLURAL),
    WatchedKind("ModelProfile", MODEL_PROFILES, GROUP, VERSION, ModelProfile.PLURAL),
    WatchedKind("LLMService", LLM_SERVICES, GROUP, VERSION, LLMService.PLURAL),
    WatchedKind("Node", NODES, "", "v1", "nodes"),
    WatchedKind("Pod", PODS, "", "v1", "pods"),
    WatchedKind("Deployment", DEPLOYMENTS, "apps", "v1", "deployments", ((LABEL_COMPONENT, COMPONENT_ENGINE),)),
    WatchedKind("ConfigMap", CONFIG_MAPS, "", "v1", "configmaps", ((LABEL_COMPONENT, COMPONENT_ROUTING),)),
)
