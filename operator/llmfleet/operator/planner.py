"""The fleet-wide planning loop: what changed goes to the planner process, plans come back, services are told.

    cache changes --mark()--> debounce --> differences, inventory, demand --> planner process
    planner process --> PlanBook --> one key per service whose plan changed

There is one loop for the whole fleet, because there is one inventory. It solves when an input changed, after the
policy's debounce, and looks at demand at least every `replan_interval_seconds`. A solve with the very inputs of the
last one is left out: `placement.plan` is a function of its inputs, so it would say the same; only one that had been
cut short by its time limit, or was a step of several (`maxStartsPerPlan`), is worth another go. Between two solves lies
at least the time that the last one took, so that planning never uses more than half a core while a large fleet is
being written.

The planner process is killed when it does not answer within the solve's own limit plus a margin, and started anew
with everything it has to know. The last good plan stays in force all the while.

So it does when the planner's own check finds that a new plan breaks a constraint. That is a bug of ours which solving
again at once would only repeat: it is logged, counted, and said on the services that wait for a plan; the next solve
is due with the next change, or after the replan interval.

In mode `shadow` a plan is proposed and nothing else: what is in force stays what the next solve starts from, so that a
proposal is what a change to mode `apply` would bring at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from llmfleet.api import (
    Correction,
    FleetPolicySpec,
    GPUType,
    Learnt,
    LLMService,
    ModelProfile,
    ObservedVariant,
    Plan,
    PowerDomain,
)
from llmfleet.api.fleetpolicy import HELD_BACK
from llmfleet.operator.plan_book import PlanBook
from llmfleet.operator.planner_protocol import (
    Drop,
    Failed,
    Learn,
    Learned,
    MeasuredDemand,
    Put,
    Rejected,
    Solve,
    Solved,
    encode,
    read_response,
)

log = logging.getLogger(__name__)

Planned: TypeAlias = GPUType | LLMService | ModelProfile | PowerDomain
"""What the planner process is told of."""
PLANNED_KINDS = (GPUType.KIND, LLMService.KIND, ModelProfile.KIND, PowerDomain.KIND)
ANSWER_MARGIN_S = 15.0
"""What a planner may take beyond the solve's limit: to start, to read, to build the program and to answer."""
RETRY_S = 2.0
"""Pause after a solve that failed."""
AGED_EVERY_S = 21_600.0
"""A plan's inputs say what time it is in steps of this: corrections count less with age, by half in a day, and a plan
should not be made anew for each second of it."""
_PLANNED_METADATA = ("name", "namespace", "uid", "generation", "creationTimestamp")
_SEND_SLICE = 10
"""Objects that are encoded before the event loop gets a turn."""


class PlannerError(Exception):
    """No plan came back."""


WORKER = (sys.executable, "-m", "llmfleet.operator.planner_worker")


class PlannerProcess:
    """The child process. It is started when it is first needed and after each kill."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self.knows_nothing = True
        """Nothing was sent to this child yet."""

    @property
    def running(self) -> bool:
        """Whether there is a child that has kept what it was sent."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """Process id of the child."""
        return self._process.pid if self._process is not None and self.running else None

    async def start(self) -> None:
        """Starts the child. Its standard error is ours."""
        self.knows_nothing = True
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**22,
        )

    async def send(self, messages: Iterable[Put | Drop | Solve | Learn]) -> None:
        """Sends requests, giving the event loop a turn now and then. Raises PlannerError when the child is gone."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            for number, message in enumerate(messages, start=1):
                self._process.stdin.write(encode(message))
                if number % _SEND_SLICE == 0:
                    await asyncio.sleep(0)
            await self._process.stdin.drain()
        except ConnectionError as error:
            raise PlannerError(f"the planner process ended: {error!r}") from error

    async def answer(self, limit_s: float) -> Solved | Rejected | Learned:
        """Waits for the answer to a Solve or Learn. Raises PlannerError when there is none in time or it says Failed;
        after the former the child is gone."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(limit_s):
                response = await read_response(self._process.stdout)
        except TimeoutError as error:
            await self.stop()
            raise PlannerError(f"no plan within {limit_s:.0f} s; the planner process was killed") from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            await self.stop()
            raise PlannerError("the planner process ended during a solve") from error
        if isinstance(response, Failed):
            raise PlannerError(f"the planner failed: {response.error}")
        return response

    async def stop(self) -> None:
        """Kills the child and waits for its end."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class Inputs(Protocol):
    """Where the planning loop takes its inputs from."""

    def policy(self) -> FleetPolicySpec:
        """Knobs."""

    def keys(self, kind: str) -> list[str]:
        """Keys of the objects of one kind."""

    def find(self, kind: str, key: str) -> Planned | None:
        """The object to plan with; None when there is none or it is being deleted."""

    def unreadable(self) -> list[str]:
        """Keys of services that exist but do not parse."""

    def inventory(self) -> Mapping[str, int]:
        """Devices by GPUType name."""

    async def demand(self) -> dict[str, MeasuredDemand]:
        """Demand by service key, where it is measured."""


