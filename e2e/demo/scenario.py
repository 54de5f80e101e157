"""The story of the README, step by step, against whatever cluster the session found or started.

Each step says what it waits for and why, has a deadline, and shows the end of the guilty component's log when the
deadline passes. What the story claims is checked here, and every claim that does not hold ends up in
`DemoResult.problems`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from e2e.demo.manifests import CRDS, FAST, NAMESPACE, SERVICE, SLOW, SYSTEM, demo_objects
from e2e.demo.report import DemoResult
from e2e.demo.session import DemoError, Session
from e2e.demo.traffic import Clients

SLOW_DEVICES = 2
API_KEY = "demo-key"

ENGINE_DEADLINE_S = 420
"""A throttled vLLM needs two minutes to start on a quiet machine; two of them on two busy cores, more."""

LONG_STREAMS = {"Count the engines.": 300, "Name the engines.": 350, "Price the engines.": 400}
"""Prompts and the tokens of their answers: long enough that some are always in the middle."""

_LOOK_EVERY_S = 1.0
"""Each look is a kubectl, which takes from the engines that it waits for."""


@dataclass(frozen=True)
class Snapshot:
    """One look at the service."""

    ready: bool
    reason: str
    message: str
    desired: dict[str, int]
    surplus: int
    plan_id: str
    cost_per_hour: float

    @property
    def settled(self) -> bool:
        """Ready, and nothing left of an earlier plan."""
        return self.ready and self.surplus == 0


def snapshot(service: dict[str, Any]) -> Snapshot:
    """Reads the service's status; a condition of an older generation does not count."""
    status = service.get("status", {})
    generation = service["metadata"]["generation"]
    ready: dict[str, Any] = next((c for c in status.get("conditions", []) if c["type"] == "Ready"), {})
    variants = status.get("variants", [])
    return Snapshot(
        ready=ready.get("status") == "True" and ready.get("observedGeneration") == generation,
        reason=ready.get("reason", "no status yet"),
        message=ready.get("message", ""),
        desired={v["name"]: v.get("desired", 0) for v in variants if v.get("desired", 0)},
        surplus=sum(v.get("surplus", 0) for v in variants),
        plan_id=status.get("planId", ""),
        cost_per_hour=status.get("costPerHour", 0.0),
    )


