"""examples/demo starts its engines as `e2e.engine` does: one truth, written down twice because examples are files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.state import ClusterError, cache_directory
from e2e.demo.manifests import EXAMPLES, load
from e2e.demo.session import Session
from e2e.engine import EngineLayout, engine_args, engine_env, host_mounts

LAYOUT = EngineLayout(environment=Path("/cache/engine/venv"), model=Path("/cache/tiny"))
PATHS = {"ENGINE": str(LAYOUT.environment), "MODEL": str(LAYOUT.model), "PYTHON_PREFIX": "/python", "API_KEY": "key"}


def _objects(name: str, kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in load(EXAMPLES / f"{name}.yaml", PATHS) if manifest["kind"] == kind]


def _environment(overlay: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in overlay["env"]}


def test_the_service_starts_the_engine_with_the_same_arguments_and_variables() -> None:
    (service,) = _objects("llmservice", "LLMService")
    assert service["spec"]["engine"]["args"] == engine_args()
    assert service["spec"]["engine"]["command"] == [str(LAYOUT.executable), "serve"]
    for gpu_type in _objects("gputypes", "GPUType"):
        variables = _environment(service["spec"]["podOverlay"]) | _environment(gpu_type["spec"]["podOverlay"])
        core = int(variables["OMP_PLACES"].strip("{}"))
        assert variables == engine_env(LAYOUT, core)


def test_the_service_mounts_what_the_engine_needs_of_the_machine_read_only() -> None:
    (service,) = _objects("llmservice", "LLMService")
    overlay = service["spec"]["podOverlay"]
    mounted = {volume["name"]: volume["hostPath"]["path"] for volume in overlay["volumes"]}
    assert all(mount["readOnly"] for mount in overlay["volumeMounts"])
    needed = {str(mount.path) for mount in host_mounts(LAYOUT) if mount.path.is_relative_to("/cache")}
    assert needed <= set(mounted.values())


def test_a_name_that_no_cluster_may_have_is_refused_before_anything_is_made() -> None:
    with pytest.raises(ClusterError, match="'A B' is refused"):
        Session("A B")
    assert not (cache_directory() / "session-A B").exists()
