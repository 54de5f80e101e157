"""vLLM's schedulers with migration: what `--scheduler-cls` names.

vLLM calls a scheduler from one thread: requests are added and aborted, a step is planned, its results come in. Around
each of these calls the monitor is held and `Migrations` is told. With no migration under way that is a handful of
comparisons per step.

There are two classes because vLLM plans a step ahead of the results by default on GPUs, and only if its scheduler is an
`AsyncScheduler`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from llmfleet.engine.plugin import Plugin
from llmfleet.engine.worker import RESUMED

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
else:
    _Base = object


class _Migrating(_Base):
    """Wraps a scheduler's methods. `super()` is vLLM's class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plugin = Plugin.start(self, super().add_request)

    def add_request(self, request: Request) -> None:
        if self._plugin is None:
            super().add_request(request)
            return
        with self._plugin.monitor:
            if not self._plugin.migrations.arrives(request):
                super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._plugin is None:
            return super().schedule(*args, **kwargs)
        with self._plugin.monitor:
            self._plugin.migrations.before_step()
            output: SchedulerOutput = super().schedule(*args, **kwargs)
            resumed = self._plugin.migrations.planned(output)
        if resumed:
            setattr(output, RESUMED, resumed)
        return output

    def update_from_output(self, output: SchedulerOutput, results: ModelRunnerOutput) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs]
        if self._plugin is None:
            outputs = super().update_from_output(output, results)
            return outputs
        with self._plugin.monitor:
            outputs = super().update_from_output(output, results)
            self._plugin.migrations.stepped(outputs)
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, status: RequestStatus) -> list[Request]:
        finished: list[Request]
        if self._plugin is None:
            finished = super().finish_requests(request_ids, status)
            return finished
        ids = [request_ids] if isinstance(request_ids, str) else None if request_ids is None else list(request_ids)
        with self._plugin.monitor:
            finished = super().finish_requests(ids, status)
            self._plugin.migrations.aborted(ids)
        return finished

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        if self._plugin is None:
            return bool(super().reset_prefix_cache(*args, **kwargs))
        with self._plugin.monitor:
            if args[:1] == (True,) or kwargs.get("reset_running_requests"):
                # vLLM ends where blocks are still held after it has preempted everything.
                self._plugin.migrations.abandon()
            return bool(super().reset_prefix_cache(*args, **kwargs))

    def has_unfinished_requests(self) -> bool:
        waiting = self._plugin is not None and self._plugin.migrations.waiting
        return waiting or bool(super().has_unfinished_requests())

    def shutdown(self) -> None:
        if self._plugin is not None:
            self._plugin.stop()
        super().shutdown()


class MigratingScheduler(_Migrating, Scheduler):
    """For engines that plan a step when the one before is done: those on CPUs."""


class MigratingAsyncScheduler(_Migrating, AsyncScheduler):
    """For engines that plan a step while the one before runs."""