class Scenario:
    """Runs the story; `run` returns the result, problems included."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._say = session.say
        self._problems: list[str] = []

    async def run(self) -> DemoResult:
        """The whole story. Raises DemoError where going on would make no sense."""
        self._prepare_node()
        self._apply_definitions()
        self._session.start_components()
        applied_at = time.monotonic()
        self._apply_examples()
        clients = Clients(self._session.gateway_url + "/v1", API_KEY, SERVICE)
        try:
            first = await self._until_settled(
                "the first plan's engines are Ready", lambda planned: planned.get(SLOW, 0) == SLOW_DEVICES
            )
            streamed, first_token_s = await self._stream_and_print(clients, applied_at)
            engine_start_s = self._slowest_engine_start_s()
            self._say(f"first token {first_token_s:.1f} s after apply; the slowest engine took {engine_start_s:.0f} s")
            undisturbed = await self._undisturbed_answers(clients)
            second, background = await self._lower_the_limit_under_load(clients, first)
            moved, changed = self._what_became_of_the_streams(clients, undisturbed)
        finally:
            await clients.close()
        self._say("the service as kubectl shows it:")
        self._session.show(self._session.kubectl("get", "llms", "-n", NAMESPACE, "-o", "wide"))
        self._check(clients.tally.failures == [], f"requests failed: {clients.tally.failures}")
        self._check(second.cost_per_hour > 0, "the plan costs nothing")
        self._check(self._ready_services() == 1, "the one LLMService is not Ready at the end")
        return DemoResult(
            services=self._ready_services(),
            variants=len(second.desired),
            cost_per_hour=second.cost_per_hour,
            streamed_tokens=streamed,
            failed_requests=len(clients.tally.failures),
            background_requests=background,
            moved_streams=moved,
            changed_answers=changed,
            first_plan=first.desired,
            second_plan=second.desired,
            apply_to_first_token_s=round(first_token_s, 1),
            engine_start_s=round(engine_start_s, 1),
            problems=self._problems,
        )

    def _check(self, holds: bool, problem: str) -> None:
        if not holds:
            self._problems.append(problem)
            self._say(f"NOT SO: {problem}")

    def _prepare_node(self) -> None:
        node = self._session.engine_node()
        self._say(f"advertising two {SLOW} and one {FAST} device on node {node}")
        self._session.kubectl("label", "node", node, "llmfleet.io/demo=true", "--overwrite")
        capacity = {f"demo.llmfleet.io/{SLOW}": str(SLOW_DEVICES), f"demo.llmfleet.io/{FAST}": "1"}
        patch = json.dumps({"status": {"capacity": capacity, "allocatable": capacity}})
        self._session.kubectl("patch", "node", node, "--subresource=status", "--type=merge", "-p", patch)

    def _apply_definitions(self) -> None:
        self._say("applying the CRDs and the operator's and gateway's rights")
        self._session.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRDS))
        self._session.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(CRDS))
        for manifest in SYSTEM:
            self._session.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(manifest))

    def _apply_examples(self) -> None:
        self._say("applying examples/demo: two GPUTypes, the measured ModelProfile, one LLMService")
        for manifest in demo_objects(API_KEY, self._say):
            self._session.apply(manifest)

    def _service(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            self._session.kubectl("get", "llmservice", SERVICE, "-n", NAMESPACE, "-o", "json")
        )
        return answer

    def _ready_services(self) -> int:
        services = json.loads(self._session.kubectl("get", "llmservices", "-A", "-o", "json"))["items"]
        return sum(snapshot(service).ready for service in services)

    def _pods(self) -> list[dict[str, Any]]:
        answer = self._session.kubectl(
            "get", "pods", "-n", NAMESPACE, "-l", "llmfleet.io/component=engine", "-o", "json"
        )
        items: list[dict[str, Any]] = json.loads(answer)["items"]
        return items

    async def _until_settled(self, what: str, expected: Callable[[dict[str, int]], bool]) -> Snapshot:
        """Waits until the service is Ready on an expected plan with no surplus, telling each change.

        A demo that is up already is Ready on its last plan, so being Ready alone says nothing.
        """
        self._say(f"waiting until {what}")
        deadline = time.monotonic() + ENGINE_DEADLINE_S
        told = ""
        while True:
            now = snapshot(await asyncio.to_thread(self._service))
            if now.settled and expected(now.desired):
                self._say(f"Ready: {now.desired} at {now.cost_per_hour:g} per hour, plan {now.plan_id}")
                return now
            state = f"{now.reason}: {now.message}" if now.message else now.reason
            if state != told:
                self._say(f"  {state}")
                told = state
            self._session.check_components()
            if time.monotonic() > deadline:
                raise DemoError(
                    f"not within {ENGINE_DEADLINE_S} s: {what}; {state}\n{self._session.evidence(NAMESPACE)}"
                )
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _stream_and_print(self, clients: Clients, applied_at: float) -> tuple[int, float]:
        """Streams one answer to the terminal; returns its tokens and the time from apply to its first token."""
        self._say("a streamed chat completion through the gateway (random weights speak gibberish):")
        first_token_s = 0.0

        def show(text: str) -> None:
            nonlocal first_token_s
            first_token_s = first_token_s or time.monotonic() - applied_at
            self._session.show(text, end="")

        tokens = await clients.stream("Tell me a story about a fleet of engines.", 96, show)
        self._session.show("")
        self._check(tokens == 96, f"asked for 96 tokens, got {tokens}")
        return tokens, first_token_s

    def _slowest_engine_start_s(self) -> float:
        """Seconds from a pod's start to its Ready condition, of the slowest engine."""
        slowest = 0.0
        for pod in self._pods():
            ready = [c for c in pod["status"].get("conditions", []) if c["type"] == "Ready" and c["status"] == "True"]
            if ready and "startTime" in pod["status"]:
                slowest = max(slowest, _seconds(ready[0]["lastTransitionTime"]) - _seconds(pod["status"]["startTime"]))
        return slowest

    async def _undisturbed_answers(self, clients: Clients) -> dict[str, str]:
        """What the long streams say while no engine comes or goes."""
        self._say("three long answers, to compare with later")
        await asyncio.gather(*(clients.stream(*stream) for stream in LONG_STREAMS.items()))
        return {prompt: said[-1] for prompt, said in clients.tally.answers.items() if prompt in LONG_STREAMS}

    def _what_became_of_the_streams(self, clients: Clients, undisturbed: dict[str, str]) -> tuple[int, int]:
        """(streams that moved in the middle of their answer, answers that are not what they were undisturbed)."""
        moved = sum(
            int(value)
            for name, value in self._session.gateway_metrics().items()
            if name.startswith("llmfleet_gateway_migrations_total{") and 'result="moved"' in name
        )
        answers = [(prompt, said) for prompt in undisturbed for said in clients.tally.answers[prompt]]
        changed = sum(said != undisturbed[prompt] for prompt, said in answers)
        self._say(f"{moved} streams went on at another engine in the middle of their answer")
        self._say(f"{len(answers) - changed} of {len(answers)} long answers are what they were undisturbed")
        self._check(len(undisturbed) == len(LONG_STREAMS), "an undisturbed answer is missing")
        self._check(moved > 0, "no stream moved, although engines left in the middle of some")
        self._check(changed == 0, f"{changed} answers changed")
        return moved, changed

    async def _lower_the_limit_under_load(self, clients: Clients, first: Snapshot) -> tuple[Snapshot, int]:
        """Takes away one device of the cheaper type while streams run on it; returns the plan after it."""
        self._say(f"load: three clients stream without a pause, one sends short requests; then {SLOW} loses a device")
        already = clients.tally.succeeded
        stop = asyncio.Event()
        load = [
            *(asyncio.create_task(clients.keep_streaming(stop, *stream)) for stream in LONG_STREAMS.items()),
            asyncio.create_task(clients.keep_loading(stop, 1.0, "Are you there?", 8)),
        ]
        try:
            await asyncio.sleep(5)
            patch = json.dumps({"spec": {"limit": SLOW_DEVICES - 1}})
            self._session.kubectl("patch", "gputype", SLOW, "--type=merge", "-p", patch)
            self._say(f"limit of {SLOW} lowered to {SLOW_DEVICES - 1}")
            second = await self._until_settled(
                "the new plan's engines are Ready and the old one has drained",
                lambda planned: planned.get(SLOW, 0) < SLOW_DEVICES,
            )
        finally:
            stop.set()
            await asyncio.gather(*load, return_exceptions=True)
        done = clients.tally.succeeded - already
        self._say(f"{done} requests finished meanwhile, {len(clients.tally.failures)} failed")
        self._check(second.desired != first.desired, f"the plan did not change: {second.desired}")
        self._check(second.desired.get(SLOW, 0) < SLOW_DEVICES, f"the plan exceeds the limit: {second.desired}")
        running = sorted(pod["metadata"]["labels"]["llmfleet.io/variant"] for pod in self._pods())
        planned = sorted(name for name, count in second.desired.items() for _ in range(count))
        self._check(running == planned, f"pods {running} are not the plan's {planned}")
        self._check(done > 0, "no request finished during the change")
        return second, done


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()
