"""The plug-in fits into a ConfigMap, and Python finds all of it there; its Secret holds a key that nobody has seen."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from lightkube import ApiError, AsyncClient
from lightkube.models.meta_v1 import Status

from llmfleet.api import LLMService
from llmfleet.operator.model import PluginPackage
from llmfleet.operator.plugin_package import build_package, config_map
from llmfleet.operator.provide import MOST_OWNERS, THERE_FOR_S, NotProvidedError, Provider, peer_key_manifest

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


class ApiServer:
    """Secrets and ConfigMaps by name, as `Provider` asks for them."""

    def __init__(self) -> None:
        self.config_maps: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.refuses_secrets = False

    async def create(self, obj: Any, **_: Any) -> None:
        manifest = obj.to_dict()
        self.asked.append(f"create {manifest['kind']}")
        if manifest["kind"] == "Secret" and self.refuses_secrets:
            raise ApiError(status=Status(code=403, message="secrets is forbidden"))
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "ConfigMap":
            if name in self.config_maps:
                raise ApiError(status=Status(code=409, message="exists"))
            self.config_maps[name] = manifest

    async def get(self, _: Any, name: str, **__: Any) -> dict[str, Any]:
        self.asked.append("get")
        return self.config_maps[name]

    async def patch(self, _: Any, name: str, patch: dict[str, Any], **__: Any) -> None:
        self.asked.append("patch")
        self.config_maps[name]["metadata"]["ownerReferences"] += patch["metadata"]["ownerReferences"]

    def owners(self) -> list[str]:
        return [owner["uid"] for made in self.config_maps.values() for owner in made["metadata"]["ownerReferences"]]


def of_uid(uid: str) -> LLMService:
    return SERVICE.model_copy(update={"metadata": SERVICE.metadata.model_copy(update={"uid": uid})})


PACKAGE = PluginPackage("llmfleet-engine-1", b"archive")


async def test_of_many_services_only_some_own_the_plug_in_and_others_follow_when_these_are_gone() -> None:
    server, now = ApiServer(), [0.0]
    provider = Provider(cast(AsyncClient, server), lambda: now[0] + 1)
    for number in range(100):
        await provider.provide(of_uid(f"u-{number}"), "s", PACKAGE)
    assert server.owners() == [f"u-{number}" for number in range(MOST_OWNERS)]
    # The garbage collector strikes out owners that are gone.
    server.config_maps[PACKAGE.name]["metadata"]["ownerReferences"] = []
    now[0] += THERE_FOR_S
    await provider.provide(of_uid("u-50"), "s", PACKAGE)
    assert server.owners() == ["u-50"]


async def test_a_namespace_is_sent_the_plug_in_once_and_each_of_its_few_services_owns_it() -> None:
    server, now = ApiServer(), [0.0]
    provider = Provider(cast(AsyncClient, server), lambda: now[0] + 1)
    for uid in ("u-1", "u-2", "u-1", "u-2"):
        await provider.provide(of_uid(uid), "s", PACKAGE)
    assert server.owners() == ["u-1", "u-2"]
    assert server.asked.count("create ConfigMap") == 1
    assert server.asked.count("patch") == 1


async def test_a_plug_in_that_was_deleted_is_made_again_after_a_while() -> None:
    server, now = ApiServer(), [0.0]
    provider = Provider(cast(AsyncClient, server), lambda: now[0] + 1)
    await provider.provide(of_uid("u-1"), "s", PACKAGE)
    server.config_maps.clear()
    now[0] += THERE_FOR_S
    for uid in ("u-2", "u-1"):
        await provider.provide(of_uid(uid), "s", PACKAGE)
    assert server.owners() == ["u-2", "u-1"]


async def test_other_content_under_the_name_is_refused_and_so_is_a_cluster_that_allows_no_secrets() -> None:
    server = ApiServer()
    provider = Provider(cast(AsyncClient, server))
    server.config_maps[PACKAGE.name] = config_map(PluginPackage(PACKAGE.name, b"other"), SERVICE)
    with pytest.raises(NotProvidedError, match="has other content"):
        await provider.provide(SERVICE, "s", PACKAGE)
    server.refuses_secrets = True
    with pytest.raises(NotProvidedError, match="secrets is forbidden"):
        await provider.provide(SERVICE, "s", PACKAGE)
