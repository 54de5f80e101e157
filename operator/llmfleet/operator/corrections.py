"""Online correction in a cluster: what was seen of engines becomes `ModelProfile.status.corrections`.

    EngineObserver --every 15 demand windows--> planner process (learn) --> status, and an Event where something is odd

The status is the memory: a step starts from what it says and ends by writing it, so a restart or a takeover loses no
more than what was seen since. Only these parts of the status are applied, under the operator's own field manager. A
step that fails gives back what it was made from, and the next one has it.

Beside its corrections a profile says whether its engines are what was measured: condition `UpToDate`, False with reason
`ProfileOutdated` where a measured variant takes clearly longer than its measurement says. Plans count with that; to
measure again is still better, since a correction knows a factor and not where it comes from.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol

import httpx2

from llmfleet.api import Condition, Correction, Learnt, ModelProfile, ObservedVariant
from llmfleet.api.modelprofile import CorrectionBin
from llmfleet.operator.apply import Applier, FencedError, ObjectRef, RefusedError
from llmfleet.operator.cache import Cache
from llmfleet.operator.observations import EngineObserver
from llmfleet.operator.planner import PlannerError

log = logging.getLogger(__name__)

WINDOWS_PER_STEP = 15
"""Demand windows between two steps, a quarter of an hour by default: an observation should stand for many requests."""
CONDITION_UP_TO_DATE = "UpToDate"
REASON_OUTDATED = "ProfileOutdated"
REASON_AS_MEASURED = "EnginesAsMeasured"
REASON_DROPPED = "ObservationDropped"
OUTDATED_FACTOR = {"tpot": 1.25, "ttft": 1.5}
"""So many times the measured latency is outdated. Mixes of traffic alone make observations of TPOT vary by a fifth, and
the time to the first token has the way through gateway and network in it."""
_LEAST_REQUESTS = 100.0
_NEWEST = timedelta(days=1)


class Learner(Protocol):
    """Who knows models: `planner.FleetPlanner`."""

    async def learn(
        self, observed: Sequence[ObservedVariant], corrections: Mapping[str, Sequence[Correction]], at: float
    ) -> list[Learnt]:
        """What profiles learn from what was seen."""


def up_to_date(profile: ModelProfile, corrections: Sequence[Correction], now: datetime) -> Condition | None:
    """Whether the profile's measurements say what its engines do; None where nothing was seen of any that it measured.

    A profile that is outdated stays so until its engines are half as far off.
    """
    before = next((one for one in profile.status.conditions if one.type == CONDITION_UP_TO_DATE), None)
    was_outdated = before is not None and before.status == "False"
    measured = {
        (one.gpu_type, one.tensor_parallel, one.pipeline_parallel, one.configuration)
        for one in profile.spec.measurements
    }
    seen, slow = False, []
    for one in corrections:
        if (one.gpu_type, one.tensor_parallel, one.pipeline_parallel, one.configuration) not in measured:
            continue
        for metric, bins in (("tpot", one.tpot), ("ttft", one.ttft)):
            counting = [each for each in bins if _counts(each, now)]
            seen = seen or bool(counting)
            bound = math.log(OUTDATED_FACTOR[metric]) * (0.5 if was_outdated else 1.0)
            worst = max(counting, key=lambda each: each.log_ratio, default=None)
            if worst is not None and worst.log_ratio > bound:
                slow.append(_slower(one, metric, worst))
    if not seen:
        return None
    message = (
        f"{'; '.join(slow)}: plans count with it; measure again with `llmfleet profile`"
        if slow
        else "engines in service are as fast as was measured"
    )
    status = "False" if slow else "True"
    return Condition(
        type=CONDITION_UP_TO_DATE,
        status=status,
        reason=REASON_OUTDATED if slow else REASON_AS_MEASURED,
        message=message[:4096],
        observed_generation=profile.metadata.generation,
        last_transition_time=before.last_transition_time
        if before is not None and before.status == status
        else now.replace(microsecond=0),
    )


def observed_factors(corrections: Sequence[Correction], now: datetime) -> Iterator[tuple[Correction, str, float]]:
    """(variant, `tpot` or `ttft`, factor): how many times the latency that its profile says engines were seen to take,
    the most over all loads. Where a day has seen too few requests there is none."""
    for one in corrections:
        for metric, bins in (("tpot", one.tpot), ("ttft", one.ttft)):
            ratios = [each.log_ratio for each in bins if _counts(each, now)]
            if ratios:
                yield one, metric, math.exp(max(ratios))


def _counts(one: CorrectionBin, now: datetime) -> bool:
    return one.weight >= _LEAST_REQUESTS and now.timestamp() - one.at < _NEWEST.total_seconds()


def _slower(correction: Correction, metric: str, worst: CorrectionBin) -> str:
    layout = correction.tensor_parallel, correction.pipeline_parallel
    variant = f"{correction.gpu_type} tp{layout[0]} pp{layout[1]}, configuration {correction.configuration}"
    # In steps, so that the message does not change with each observation.
    factor = math.floor(math.exp(worst.log_ratio) * 4) / 4
    load = 2 ** round(math.log2(worst.concurrency))
    return f"{variant}: {metric.upper()} is {factor:g} times what was measured, around {load} requests in flight"


class CorrectionKeeper:
    """Takes one step after the other."""

    def __init__(
        self,
        cache: Cache,
        observer: EngineObserver,
        learner: Learner,
        applier: Applier,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cache = cache
        self._observer = observer
        self._learner = learner
        self._applier = applier
        self._now = now

    async def run(self) -> None:
        """Steps for ever."""
        while True:
            await asyncio.sleep(self._cache.policy.demand_window_seconds * WINDOWS_PER_STEP)
            try:
                await self.step()
            except (FencedError, PlannerError) as error:
                log.warning("cannot learn from engines in service now", extra={"cause": str(error)})

    async def step(self) -> None:
        """Learns from all that was seen since the last step. Nothing of that is lost with what it raises."""
        observed = self._observer.take()
        if not observed:
            return
        corrections = {key: profile.status.corrections for key, profile in self._cache.profiles.items()}
        now = self._now()
        try:
            learnt = await self._learner.learn(observed, corrections, now.timestamp())
        except BaseException:
            self._observer.give_back(observed)
            raise
        left = {one.profile for one in learnt}
        try:
            for one in learnt:
                try:
                    await self._take_over(one, now)
                    left.discard(one.profile)
                except (RefusedError, httpx2.HTTPError) as error:
                    log.warning("cannot write what was learnt", extra={"profile": one.profile, "cause": str(error)})
        finally:
            self._observer.give_back(seen for seen in observed if self._profile_of(seen.service) in left)

    async def _take_over(self, learnt: Learnt, now: datetime) -> None:
        profile = self._cache.profiles.get(learnt.profile)
        if profile is None:
            return
        condition = up_to_date(profile, learnt.corrections, now)
        before = next((one for one in profile.status.conditions if one.type == CONDITION_UP_TO_DATE), None)
        if learnt.corrections != profile.status.corrections or condition != before:
            meta = profile.metadata
            await self._applier.write_profile_status(meta.namespace or "", meta.name, learnt.corrections, condition)
        ref = ObjectRef.of(profile)
        for message in learnt.dropped:
            self._applier.emit(ref, "Warning", REASON_DROPPED, f"not learnt from: {message}")
        if condition is not None and condition.status == "False" and (before is None or before.status != "False"):
            self._applier.emit(ref, "Warning", REASON_OUTDATED, condition.message)

    def _profile_of(self, service: str) -> str:
        found = self._cache.services.get(service)
        return "" if found is None else f"{found.metadata.namespace}/{found.spec.profile}"
