"""A cluster that the demo borrows (KUBECONFIG): what was in it before, and taking out what the demo put in.

    found(kubectl)          --> names     before anything is applied; kept with the session
    leave(kubectl, names)                 at `make demo-down`: the engines first, so that they drain

The cluster may run llmfleet for others. With a CRD all objects of its kind go, and with a namespace all that is in it,
so what was there before the demo stays, and what the demo has put beside it is deleted by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from e2e.demo.manifests import CRDS, GPU_TYPES, NAMESPACE, PROFILE, REPOSITORY, SECRET, SERVICE, SYSTEM

EXTENDED_RESOURCES = ("demo.llmfleet.io/cpu-slow", "demo.llmfleet.io/cpu-fast")
_DELETE = ("delete", "--ignore-not-found", "--timeout=150s")

Kubectl = Callable[..., str]
"""kubectl with these arguments: its output. Raises where it fails."""


def found(kubectl: Kubectl) -> list[str]:
    """What is there already of what the demo applies: manifests by path, objects as kind/name."""
    manifests = [path for path in (CRDS, *SYSTEM) if kubectl("get", "--ignore-not-found", "-o", "name", "-f", path)]
    objects = [f"namespace/{NAMESPACE}"]
    if CRDS in manifests:
        objects += [f"gputype/{name}" for name in GPU_TYPES]
    there = [name for name in objects if kubectl("get", name, "--ignore-not-found", "-o", "name")]
    return [str(path.relative_to(REPOSITORY)) for path in manifests] + there


def leave(kubectl: Kubectl, found_before: Collection[str]) -> None:
    """Takes out what the demo has put in, but for what was there before."""
    if kubectl("get", "--ignore-not-found", "-o", "name", "-f", CRDS):
        kubectl(*_DELETE, "--cascade=foreground", "-n", NAMESPACE, f"llmservice/{SERVICE}")
        kubectl(*_DELETE, "-n", NAMESPACE, f"modelprofile/{PROFILE}", f"secret/{SECRET}")
        for name in GPU_TYPES:
            if f"gputype/{name}" not in found_before:
                kubectl(*_DELETE, f"gputype/{name}")
    if f"namespace/{NAMESPACE}" not in found_before:
        kubectl(*_DELETE, f"namespace/{NAMESPACE}")
    for path in (CRDS, *reversed(SYSTEM)):
        if str(path.relative_to(REPOSITORY)) not in found_before:
            kubectl(*_DELETE, "-f", path)
    for node in kubectl("get", "nodes", "-l", "llmfleet.io/demo=true", "-o", "name").split():
        kubectl("label", node, "llmfleet.io/demo-")
        patch = [
            {"op": "remove", "path": f"/status/{field}/{resource.replace('/', '~1')}"}
            for field in ("capacity", "allocatable")
            for resource in EXTENDED_RESOURCES
        ]
        kubectl("patch", node, "--subresource=status", "--type=json", "-p", json.dumps(patch))
