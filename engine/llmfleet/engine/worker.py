"""vLLM's CPU worker with migration: what `--worker-cls` names.

The worker owns the KV cache and the model runner. Two things are done here: the plug-in of this process is given access
to both, and the model runner is told of requests that come from another engine before it sees them for the first time.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from llmfleet.engine import vllm_internals

RESUMED = "llmfleet_resumed"
"""Attribute of the scheduler's output: what this step's `resume.Resumed` are."""

_workers: dict[str, MigratingCPUWorker] = {}
"""By vLLM's instance: the scheduler of the same process looks its worker up here."""


class MigratingCPUWorker(CPUWorker):
    """A worker whose requests can come from elsewhere."""

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        _workers[self.vllm_config.instance_id] = self

    def execute_model(self, output: SchedulerOutput) -> Any:
        for resumed in getattr(output, RESUMED, ()):
            vllm_internals.remember_resumed(self.model_runner, resumed.data, resumed.tokens, resumed.generator)
        return super().execute_model(output)


def worker_of(instance_id: str) -> MigratingCPUWorker | None:
    """The worker in this process, or None: it is in another one, or of another class."""
    return _workers.get(instance_id)
