"""Discovery without a cluster: the static list, what is refused, and a watch that is told 410 Gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from lightkube import AsyncClient
from lightkube.core.exceptions import ApiError
from lightkube.models.meta_v1 import ObjectMeta, Status
from lightkube.resources.core_v1 import ConfigMap

from gateway_testing.harness import eventually
from gateway_testing.tables import table
from llmfleet.gateway.discovery import static_fleet
from llmfleet.gateway.discovery.kubernetes import check_table
from llmfleet.gateway.discovery.reflector import Key, Reflector
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.settings import SettingsError


def test_engines_without_a_table_serve_every_model() -> None:
    fleet = static_fleet(["http://10.0.0.1:8000", "http://engine"])
    [service] = fleet.offering("whatever")
    assert [(engine.host, engine.port) for engine in service.engines] == [("10.0.0.1", 8000), ("engine", 80)]
    assert service.keys is None


def test_engines_with_a_table_say_their_variant(tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    file.write_text(table({"fast": 0.5, "slow": 0.5}).model_dump_json(by_alias=True))
    fleet = static_fleet(["fast=http://a:1", "slow=http://b:2"], file)
    [service] = fleet.offering("m")
    assert [engine.variant for engine in service.engines] == ["fast", "slow"]
    assert fleet.offering("other") == []


def test_an_engine_may_say_its_control_port(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("k" * 32)
    file.chmod(0o600)
    routing = tmp_path / "routing.json"
    routing.write_text(table({"fast": 1.0}).model_dump_json(by_alias=True))
    plain = static_fleet(["http://a:1#control=a:7000", "http://b:1"], peer_key_file=file)
    named = static_fleet(["fast=http://a:1#control=[::1]:7000"], routing, file)
    for fleet, model, controls in ((plain, "any", ["a:7000", None]), (named, "m", ["[::1]:7000"])):
        [service] = fleet.offering(model)
        assert [engine.control for engine in service.engines] == controls
        assert service.peer_key == b"k" * 32
        assert "kkkk" not in repr(service)


@pytest.mark.parametrize(
    ("engine", "key", "named"),
    [
        ("http://a#control=a:7000", None, "peer-key-file must name the engines' key"),
        ("http://a", "k" * 32, "is for engines with #control=HOST:PORT, and none has it"),
        ("http://a#control=7000", "k" * 32, "address '7000'; accepted is host:port"),
        ("http://a#contrl=a:7000", "k" * 32, "may end with #control=HOST:PORT, got"),
        ("http://a#control=a:7000", "short", "has 5 bytes where at least 32 are accepted"),
    ],
)
def test_a_control_port_that_cannot_work_is_refused_by_name(
    tmp_path: Path, engine: str, key: str | None, named: str
) -> None:
    file = tmp_path / "key"
    if key is not None:
        file.write_text(key)
    with pytest.raises(SettingsError) as refusal:
        static_fleet([engine], peer_key_file=None if key is None else file)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("engines", "named"),
    [
        (["10.0.0.1:8000"], "got '10.0.0.1:8000'"),
        (["https://a"], "got 'https://a'"),
        (["http://a/v1"], "got 'http://a/v1'"),
        (["http://a:99999"], "got 'http://a:99999'"),
        (["ghost=http://a"], "got 'ghost=http://a' without a routing file"),
        (["http://a", "http://a:80"], "must differ"),
    ],
)
def test_a_wrong_engine_is_refused_by_name(engines: list[str], named: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        static_fleet(engines)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"api_keys_secret": "keys"}, "apiKeysSecret 'keys' needs Kubernetes"),
        ({"variants": []}, "at least one variant"),
    ],
)
def test_a_routing_file_that_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    file = tmp_path / "routing.json"
    file.write_text(table().model_copy(update=changes).model_dump_json(by_alias=True))
    with pytest.raises(SettingsError) as refusal:
        static_fleet(["fast=http://a"], file)
    assert named in str(refusal.value)


def test_an_engine_without_its_variant_is_refused_where_there_are_several(tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    file.write_text(table({"fast": 0.5, "slow": 0.5}).model_dump_json(by_alias=True))
    with pytest.raises(SettingsError, match="VARIANT=URL with one of fast, slow"):
        static_fleet(["http://a"], file)


def test_a_variant_that_the_table_does_not_have_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    file.write_text(table({"fast": 0.5, "slow": 0.5}).model_dump_json(by_alias=True))
    with pytest.raises(SettingsError, match="variant must be one of fast, slow, got 'ghost'"):
        static_fleet(["ghost=http://a"], file)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    file.write_text("{}")
    with pytest.raises(SettingsError, match="is not a RoutingTable"):
        static_fleet(["http://a"], file)


def test_a_table_may_only_speak_for_its_own_namespace() -> None:
    check_table(table(), "team")
    with pytest.raises(ValueError, match="namespace must be that of the ConfigMap, 'other', got 'team'"):
        check_table(table(), "other")


def test_a_table_may_not_take_every_model() -> None:
    with pytest.raises(ValueError, match="servedName must be the name of a model"):
        check_table(table(served_name="*"), "team")


def test_a_selector_that_would_match_every_pod_is_refused() -> None:
    routing = table()
    everything = routing.variants[0].model_copy(update={"selector": {}})
    with pytest.raises(ValueError, match="selector must not be empty"):
        check_table(routing.model_copy(update={"variants": [everything]}), "team")


class GoneClient:
    """An API server whose first watch is told that its version is too old."""

    def __init__(self) -> None:
        self.lists = 0
        self.versions: list[str] = []

    def list(self, *_: Any, **__: Any) -> GoneClient:
        self.lists += 1
        return self

    resourceVersion = "7"

    async def __aiter__(self) -> AsyncIterator[ConfigMap]:
        yield ConfigMap(metadata=ObjectMeta(name=f"map-{self.lists}", namespace="n"))

    async def watch(self, *_: Any, resource_version: str, **__: Any) -> AsyncIterator[tuple[str, ConfigMap]]:
        self.versions.append(resource_version)
        if len(self.versions) == 1:
            raise ApiError(status=Status(code=410, message="too old resource version"))
        yield "MODIFIED", ConfigMap(metadata=ObjectMeta(name="changed", namespace="n"))
        await asyncio.Event().wait()


async def test_a_watch_that_is_gone_starts_again_from_a_list() -> None:
    client = GoneClient()
    listed: list[set[Key]] = []
    changed: list[Key] = []
    metrics = GatewayMetrics()
    reflector = Reflector(
        cast(AsyncClient, client),
        ConfigMap,
        "routing",
        None,
        lambda objects: listed.append(set(objects)),
        lambda key, _: changed.append(key),
        metrics,
    )
    task = asyncio.create_task(reflector.run())
    await eventually(lambda: bool(changed))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert listed == [{("n", "map-1")}, {("n", "map-2")}]
    assert client.versions == ["7", "7"]
    assert changed == [("n", "changed")]
    assert metrics.registry.get_sample_value("llmfleet_gateway_watch_failures_total", {"kind": "ConfigMap"}) == 1
