"""Two engines in one process, and what can be done with them by hand. Other modules' scenarios register here."""

from __future__ import annotations

import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from llmfleet.api import Reason
from llmfleet.api.migration_messages import (
    Cancel,
    Capabilities,
    Freeze,
    GetLoad,
    ListRequests,
    Precopy,
    Prepare,
    Prepared,
    Release,
    SourceStatus,
    Status,
)
from llmfleet.engine.step_times import StepTimes
from llmfleet.migration.handshake import read_peer_key

LEASE_S = 1.0

ACKNOWLEDGED_S = 0.25

KV_BYTES = 128 * 2**20

MAX_MODEL_LEN = 4096

MOST_BATCHED_TOKENS = 1024
"""In a step: what is longer is computed in portions."""

MOST_INCOMING = 128

EPOCH = 2

TENSOR_PARALLEL = int(os.environ.get("LLMFLEET_TEST_TP", "1"))

ANSWER_TOKENS = 100

Scenario = Callable[["Pair"], Iterable[str]]

SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


class Side:
    """One engine and what the tests look at in it."""

    def __init__(self, model: str, dtype: str, key_file: str) -> None:
        self.metrics_port = free_port()
        self.control = f"127.0.0.1:{free_port()}"
        self.llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=64,
            max_num_batched_tokens=MOST_BATCHED_TOKENS,
            enforce_eager=True,
            block_size=32,
            kv_cache_memory_bytes=KV_BYTES,
            disable_log_stats=True,
            tensor_parallel_size=TENSOR_PARALLEL,
            distributed_executor_backend="uni" if TENSOR_PARALLEL == 1 else "mp",
            scheduler_cls="llmfleet.engine.scheduler.MigratingScheduler",
            worker_cls="llmfleet.engine.worker.MigratingCPUWorker",
            additional_config={
                "llmfleet": {
                    "listen": self.control,
                    "peer_key_file": key_file,
                    "metrics_listen": f"127.0.0.1:{self.metrics_port}",
                    "lease_s": LEASE_S,
                    "incoming": MOST_INCOMING,
                    "outgoing": MOST_INCOMING,
                }
            },
        )
        self.engine = self.llm.llm_engine
        self.scheduler: Any = self.engine.engine_core.engine_core.scheduler
        self.plug: Any = self.scheduler._plugin.migrations
        self.outputs: dict[str, Any] = {}
        self.all_blocks = self.free_blocks

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def submit(self, name: str, prompt: list[int], params: SamplingParams) -> None:
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params.clone())

    def step(self) -> None:
        for output in self.engine.step():
            self.outputs[output.request_id] = output

    def tokens(self, name: str) -> int:
        return len(self.outputs[name].outputs[0].token_ids) if name in self.outputs else 0

    def ended(self, name: str) -> bool:
        return name in self.outputs and bool(self.outputs[name].finished)

    def run(self, name: str, limit_s: float = 30.0) -> Any:
        """Steps until the request has ended. Its answer."""
        ends = time.monotonic() + limit_s
        while not self.ended(name):
            if time.monotonic() > ends:
                raise TimeoutError(f"{name} does not end")
            self.step()
        return self.outputs.pop(name).outputs[0]

    def ask(self, message: Any) -> Any:
        return self.plug.answer(message)


