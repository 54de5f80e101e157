"""vLLM's workers with migration: what `--worker-cls` names.

The worker owns the KV cache and the model runner. Three things are done here: an agent is put beside them, in whatever
process they are; the model runner is told of requests that come from another engine before it sees them for the first
time; and on CPUs requests with a seed get generators with which prompts can be computed in portions (`generators`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from llmfleet.engine import identity, vllm_internals
from llmfleet.engine.rank import RankAgent
from llmfleet.engine.rank_process import RankProcess
from llmfleet.migration.engine_arguments import read_settings
from llmfleet.migration.handshake import read_peer_key

logger = init_logger("vllm.llmfleet")

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object

RESUMED = "llmfleet_resumed"
"""Attribute of the scheduler's output: what this step's `resume.Resumed` are."""

_agents: dict[str, RankAgent] = {}
"""By vLLM's instance: the scheduler of the same process looks its rank up here."""


class _Migrating(_Base):
    """Wraps a worker's methods. `super()` is vLLM's class."""

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        runner = self.model_runner
        missing = vllm_internals.missing_in_runner(runner)
        memory = None if missing else vllm_internals.host_memory(runner)
        if memory is None:
            logger.warning(
                "requests cannot move from or to this engine: %s",
                f"this vLLM has no {'; no '.join(missing)}" if missing else "its KV cache is not in the host's memory",
            )
            return
        settings = read_settings(self.vllm_config.additional_config)
        key = read_peer_key(Path(settings.peer_key_file)).key
        agent = RankAgent(
            rank=self.rank,
            memory=memory,
            generator_state=functools.partial(vllm_internals.generator_state, runner),
            arithmetic=identity.arithmetic(runner),
            data_listen=settings.data_listen or f"{settings.listen.rpartition(':')[0]}:0",
            key=key,
            timeout_s=settings.lease_s,
        )
        if self.vllm_config.parallel_config.distributed_executor_backend == "uni":
            _agents[self.vllm_config.instance_id] = agent
        else:
            RankProcess(agent, self.vllm_config.instance_id, self.rank, key)

    def execute_model(self, output: SchedulerOutput) -> Any:
        for resumed in getattr(output, RESUMED, ()):
            vllm_internals.remember_resumed(self.model_runner, resumed.data, resumed.tokens, resumed.generator)
        result = super().execute_model(output)
        vllm_internals.let_draws_be_taken_back(self.model_runner, output)
        return result


class MigratingCPUWorker(_Migrating, CPUWorker):
    """A worker on CPUs."""


class MigratingGPUWorker(_Migrating, Worker):
    """A worker on GPUs. Its KV cache cannot be copied yet (`vllm_internals.host_memory`): requests stay."""


def agent_of(instance_id: str) -> RankAgent | None:
    """The rank whose worker is in this process, or None: it is in another one, or has no part in migrations."""
    return _agents.get(instance_id)
