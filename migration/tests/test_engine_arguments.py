"""What is printed for `vllm serve` is what the plug-in reads."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from llmfleet.migration.engine_arguments import SETTINGS_KEY, EngineSettings, Platform, engine_arguments, read_settings

SETTINGS = EngineSettings(listen="0.0.0.0:7000", peer_key_file="/keys/peer", lease_s=2, incoming_kv_share=0.25)


def test_the_plugin_reads_what_was_written() -> None:
    arguments = engine_arguments(SETTINGS, platform="cpu", async_scheduling=True)
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert read_settings(json.loads(given["--additional-config"])) == SETTINGS
    assert given["--distributed-executor-backend"] == "uni"
    assert len(given) == 4


@pytest.mark.parametrize(
    ("platform", "async_scheduling", "scheduler", "worker"),
    [
        ("cpu", False, "MigratingScheduler", "MigratingCPUWorker"),
        ("cuda", True, "MigratingAsyncScheduler", "MigratingGPUWorker"),
    ],
)
def test_classes_follow_platform_and_scheduling(
    platform: Platform, async_scheduling: bool, scheduler: str, worker: str
) -> None:
    _, scheduler_class, _, worker_class, *_ = engine_arguments(
        SETTINGS, platform=platform, async_scheduling=async_scheduling
    )
    assert scheduler_class.endswith(f".{scheduler}")
    assert worker_class.endswith(f".{worker}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"listen": "7000"}, "llmfleet.listen: Value error, address '7000'; accepted is host:port"),
        ({"dataListen": "host:x"}, "llmfleet.dataListen: Value error, address 'host:x'"),
        ({"peerKeyFile": ""}, "llmfleet.peerKeyFile: String should have at least 1 character, got ''"),
        ({"leaseS": 0.0}, "llmfleet.leaseS: Input should be greater than or equal to 0.1, got 0.0"),
        ({"incoming": "8"}, "llmfleet.incoming: Input should be a valid integer, got '8'"),
        ({"incomingKvShare": 1.5}, "llmfleet.incomingKvShare: Input should be less than or equal to 1, got 1.5"),
        ({"color": "red"}, "llmfleet.color: Extra inputs are not permitted, got 'red'"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_accepted(change: dict[str, Any], message: str) -> None:
    good = {"listen": "0.0.0.0:7000", "peerKeyFile": "/keys/peer"}
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings({SETTINGS_KEY: good | change})


def test_missing_settings_are_named() -> None:
    with pytest.raises(ValueError, match="no object 'llmfleet'"):
        read_settings({})
    with pytest.raises(ValueError, match=r"llmfleet\.peerKeyFile: Field required"):
        read_settings({SETTINGS_KEY: {"listen": "0.0.0.0:7000"}})
