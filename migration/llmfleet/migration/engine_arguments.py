"""What to add to `vllm serve` so that its requests can move, and how the plug-in reads it back.

In flow what an operator chooses; out flow arguments of vLLM's own: scheduler class, worker class, and settings that
vLLM hands on without looking at them, so that nothing of vLLM is patched. `EngineSettings` is written here and, inside
the engine, read here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from llmfleet.api.migration_messages import Part
from llmfleet.migration.ports import host_and_port

SETTINGS_KEY = "llmfleet"
"""Of vLLM's `--additional-config`."""
SCHEDULERS = {
    False: "llmfleet.engine.scheduler.MigratingScheduler",
    True: "llmfleet.engine.scheduler.MigratingAsyncScheduler",
}
"""By whether the platform schedules asynchronously: vLLM stops doing so for a plain subclass of its scheduler."""
WORKERS = {
    "cpu": "llmfleet.engine.worker.MigratingCPUWorker",
    "cuda": "llmfleet.engine.worker.MigratingGPUWorker",
}

Platform = Literal["cpu", "cuda"]


def _address(text: str) -> str:
    host_and_port(text)
    return text


ListenAddress = Annotated[str, AfterValidator(_address)]


class EngineSettings(Part):
    """How an engine takes part in migrations."""

    listen: ListenAddress
    """`host:port` of the control port; port 0: any."""
    peer_key_file: str = Field(min_length=1)
    """Path of the key that engines, gateways and coordinators share."""
    data_listen: ListenAddress | None = None
    """`host:port` of rank 0's data port, other ranks on the ports after it. Absent: the control port's host, any."""
    advertise: str | None = Field(default=None, min_length=1)
    """Host by which other engines reach the data ports. Absent: the host of the data port."""
    metrics_listen: ListenAddress | None = None
    """`host:port` at which Prometheus finds `llmfleet_migration_*`. Absent: nowhere."""
    lease_s: float = Field(default=5.0, ge=0.1, le=3600)
    """A migration of which nothing is heard for so long is given up."""
    incoming: int = Field(default=8, ge=0, le=4096)
    """Migrations that may come at once."""
    outgoing: int = Field(default=8, ge=0, le=4096)
    incoming_tokens: int = Field(default=262_144, ge=0)
    """Tokens, expected ones included, of all that come at once."""
    incoming_kv_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the KV cache that may be reserved."""
    growth_tokens: int = Field(default=256, ge=0)
    """Blocks are reserved for so many tokens more than a request has when it is announced."""


def engine_arguments(
    settings: EngineSettings, *, platform: Platform, async_scheduling: bool, tensor_parallel: int = 1
) -> list[str]:
    """Arguments for `vllm serve`, each a word of its own."""
    return [
        "--scheduler-cls", SCHEDULERS[async_scheduling],
        "--worker-cls", WORKERS[platform],
        # Scheduler and worker meet in one process, where there is one worker.
        "--distributed-executor-backend", "uni" if tensor_parallel == 1 else "mp",
        "--additional-config", json.dumps({SETTINGS_KEY: settings.to_wire()}, separators=(",", ":")),
    ]  # fmt: skip


def read_settings(additional_config: dict[str, Any]) -> EngineSettings:
    """The settings in vLLM's `additional_config`. Raises ValueError, which names field, value and what is accepted."""
    if SETTINGS_KEY not in additional_config:
        printed = "`python -m llmfleet.engine args` prints it"
        raise ValueError(f"--additional-config has no object {SETTINGS_KEY!r}; {printed}")
    try:
        return EngineSettings.model_validate(additional_config[SETTINGS_KEY])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join((SETTINGS_KEY, *map(str, first["loc"])))
        raise ValueError(f"--additional-config: {path}: {first['msg']}, got {first['input']!r}") from None
