"""A real Kubernetes on this machine, built from source, for tests and the demo.

`Cluster` is the whole interface; `python -m e2e.cluster` is the same for people.
"""

from e2e.cluster.cluster import Cluster
from e2e.cluster.state import ClusterError

__all__ = ["Cluster", "ClusterError"]
