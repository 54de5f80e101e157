"""Every example is what the API server accepts, down to the last field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
OTHERWISE = (EXAMPLES / "invalid", EXAMPLES / "demo")
"""Folders that are tested in another way: as refusals, and by the demo, which fills in paths of the machine."""
FILES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent not in OTHERWISE)


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.fixture(scope="module")
def cluster_with_namespaces(control_plane: Cluster) -> Cluster:
    """The shared control plane with llmfleet's CRDs and the namespaces that examples live in."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", ROOT / "crds")
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", ROOT / "crds")
    namespaces = [d for path in FILES for d in documents(path) if d["kind"] == "Namespace"]
    control_plane.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(namespaces))
    return control_plane


@pytest.mark.cluster
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_the_api_server_accepts_it_without_dropping_a_field(cluster_with_namespaces: Cluster, path: Path) -> None:
    answer = cluster_with_namespaces.kubectl(
        "apply", "--server-side", "--dry-run=server", "--validate=strict", "-o", "yaml", "-f", path
    )
    parsed = list(yaml.safe_load_all(answer))
    stored = [item for answered in parsed for item in answered.get("items", [answered])]
    for written, kept in zip(documents(path), stored, strict=True):
        assert kept["metadata"]["name"] == written["metadata"]["name"]
        assert lost(written.get("spec", {}), kept.get("spec", {})) == []


def lost(written: object, kept: object, path: str = "spec") -> list[str]:
    """Fields that were written and are not there, or not the same, in what the API server would store."""
    if isinstance(written, dict) and isinstance(kept, dict):
        return [p for key, value in written.items() for p in lost(value, kept.get(key), f"{path}.{key}")]
    if isinstance(written, list) and isinstance(kept, list) and len(written) == len(kept):
        pairs = enumerate(zip(written, kept, strict=True))
        return [p for index, (a, b) in pairs for p in lost(a, b, f"{path}[{index}]")]
    return [] if written == kept else [path]
