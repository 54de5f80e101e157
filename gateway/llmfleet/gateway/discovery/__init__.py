"""Where services and engines come from: a list on the command line, or the API server.

Both end in calls of one function with a whole new `Fleet`. Neither knows what is done with it.
"""

from llmfleet.gateway.discovery.kubernetes import KubernetesDiscovery
from llmfleet.gateway.discovery.static import static_fleet

__all__ = ["KubernetesDiscovery", "static_fleet"]
