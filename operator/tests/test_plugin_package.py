"""The plug-in fits into a ConfigMap, and Python finds all of it there; its Secret holds a key that nobody has seen."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

from llmfleet.api import LLMService
from llmfleet.operator.plugin_package import build_package, config_map
from llmfleet.operator.provide import peer_key_manifest

SERVICE = LLMService.parse(
    {
        "metadata": {"name": "chat", "namespace": "team", "uid": "u-1"},
        "spec": {
            "model": {"name": "org/model", "contextLength": 4096},
            "profile": "p",
            "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
        },
    }
)


def test_python_imports_launcher_and_protocol_from_the_archive_alone(tmp_path: Path) -> None:
    archive = tmp_path / "plug-in.zip"
    archive.write_bytes(build_package().archive)
    code = f"""
import sys
sys.path = [{str(archive)!r}] + [path for path in sys.path if not path.endswith(("/api", "/migration", "/engine"))]
import llmfleet.engine.launch, llmfleet.migration.engine_arguments, llmfleet.migration.control_server
for module in (llmfleet.engine.launch, llmfleet.migration.control_server):
    assert module.__file__.startswith({str(archive)!r}), module.__file__
from importlib.util import find_spec
assert find_spec("llmfleet.engine.scheduler").origin.startswith({str(archive)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_same_files_make_the_same_archive_under_the_same_name() -> None:
    first, second = build_package(), build_package()
    assert first == second
    assert len(first.archive) < 512 * 1024


def test_the_config_map_is_immutable_and_shared() -> None:
    package = build_package()
    manifest = config_map(package, SERVICE)
    assert manifest["immutable"] is True
    assert base64.b64decode(manifest["binaryData"]["plug-in.zip"]) == package.archive
    [owner] = manifest["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "llmfleet.io/v1alpha1", "kind": "LLMService", "name": "chat", "uid": "u-1"}


def test_each_peer_key_has_256_random_bits_and_stands_nowhere_but_in_the_data() -> None:
    keys = set()
    for _ in range(3):
        manifest = peer_key_manifest(SERVICE, "chat-peer-key-u-1")
        key = base64.b64decode(manifest["data"].pop("peer-key"))
        assert len(bytes.fromhex(key.decode())) == 32
        assert key.decode() not in str(manifest)
        assert manifest["metadata"]["ownerReferences"][0]["controller"] is True
        keys.add(key)
    assert len(keys) == 3
