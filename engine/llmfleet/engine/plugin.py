"""Puts the plug-in together in an engine that starts, and takes it apart when it ends.

Where something that migration needs is not there (a worker of another class, a KV cache on a device that is not
supported yet, another vLLM) the engine serves without it and says so once in its log; nobody listens at the control
port then. Settings that cannot be are another matter: the engine does not start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import Request

from llmfleet.engine import vllm_internals, worker
from llmfleet.engine.control import Control
from llmfleet.engine.identity import fingerprint
from llmfleet.engine.metrics import Metrics
from llmfleet.engine.migrations import Migrations
from llmfleet.engine.rank import RankAgent
from llmfleet.engine.rank_process import RemoteRank
from llmfleet.migration.engine_arguments import read_settings
from llmfleet.migration.handshake import read_peer_key

logger = init_logger("vllm.llmfleet")


class _Unavailable(Exception):
    """This engine cannot take part in migrations; the message says why."""


class Plugin:
    """Migration in one engine."""

    def __init__(self, migrations: Migrations, control: Control) -> None:
        self.migrations = migrations
        self.monitor = migrations.monitor
        self._control = control

    @classmethod
    def start(cls, scheduler: Any, add_request: Callable[[Request], None]) -> Plugin | None:
        """Listens when it returns; None where this engine cannot migrate. Raises ValueError, PeerKeyError, OSError."""
        settings = read_settings(scheduler.vllm_config.additional_config)
        key = read_peer_key(Path(settings.peer_key_file))
        if key.warning:
            logger.warning("%s", key.warning)
        try:
            ranks = _ranks(scheduler, key.key)
        except _Unavailable as why:
            logger.warning("%s", why)
            return None
        metrics = Metrics()
        control = Control(settings.listen, key.key, metrics)
        migrations = Migrations(
            scheduler=scheduler,
            add_request=add_request,
            ranks=ranks,
            settings=settings,
            fingerprint=fingerprint(scheduler, ranks[0].description),
            unsupported=vllm_internals.unsupported_engine(scheduler),
            changed=control.changed,
            metrics=metrics,
        )
        for rank in ranks:
            if isinstance(rank, RemoteRank):
                rank.attach(migrations)
            else:
                rank.events = migrations
        if settings.metrics_listen is not None:
            metrics.serve(settings.metrics_listen, migrations.blocks, migrations.present)
        control.start(migrations)
        logger.info("requests can move from and to this engine: control at %s", settings.listen)
        return cls(migrations, control)

    def stop(self) -> None:
        """Ends what was started."""
        self._control.stop()
        self.migrations.close()


def _ranks(scheduler: Any, key: bytes) -> list[RankAgent | RemoteRank]:
    config = scheduler.vllm_config
    missing = vllm_internals.missing_in_scheduler(scheduler)
    if missing:
        raise _Unavailable(f"requests cannot move from or to this engine: this vLLM has no {'; no '.join(missing)}")
    return [_rank(config.instance_id, number, key) for number in range(config.parallel_config.tensor_parallel_size)]


def _rank(instance_id: str, number: int, key: bytes) -> RankAgent | RemoteRank:
    here = worker.agent_of(instance_id) if number == 0 else None
    if here is not None:
        return here
    try:
        return RemoteRank(instance_id, number, key)
    except OSError:
        raise _Unavailable(
            f"requests cannot move from or to this engine: the worker of rank {number} has no part in it. Its log says "
            "why; `python -m llmfleet.engine args` prints the right `--worker-cls`"
        ) from None