@dataclass(slots=True)
class PlanningState:
    """Figures of the loop, for metrics and health."""

    solves: int = 0
    failures: int = 0
    rejected: int = 0
    """Plans that broke a constraint and were dropped."""
    last_success_at: float = 0.0
    """Unix time of the last plan."""
    last_duration_s: float = 0.0
    planner_rss_bytes: int = 0


class FleetPlanner:
    """The loop."""

    def __init__(
        self,
        inputs: Inputs,
        book: PlanBook,
        on_planned: Callable[[set[str]], None],
        process: PlannerProcess | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: monotonic seconds; `now`: seconds since 1970."""
        self.state = PlanningState()
        self._inputs = inputs
        self._book = book
        self._on_planned = on_planned
        self._process = process or PlannerProcess()
        self._clock = clock
        self._now = now
        self._dirty: set[tuple[str, str]] = set()
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        """One question at a time."""
        self._previous: Plan | None = None
        self._generations: dict[str, int] = {}
        self._last_inputs: tuple[object, ...] | None = None
        self._busy_s = 0.0
        self._solved_at = clock()

    def mark(self, kind: str, key: str) -> None:
        """An object of the inputs changed or is gone."""
        self._dirty.add((kind, key))
        self._wake.set()

    def wake(self) -> None:
        """Something else that a plan depends on changed: inventory, policy, or demand that cannot wait."""
        self._wake.set()

    async def run(self) -> None:
        """Plans for ever. Cancel it to end; the planner process ends with it."""
        try:
            while True:
                try:
                    await self.plan_once()
                except PlannerError as error:
                    self.state.failures += 1
                    log.error("planning failed; the last plan stays in force", extra={"cause": str(error)})
                    await asyncio.sleep(RETRY_S)
                    continue
                await self._pause()
        finally:
            await self._process.stop()

    async def prepare(self) -> None:
        """Starts the planner process, which takes a second, while the caches are filled."""
        await self._process.start()

    async def plan_once(self) -> bool:
        """One solve, unless its inputs are those of the last one. Returns whether there was one."""
        self._wake.clear()
        async with self._turn:
            return await self._plan_once()

    async def _plan_once(self) -> bool:
        if not self._process.running:
            await self._process.start()
        if self._process.knows_nothing:
            self._process.knows_nothing = False
            self._last_inputs = None
            self._previous = self._book.in_force()
            self._dirty |= {(kind, key) for kind in PLANNED_KINDS for key in self._inputs.keys(kind)}
        dirty, self._dirty = self._dirty, set()
        try:
            return await self._solve(dirty)
        except BaseException:
            # Sent or not: what a planner is told twice does no harm.
            self._dirty |= dirty
            raise

    async def learn(
        self, observed: Sequence[ObservedVariant], corrections: Mapping[str, Sequence[Correction]], at: float
    ) -> list[Learnt]:
        """What profiles learn from what was seen. `corrections`: what they say so far, by key; `at`: seconds since
        1970.

        Raises PlannerError where there is no planner that knows the profiles, or no answer of it."""
        async with self._turn:
            if not self._process.running or self._process.knows_nothing:
                raise PlannerError("the planner process is not ready")
            message = Learn(observed=list(observed), corrections={k: list(c) for k, c in corrections.items()}, at=at)
            await self._process.send([message])
            answer = await self._process.answer(ANSWER_MARGIN_S)
        assert isinstance(answer, Learned)
        return answer.profiles

    async def _solve(self, dirty: set[tuple[str, str]]) -> bool:
        demand = await self._inputs.demand()
        policy, inventory = self._inputs.policy(), dict(self._inputs.inventory())
        unreadable = self._inputs.unreadable()
        at = self._now() // AGED_EVERY_S * AGED_EVERY_S
        inputs = (policy, inventory, demand, unreadable, at)
        if not dirty and inputs == self._last_inputs:
            return False
        began = self._clock()
        await self._process.send(self._message(kind, key) for kind, key in sorted(dirty))
        await self._process.send(
            [
                Solve(
                    inventory=inventory,
                    demand=demand,
                    policy=policy,
                    unreadable=unreadable,
                    previous=self._previous,
                    at=at,
                )
            ]
        )
        solved = await self._process.answer(policy.solve_time_limit_seconds + ANSWER_MARGIN_S)
        assert not isinstance(solved, Learned)
        # The planner has the plan in force now; only a new process is told again.
        self._previous = None
        if isinstance(solved, Rejected):
            self.state.rejected += 1
            self._last_inputs, self._busy_s, self._solved_at = None, self._clock() - began, self._clock()
            log.error("plan dropped; the last one stays in force", extra={"violations": solved.violations})
            self._on_planned(self._book.reject(solved, self._generations))
            return True
        shadow = policy.mode == "shadow"
        if not shadow and self._inputs.policy().mode == "shadow":
            # Asked for while this was being solved: it may not be applied any more, but the planner takes it for
            # what is in force. Another one is told what really is.
            await self._process.stop()
            return False
        # Another solve may say more where this one ran out of time, or is a step on the way: then the next step is due.
        settled = not any(HELD_BACK in service.binding for service in solved.plan.services)
        self._last_inputs = inputs if settled and solved.plan.stopped_by != "time_limit" else None
        self._busy_s, self._solved_at = solved.busy_s, self._clock()
        self.state.solves += 1
        self.state.last_success_at = time.time()
        self.state.last_duration_s = self._clock() - began
        self.state.planner_rss_bytes = solved.rss_bytes
        changed = (self._book.propose if shadow else self._book.take)(solved, self._generations)
        log.info(
            "planned",
            extra={
                "mode": policy.mode,
                "plan": solved.plan.plan_id,
                "status": solved.plan.status,
                "gap": solved.plan.gap_cost,
                "cost_per_hour": solved.plan.cost_per_hour,
                "changed": len(changed),
                "refused": len(solved.plan.refusals),
                "seconds": round(self.state.last_duration_s, 3),
            },
        )
        self._on_planned(changed)
        return True

    def _message(self, kind: str, key: str) -> Put | Drop:
        current = self._inputs.find(kind, key)
        if current is None:
            self._generations.pop(key, None)
            return Drop(kind=kind, key=key)
        if kind == LLMService.KIND:
            self._generations[key] = current.metadata.generation
        wire = current.to_wire()
        learnt = wire.pop("status", {}).get("corrections")
        if learnt:
            wire["status"] = {"corrections": learnt}
        wire["metadata"] = {name: part for name, part in wire["metadata"].items() if name in _PLANNED_METADATA}
        return Put(kind=kind, key=key, object=wire)

    async def _pause(self) -> None:
        """Waits for a change and the debounce after it, or for the replan interval; and in any case as long as the
        last solve took."""
        policy = self._inputs.policy()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(policy.replan_interval_seconds):
                await self._wake.wait()
        rested_s = self._clock() - self._solved_at
        await asyncio.sleep(max(policy.debounce_seconds, self._busy_s - rested_s))
