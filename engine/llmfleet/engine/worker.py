"""vLLM's workers with migration: what `--worker-cls` names.

The worker owns the KV cache and the model runner. Two things are done here: the plug-in of this process is given access
to both, and the model runner is told of requests that come from another engine before it sees them for the first time.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from llmfleet.engine import vllm_internals

RESUMED = "llmfleet_resumed"
"""Attribute of the scheduler's output: what this step's `resume.Resumed` are."""

_workers: dict[str, _Migrating] = {}
"""By vLLM's instance: the scheduler of the same process looks its worker up here."""


class _Migrating:
    """Wraps a worker's methods. `super()` is vLLM's class."""

    vllm_config: Any
    model_runner: Any

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        _workers[self.vllm_config.instance_id] = self

    def execute_model(self, output: SchedulerOutput) -> Any:
        for resumed in getattr(output, RESUMED, ()):
            vllm_internals.remember_resumed(self.model_runner, resumed.data, resumed.tokens, resumed.generator)
        return super().execute_model(output)  # type: ignore[misc]


class MigratingCPUWorker(_Migrating, CPUWorker):
    """A worker on CPUs."""


class MigratingGPUWorker(_Migrating, Worker):
    """A worker on GPUs. Its KV cache cannot be copied yet (`vllm_internals.host_memory`): requests stay."""


def worker_of(instance_id: str) -> _Migrating | None:
    """The worker in this process, or None: it is in another one, or of another class."""
    return _workers.get(instance_id)