class Pair:
    """A source, a destination, and the moves between them."""

    def __init__(self, model: str, dtype: str, key_file: str) -> None:
        self.key = read_peer_key(Path(key_file)).key
        self.a = Side(model, dtype, key_file)
        self.b = Side(model, dtype, key_file)
        self.random = random.Random(1)
        self._references: dict[str, Any] = {}

    def prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(256) for _ in range(tokens)]

    def undisturbed(self, prompt: list[int], params: SamplingParams) -> Any:
        """The answer of an engine that is left alone, with nothing in its prefix cache."""
        self.forget()
        self.a.submit("undisturbed", prompt, params)
        answer = self.a.run("undisturbed")
        self.forget()
        return answer

    def forget(self) -> None:
        for side in (self.a, self.b):
            side.scheduler.reset_prefix_cache()

    def begin(self, name: str, source: Side, destination: Side) -> str:
        """Prepared, and the copy begun. The migration's id."""
        migration = secrets.token_hex(16)
        request = source.ask(ListRequests(request=name)).requests[0]
        prepared = destination.ask(
            Prepare(
                migration=migration,
                epoch=EPOCH,
                fingerprint=source.ask(Capabilities()).fingerprint,
                tokens=request.prompt_tokens + request.output_tokens,
                most_tokens=request.most_tokens,
                features=request.features,
                prompt_digest=request.prompt_digest,
            )
        )
        assert isinstance(prepared, Prepared), prepared
        asked = Precopy(migration=migration, epoch=EPOCH, request=name, destination=prepared.destination)
        started = source.ask(asked)
        assert isinstance(started, SourceStatus), started
        assert source.ask(asked).phase == started.phase, "said twice it is answered by how things stand"
        return migration

    def status(self, side: Side, migration: str) -> Any:
        return side.ask(Status(migration=migration, epoch=EPOCH))

    def parked(self, destination: Side, migration: str) -> bool:
        """Steps the destination once. Whether the request waits there, or the migration is over."""
        destination.step()
        state = self.status(destination, migration)
        return bool(state.parked or state.phase != "reserved")

    def copy(self, source: Side, migration: str) -> Any:
        """Steps the source until it has caught up, or is over. Its state.

        The governor is always a new one, and what was handed to the channel is waited for: on a busy machine the
        request would else have ended before its copy.
        """
        for _ in range(2000):
            state = self.status(source, migration)
            if state.caught_up or state.phase != "copying":
                return state
            source.plug._steps = StepTimes(time.monotonic)
            source.step()
            self._wait_for_more_than(state.acknowledged_blocks, source, migration)
        raise TimeoutError("the copy does not catch up")

    def _wait_for_more_than(self, blocks: int, source: Side, migration: str) -> None:
        ends = time.monotonic() + ACKNOWLEDGED_S
        while time.monotonic() < ends:
            state = self.status(source, migration)
            if state.phase != "copying" or state.acknowledged_blocks > blocks or state.sent_blocks <= blocks:
                return
            time.sleep(0.001)

    def freeze(self, source: Side, name: str, migration: str) -> Any:
        source.ask(Freeze(migration=migration, epoch=EPOCH))
        while not source.ended(name):
            source.step()
            self.status(self.b if source is self.a else self.a, migration)
        return self.status(source, migration)

    def move(
        self, name: str, source: Side, destination: Side, prompt: list[int], params: SamplingParams, at: int
    ) -> str:
        """Moves a request that runs, once it has `at` tokens. The name that it has at its destination."""
        while source.tokens(name) < at and not source.ended(name):
            source.step()
        if source.ended(name):
            return name
        migration = self.begin(name, source, destination)
        self.copy(source, migration)
        moved = f"llmfleet-{migration}"
        destination.submit(moved, prompt, params)
        # A grammar may still be compiled.
        wait(lambda: self.parked(destination, migration), "the request is not parked")
        held = self.freeze(source, name, migration)
        if held.phase != "held":
            destination.ask(Cancel(migration=migration, epoch=EPOCH, reason=Reason.FINISHED))
            destination.step()
            destination.outputs.pop(moved, None)
            return name
        wait(lambda: self.status(source, migration).tail == "taken", "the word to begin is not taken")
        destination.step()
        source.ask(Release(migration=migration, epoch=EPOCH))
        source.outputs.pop(name)
        taken = self.status(destination, migration)
        assert taken.phase == "running", taken
        assert taken.computed_tokens == 0, taken
        return moved

    def leaks(self) -> list[str]:
        """Blocks or migrations that are still somewhere, after the last words have come."""
        ends = time.monotonic() + LEASE_S / 2
        while wrong := self._leaks():
            if time.monotonic() > ends:
                break
            time.sleep(0.01)
        return wrong

    def _leaks(self) -> list[str]:
        wrong = []
        for label, side in (("source", self.a), ("destination", self.b)):
            for _ in range(3):
                side.step()
            load = side.ask(GetLoad())
            if side.free_blocks != side.all_blocks:
                wrong.append(f"{label}: {side.free_blocks} blocks free of {side.all_blocks} before")
            if load.blocks_reserved or load.blocks_held or load.incoming or load.outgoing:
                wrong.append(f"{label}: {load}")
            side.outputs.clear()
        return wrong


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(condition: Callable[[], bool], otherwise: str, limit_s: float = 5.0) -> None:
    ends = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError(otherwise)
        time.sleep(0.002)


def differences(answer: Any, reference: Any) -> list[str]:
    """What is other than in the undisturbed answer."""
    wrong = []
    for field in ("token_ids", "text", "finish_reason", "stop_reason"):
        found, expected = getattr(answer, field), getattr(reference, field)
        if found != expected:
            wrong.append(f"{field}: {found!r} instead of {expected!r}")
    if reference.logprobs is not None:
        found, expected = ([{k: v.logprob for k, v in d.items()} for d in a.logprobs] for a in (answer, reference))
        if found != expected:
            wrong.append("logprobs differ")
    return wrong


GREEDY = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)


@dataclass(frozen=True)
class Started:
    """A request, "one", that runs at the source and is being copied."""

    prompt: list[int]
    reference: Any
    """What it gets where it is left alone."""
    migration: str

    @property
    def moved(self) -> str:
        """Its name at the destination."""
        return f"llmfleet-{self.migration}"


def started(pair: Pair, params: SamplingParams = GREEDY, context: int = 300, at: int = 5) -> Started:
    """It has `at` tokens when its copy begins."""
    prompt = pair.prompt(context)
    reference = pair.undisturbed(prompt, params)
    pair.a.submit("one", prompt, params)
    while pair.a.tokens("one") < at:
        pair.a.step()
    return Started(prompt, reference, pair.begin("one", pair.a, pair.b))


def parked_without_a_source(pair: Pair, params: SamplingParams) -> tuple[str, str]:
    """A request that waits at the destination for the tokens of a journal: its migration, and its name."""
    migration = secrets.token_hex(16)
    fingerprint = pair.a.ask(Capabilities()).fingerprint
    about: dict[str, Any] = {"migration": migration, "epoch": EPOCH}
    prepare = Prepare(**about, fingerprint=fingerprint, tokens=0, most_tokens=100 + ANSWER_TOKENS, features=[])
    assert isinstance(pair.b.ask(prepare), Prepared)
    pair.b.submit(f"llmfleet-{migration}", pair.prompt(100), params)
    assert pair.status(pair.b, migration).parked
    return migration, f"llmfleet-{migration}"
