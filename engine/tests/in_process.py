"""Two real vLLM engines in one process, stepped by hand: scenarios of `test_two_engines.py`. Runs inside the engine
environment.

    python in_process.py MODEL DTYPE SCENARIO...      one line of JSON per scenario: {"scenario", "wrong": [...]}

With the scheduler's thread in the test's hands every order of steps and messages can be had at will; data channels and
control ports are real sockets and threads. After each scenario both engines must have all their blocks back.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from llmfleet.api import Feature, Reason
from llmfleet.api.migration_messages import (
    Cancel,
    Capabilities,
    Freeze,
    GetLoad,
    ListRequests,
    Precopy,
    Prepare,
    Prepared,
    Refused,
    Release,
    Resume,
    SourceStatus,
    Status,
)  # fmt: skip
from llmfleet.engine import vllm_internals
from llmfleet.migration.control import Subscription, connect
from llmfleet.migration.handshake import read_peer_key

LEASE_S = 1.0
KV_BYTES = 128 * 2**20
EPOCH = 2
TENSOR_PARALLEL = int(os.environ.get("LLMFLEET_TEST_TP", "1"))
ANSWER_TOKENS = 100
CONTEXTS = (20, 31, 300, 1000) if os.environ.get("LLMFLEET_TEST_FULL") else (20, 300)
CUTS = (1, 12, 40) if os.environ.get("LLMFLEET_TEST_FULL") else (1, 40)

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
            max_model_len=4096,
            max_num_seqs=64,
            max_num_batched_tokens=512,
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
                    "incoming": 128,
                    "outgoing": 128,
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

    def copy(self, source: Side, migration: str) -> Any:
        """Steps the source until it has caught up, or is over. Its state."""
        for _ in range(2000):
            state = self.status(source, migration)
            if state.caught_up or state.phase != "copying":
                return state
            source.step()
        raise TimeoutError("the copy does not catch up")

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


def moved_at(pair: Pair, params: SamplingParams, contexts: Iterable[int], cuts: Iterable[int]) -> list[str]:
    """Moves one request per context and cut; what differs from undisturbed ones."""
    wrong = []
    for context in contexts:
        prompt = pair.prompt(context)
        reference = pair.undisturbed(prompt, params)
        for cut in cuts:
            pair.forget()
            name = f"moving-{secrets.token_hex(4)}"
            pair.a.submit(name, prompt, params)
            moved = pair.move(name, pair.a, pair.b, prompt, params, cut)
            side = pair.a if moved == name else pair.b
            wrong += [f"{context} + {cut}: {what}" for what in differences(side.run(moved), reference)]
            if side is pair.a and cut < len(reference.token_ids) - 60:
                wrong.append(f"{context} + {cut}: it did not move")
    return wrong


def exact(name: str, **params: Any) -> None:
    def run(pair: Pair) -> list[str]:
        chosen: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "temperature": 0.0} | params
        return moved_at(pair, SamplingParams(**chosen), CONTEXTS, CUTS)

    SCENARIOS[f"exact_{name}"] = run


exact("greedy")
exact("seeded", temperature=1.0, seed=7)
exact("top_k_top_p", temperature=0.9, seed=11, top_k=20, top_p=0.9)
exact("min_p", temperature=1.2, seed=3, min_p=0.05)
exact("frequency_penalty", frequency_penalty=0.7)
exact("presence_penalty", presence_penalty=0.9)
exact("repetition_penalty", repetition_penalty=1.3)
exact(
    "all_penalties_seeded", temperature=1.0, seed=5, frequency_penalty=0.3, presence_penalty=0.4, repetition_penalty=1.1
)
exact("min_tokens", min_tokens=60, stop_token_ids=list(range(30, 120, 3)))
exact("logit_bias", logit_bias={40: 4.0, 41: -100.0})
exact("allowed_tokens", allowed_token_ids=list(range(33, 90)))
exact("bad_words", temperature=1.0, seed=9, bad_words=["e", "th"])
exact("logprobs", logprobs=4)
exact("logprobs_seeded", temperature=1.0, seed=2, logprobs=0)
exact("stop_string", stop=["e", "t"], include_stop_str_in_output=True, min_tokens=45)
exact("regex", structured_outputs=StructuredOutputsParams(regex=r'\{"a":"[a-f]{40}","b":[0-9]{30},"c":(true|false)\}'))
exact(
    "json",
    temperature=1.0,
    seed=4,
    structured_outputs=StructuredOutputsParams(
        json={
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 50, "maxLength": 60}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)

GREEDY = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)


@scenario
def ten_hops(pair: Pair) -> Iterable[str]:
    """One request goes back and forth."""
    prompt, params = pair.prompt(200), SamplingParams(max_tokens=400, temperature=1.0, seed=13, presence_penalty=0.5)
    reference = pair.undisturbed(prompt, params)
    pair.a.submit("hopping", prompt, params)
    name, source, destination = "hopping", pair.a, pair.b
    for hop in range(10):
        name = pair.move(name, source, destination, prompt, params, source.tokens(name) + 3)
        source, destination = destination, source
        if source.ended(name):
            yield f"it had ended before hop {hop + 1}"
    yield from differences(source.run(name), reference)


@scenario
def prefill_here_and_decode_there(pair: Pair) -> Iterable[str]:
    """Frozen before the prompt is computed: cut at the first token, blocks copied as chunks of the prompt are done."""
    for params in (GREEDY, SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, presence_penalty=0.5)):
        prompt = pair.prompt(1500)
        reference = pair.undisturbed(prompt, params)
        pair.a.submit("one", prompt, params)
        migration = pair.begin("one", pair.a, pair.b)
        moved = f"llmfleet-{migration}"
        pair.b.submit(moved, prompt, params)
        held = pair.freeze(pair.a, "one", migration)
        pair.a.outputs.pop("one")
        if (held.phase, held.output_tokens) != ("held", 1):
            yield f"source: {held}"
        yield from differences(pair.b.run(moved), reference)
        taken = pair.status(pair.b, migration)
        if taken.computed_tokens != 0:
            yield f"destination: {taken}"
        pair.a.ask(Release(migration=migration, epoch=EPOCH))


@scenario
def unseeded_sampling_goes_on(pair: Pair) -> Iterable[str]:
    """What was said is kept, and it goes on to its full length."""
    prompt, params = pair.prompt(100), SamplingParams(max_tokens=ANSWER_TOKENS, temperature=1.0)
    pair.a.submit("free", prompt, params)
    while pair.a.tokens("free") < 20:
        pair.a.step()
    begun = list(pair.a.outputs["free"].outputs[0].token_ids)
    moved = pair.move("free", pair.a, pair.b, prompt, params, 20)
    answer = pair.b.run(moved)
    if list(answer.token_ids[:20]) != begun:
        yield "tokens that were delivered changed"
    if (len(answer.token_ids), answer.finish_reason) != (ANSWER_TOKENS, "length"):
        yield f"{len(answer.token_ids)} tokens, {answer.finish_reason}"


def started(pair: Pair, params: SamplingParams, context: int = 300, at: int = 5) -> tuple[list[int], str]:
    """A request that runs at the source and is being copied: its prompt, and the migration."""
    prompt = pair.prompt(context)
    pair.a.submit("one", prompt, params)
    while pair.a.tokens("one") < at:
        pair.a.step()
    return prompt, pair.begin("one", pair.a, pair.b)


@scenario
def natural_end_wins_over_the_copy(pair: Pair) -> Iterable[str]:
    _, migration = started(pair, SamplingParams(max_tokens=8, temperature=0.0))
    if pair.a.run("one").finish_reason != "length":
        yield "it did not end by itself"
    if pair.status(pair.a, migration).phase != "finished":
        yield f"source: {pair.status(pair.a, migration)}"
    wait(lambda: pair.status(pair.b, migration).phase == "cancelled", "the destination was not told")


@scenario
def an_end_at_the_very_cut_is_an_end(pair: Pair) -> Iterable[str]:
    """The cap that the cut lowers is where the answer ends anyway."""
    _, migration = started(pair, SamplingParams(max_tokens=8, temperature=0.0), at=7)
    state = pair.freeze(pair.a, "one", migration)
    if state.phase != "finished":
        yield f"source: {state}"
    if len(pair.a.run("one").token_ids) != 8:
        yield "the answer has another length"


@scenario
def a_stop_token_at_the_cut_is_an_end(pair: Pair) -> Iterable[str]:
    prompt = pair.prompt(300)
    reference = pair.undisturbed(prompt, GREEDY)
    last = reference.token_ids[12]
    if last in reference.token_ids[:12]:
        last = next(t for i, t in enumerate(reference.token_ids) if t not in reference.token_ids[:i] and i > 6)
    at = list(reference.token_ids).index(last)
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, stop_token_ids=[last])
    pair.a.submit("one", prompt, params)
    while pair.a.tokens("one") < at:
        pair.a.step()
    migration = pair.begin("one", pair.a, pair.b)
    state = pair.freeze(pair.a, "one", migration)
    answer = pair.a.run("one")
    if (state.phase, answer.finish_reason, answer.stop_reason) != ("finished", "stop", last):
        yield f"source: {state}, {answer.finish_reason}"


@scenario
def an_abort_wins_over_the_copy(pair: Pair) -> Iterable[str]:
    _, migration = started(pair, GREEDY)
    pair.a.engine.abort_request(["one"])
    pair.a.step()
    if pair.status(pair.a, migration).phase != "finished":
        yield f"source: {pair.status(pair.a, migration)}"
    wait(lambda: pair.status(pair.b, migration).phase == "cancelled", "the destination was not told")


@scenario
def a_preemption_wins_over_the_copy(pair: Pair) -> Iterable[str]:
    prompt = pair.prompt(300)
    reference = pair.undisturbed(prompt, GREEDY)
    pair.a.submit("one", prompt, GREEDY)
    while pair.a.tokens("one") < 5:
        pair.a.step()
    migration = pair.begin("one", pair.a, pair.b)
    pair.a.step()
    pair.a.scheduler.reset_prefix_cache(reset_running_requests=True)
    yield from differences(pair.a.run("one"), reference)
    if pair.status(pair.a, migration).phase != "cancelled":
        yield f"source: {pair.status(pair.a, migration)}"


@scenario
def a_preemption_after_the_freeze_only_delays_the_cut(pair: Pair) -> Iterable[str]:
    prompt = pair.prompt(300)
    reference = pair.undisturbed(prompt, GREEDY)
    pair.a.submit("one", prompt, GREEDY)
    while pair.a.tokens("one") < 5:
        pair.a.step()
    migration = pair.begin("one", pair.a, pair.b)
    pair.copy(pair.a, migration)
    moved = f"llmfleet-{migration}"
    pair.b.submit(moved, prompt, GREEDY)
    pair.a.ask(Freeze(migration=migration, epoch=EPOCH))
    pair.a.scheduler.reset_prefix_cache(reset_running_requests=True)
    held = pair.freeze(pair.a, "one", migration)
    if held.phase != "held":
        yield f"source: {held}"
    yield from differences(pair.b.run(moved), reference)
    pair.a.ask(Release(migration=migration, epoch=EPOCH))


@scenario
def a_cancelled_copy_leaves_the_request_alone(pair: Pair) -> Iterable[str]:
    prompt = pair.prompt(300)
    reference = pair.undisturbed(prompt, GREEDY)
    pair.a.submit("one", prompt, GREEDY)
    while pair.a.tokens("one") < 5:
        pair.a.step()
    migration = pair.begin("one", pair.a, pair.b)
    pair.copy(pair.a, migration)
    pair.b.submit(f"llmfleet-{migration}", prompt, GREEDY)
    pair.b.step()
    for side in (pair.a, pair.b):
        side.ask(Cancel(migration=migration, epoch=EPOCH, reason=Reason.CANCELLED))
    yield from differences(pair.a.run("one"), reference)
    refused = pair.b.run(f"llmfleet-{migration}")
    if refused.finish_reason != "error" or refused.token_ids:
        yield f"the parked request: {refused}"


@scenario
def leases_end_what_nobody_asks_about(pair: Pair) -> Iterable[str]:
    prompt = pair.prompt(300)
    reference = pair.undisturbed(prompt, GREEDY)
    pair.a.submit("one", prompt, GREEDY)
    while pair.a.tokens("one") < 5:
        pair.a.step()
    migration = pair.begin("one", pair.a, pair.b)
    pair.a.step()
    load = pair.b.ask(GetLoad())
    if not load.blocks_reserved:
        yield "nothing was reserved"
    time.sleep(2.5 * LEASE_S)
    for side in (pair.a, pair.b):
        load = side.ask(GetLoad())
        if load.blocks_reserved or load.blocks_held or load.incoming or load.outgoing:
            yield f"after the lease: {load}"
    yield from differences(pair.a.run("one"), reference)
    late = f"llmfleet-{migration}"
    pair.b.submit(late, prompt, GREEDY)
    if pair.b.run(late).finish_reason != "error":
        yield "a request that comes too late runs from its first token"


@scenario
def a_hold_ends_with_its_lease(pair: Pair) -> Iterable[str]:
    """The coordinator died after the cut: the destination runs, the source lets go."""
    prompt = pair.prompt(300)
    reference = pair.undisturbed(prompt, GREEDY)
    pair.a.submit("one", prompt, GREEDY)
    while pair.a.tokens("one") < 5:
        pair.a.step()
    migration = pair.begin("one", pair.a, pair.b)
    pair.copy(pair.a, migration)
    pair.b.submit(f"llmfleet-{migration}", prompt, GREEDY)
    pair.freeze(pair.a, "one", migration)
    yield from differences(pair.b.run(f"llmfleet-{migration}"), reference)
    wait(lambda: not pair.a.ask(GetLoad()).blocks_held, "the hold does not end", 3 * LEASE_S)


@scenario
def a_lost_source_is_resumed_from_its_blocks(pair: Pair) -> Iterable[str]:
    """Tokens from the journal, the blocks that had come: the rest is computed."""
    letters = StructuredOutputsParams(regex="[a-z]{90}")
    for params in (
        GREEDY,
        SamplingParams(max_tokens=ANSWER_TOKENS, temperature=1.0, seed=21, frequency_penalty=0.5),
        SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, structured_outputs=letters),
    ):
        prompt = pair.prompt(300)
        reference = pair.undisturbed(prompt, params)
        pair.a.submit("one", prompt, params)
        while pair.a.tokens("one") < 5:
            pair.a.step()
        migration = pair.begin("one", pair.a, pair.b)
        pair.copy(pair.a, migration)
        delivered = list(pair.a.outputs["one"].outputs[0].token_ids)
        # Channels that break: nothing more is said to the destination.
        for address in pair.b.ask(Capabilities()).data:
            pair.a.plug.lost(address)
        pair.a.engine.abort_request(["one"])
        pair.a.outputs.pop("one")
        moved = f"llmfleet-{migration}"
        pair.b.submit(moved, prompt, params)
        while not pair.status(pair.b, migration).parked:
            pair.b.step()
        blocks = pair.status(pair.b, migration).blocks
        pair.b.ask(Resume(migration=migration, epoch=EPOCH, tokens=delivered))
        yield from differences(pair.b.run(moved), reference)
        computed = pair.status(pair.b, migration).computed_tokens
        if not blocks or computed != len(prompt) + len(delivered) - 1 - 32 * blocks:
            yield f"{computed} tokens were computed, {blocks} blocks had come"


@scenario
def a_complete_answer_ends_at_once(pair: Pair) -> Iterable[str]:
    """The source was lost and nobody knows that it had finished."""
    prompt = pair.prompt(60)
    reference = pair.undisturbed(prompt, SamplingParams(max_tokens=30, temperature=0.0))
    migration = secrets.token_hex(16)
    fingerprint = pair.a.ask(Capabilities()).fingerprint
    ask = Prepare(migration=migration, epoch=EPOCH, fingerprint=fingerprint, tokens=0, most_tokens=90, features=[])
    if not isinstance(pair.b.ask(ask), Prepared):
        yield "a resume without a source was refused"
    moved = f"llmfleet-{migration}"
    pair.b.submit(moved, prompt, SamplingParams(max_tokens=30, temperature=0.0))
    pair.b.step()
    pair.b.ask(Resume(migration=migration, epoch=EPOCH, tokens=list(reference.token_ids)))
    yield from differences(pair.b.run(moved), reference)


@scenario
def what_cannot_be_is_refused(pair: Pair) -> Iterable[str]:
    pair.a.submit("one", pair.prompt(100), GREEDY)
    pair.a.submit("two", pair.prompt(100), SamplingParams(max_tokens=ANSWER_TOKENS, prompt_logprobs=1))
    while pair.a.tokens("one") < 3:
        pair.a.step()
    fingerprint = pair.a.ask(Capabilities()).fingerprint
    here, there = pair.a.ask(Capabilities()), pair.b.ask(Capabilities())

    def expect(answer: Any, reason: Reason, field: str = "") -> Iterable[str]:
        if not isinstance(answer, Refused) or answer.reason != reason or (field and answer.field != field):
            yield f"{answer!r} instead of {reason} {field}"

    def prepare(**changes: Any) -> Any:
        given: dict[str, Any] = {
            "tokens": 100,
            "most_tokens": 200,
            "features": [],
            "fingerprint": fingerprint,
        } | changes
        return pair.b.ask(Prepare(migration=secrets.token_hex(16), epoch=EPOCH, **given))

    def precopy(request: str, capabilities: Any, migration: str | None = None, epoch: int = EPOCH) -> Any:
        to = {"instance": capabilities.instance, "data": capabilities.data}
        return pair.a.ask(
            Precopy.model_validate(
                {"migration": migration or secrets.token_hex(16), "epoch": epoch, "request": request, "destination": to}
            )
        )

    for field, value in (
        ("model_hash", "x"),
        ("block_size", 16),
        ("dtype", "x"),
        ("layout", "x"),
        ("vllm_version", "0.1"),
    ):
        yield from expect(
            prepare(fingerprint=fingerprint.model_copy(update={field: value})), Reason.INCOMPATIBLE, field
        )
    yield from expect(prepare(features=[Feature.MULTIMODAL]), Reason.UNSUPPORTED, "multimodal")
    yield from expect(prepare(tokens=4000, most_tokens=5000), Reason.TOO_LARGE, "most_tokens")
    for _ in range(6):
        last = prepare(tokens=3900, most_tokens=4096)
    yield from expect(last, Reason.NO_ROOM)
    yield from expect(precopy("nobody", there), Reason.UNKNOWN_REQUEST)
    yield from expect(precopy("one", here), Reason.SAME_ENGINE)
    yield from expect(precopy("two", there), Reason.UNSUPPORTED, "prompt_logprobs")
    migration = pair.begin("one", pair.a, pair.b)
    yield from expect(precopy("one", there), Reason.BUSY)
    yield from expect(precopy("one", there, migration, EPOCH + 1), Reason.STALE_EPOCH)
    for side in (pair.a, pair.b):
        yield from expect(side.ask(Status(migration=migration, epoch=EPOCH + 1)), Reason.STALE_EPOCH)
        yield from expect(side.ask(Status(migration="0" * 32, epoch=EPOCH)), Reason.UNKNOWN_REQUEST)
        side.ask(Cancel(migration=migration, epoch=EPOCH, reason=Reason.CANCELLED))
    pair.a.run("one")
    pair.a.run("two")
    time.sleep(1.5 * LEASE_S)


@scenario
def another_prompt_is_never_continued(pair: Pair) -> Iterable[str]:
    """The destination makes other tokens of the request's text: known before the cut."""
    prompt = pair.prompt(100)
    pair.a.submit("one", prompt, GREEDY)
    while pair.a.tokens("one") < 5:
        pair.a.step()
    migration = pair.begin("one", pair.a, pair.b)
    pair.copy(pair.a, migration)
    other = f"llmfleet-{migration}"
    pair.b.submit(other, [*prompt[:-1], prompt[-1] ^ 1], GREEDY)
    if pair.b.run(other).finish_reason != "error":
        yield "another request is parked"
    refused = pair.status(pair.b, migration)
    if (refused.phase, refused.reason) != ("cancelled", Reason.UNKNOWN_REQUEST):
        yield f"destination: {refused}"
    pair.a.ask(Cancel(migration=migration, epoch=EPOCH, reason=Reason.CANCELLED))
    if len(pair.a.run("one").token_ids) != ANSWER_TOKENS:
        yield "the request did not stay"


@scenario
def a_neighbour_that_wants_more_log_probabilities_changes_nothing(pair: Pair) -> Iterable[str]:
    """A step gives every request of the batch as many columns as the one that wants most."""
    prompt, params = pair.prompt(100), SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, logprobs=1)
    reference = pair.undisturbed(prompt, params)
    wants_more = SamplingParams(max_tokens=12, temperature=0.0, logprobs=5)
    pair.a.submit("one", prompt, params)
    while pair.a.tokens("one") < 5:
        pair.a.step()
    pair.a.submit("neighbour", pair.prompt(50), wants_more)
    pair.b.submit("neighbour", pair.prompt(50), wants_more)
    moved = pair.move("one", pair.a, pair.b, prompt, params, 30)
    answer = pair.b.run(moved)
    if answer.token_ids != reference.token_ids or len(answer.logprobs) != len(answer.token_ids):
        yield f"{len(answer.logprobs)} log probabilities of {answer.token_ids}; expected {reference.token_ids}"
    pair.a.run("neighbour")
    pair.b.run("neighbour")


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


@scenario
def tokens_that_cannot_be_do_not_end_the_engine(pair: Pair) -> Iterable[str]:
    for tokens in ([10**9], [1] * (ANSWER_TOKENS + 1)):
        migration, name = parked_without_a_source(pair, GREEDY)
        pair.b.ask(Resume(migration=migration, epoch=EPOCH, tokens=tokens))
        if pair.b.run(name).finish_reason != "error":
            yield f"{len(tokens)} tokens up to {max(tokens)} were taken"
    pair.b.submit("another", pair.prompt(50), GREEDY)
    if len(pair.b.run("another").token_ids) != ANSWER_TOKENS:
        yield "the engine does not go on"


@scenario
def a_request_that_is_aborted_just_before_it_begins_does_not_begin(pair: Pair) -> Iterable[str]:
    migration, name = parked_without_a_source(pair, GREEDY)
    if pair.b.ask(Resume(migration=migration, epoch=EPOCH, tokens=[1, 2, 3])).phase != "running":
        yield "it was not let in"
    pair.b.engine.abort_request([name])
    for _ in range(3):
        pair.b.step()
    if pair.b.ask(GetLoad()).running or pair.b.ask(GetLoad()).waiting:
        yield "it runs for nobody"


@scenario
def of_two_requests_of_one_name_neither_moves(pair: Pair) -> Iterable[str]:
    """Clients choose names: who asks for one would get somebody else's."""
    for _ in range(2):
        pair.a.submit("twin", pair.prompt(50), GREEDY)
    pair.a.step()
    answer = pair.a.ask(ListRequests(request="twin"))
    if getattr(answer, "reason", None) != Reason.UNKNOWN_REQUEST:
        yield f"{answer}"
    pair.a.submit("x" * 300, pair.prompt(50), GREEDY)
    pair.a.step()
    if len(pair.a.ask(ListRequests()).requests) != 2:
        yield "a name that no message can carry hides the others"
    pair.a.engine.abort_request(["twin", "x" * 300])
    pair.a.step()


@scenario
def a_hundred_at_once(pair: Pair) -> Iterable[str]:
    """All are begun before the first is cut."""
    count = 100
    prompts = [pair.prompt(40) for _ in range(count)]
    params = SamplingParams(max_tokens=60, temperature=0.0)
    references = [pair.undisturbed(prompt, params) for prompt in prompts[:10]]
    for i, prompt in enumerate(prompts):
        pair.a.submit(f"many-{i}-x", prompt, params)
    while not all(pair.a.tokens(f"many-{i}-x") for i in range(0, 64, 4)):
        pair.a.step()
    migrations = {i: pair.begin(f"many-{i}-x", pair.a, pair.b) for i in range(count) if not pair.a.ended(f"many-{i}-x")}
    for i, migration in migrations.items():
        pair.b.submit(f"llmfleet-{migration}", prompts[i], params)
    frozen: set[int] = set()
    ends = time.monotonic() + 60
    outcomes: dict[int, str] = {}
    while len(outcomes) < len(migrations):
        if time.monotonic() > ends:
            yield f"no outcome for {sorted(set(migrations) - set(outcomes))}"
            break
        pair.a.step()
        pair.b.step()
        for i, migration in migrations.items():
            state = pair.status(pair.a, migration)
            pair.status(pair.b, migration)
            if state.caught_up and i not in frozen:
                frozen.add(i)
                pair.a.ask(Freeze(migration=migration, epoch=EPOCH))
            if state.phase in ("finished", "cancelled"):
                outcomes[i] = state.phase
            elif state.phase == "held" and pair.status(pair.b, migration).phase == "running":
                pair.a.ask(Release(migration=migration, epoch=EPOCH))
                outcomes[i] = "moved"
    moved = [i for i, outcome in outcomes.items() if outcome == "moved"]
    if len(moved) < count // 2:
        yield f"only {len(moved)} moved: {outcomes}"
    for i in moved:
        answer = pair.b.run(f"llmfleet-{migrations[i]}")
        if i < len(references) and list(answer.token_ids) != list(references[i].token_ids):
            yield f"{i}: other tokens"
        if len(answer.token_ids) != 60:
            yield f"{i}: {len(answer.token_ids)} tokens"
    while pair.a.engine.has_unfinished_requests():
        pair.a.step()


@scenario
def the_journal_tells_every_token_at_both_engines(pair: Pair) -> Iterable[str]:
    """Over the control ports, to a subscriber that asked before the request began, and to one that came late."""
    prompt = pair.prompt(100)
    told: dict[str, dict[str, list[int]]] = {"early": {}, "late": {}}
    subscribed, stop = threading.Event(), threading.Event()
    moved = threading.Event()
    names: list[str] = []

    async def listen(label: str, side: Side, name: str) -> None:
        connection = connect(side.control, pair.key)
        try:
            subscription = await connection.subscribe([name], 5.0)
            assert isinstance(subscription, Subscription), subscription
            subscribed.set()
            async for event in subscription:
                for entry in event.entries:
                    tokens = told[label].setdefault(entry.request, [])
                    assert entry.index == len(tokens), f"{label}: {entry.index} after {len(tokens)} tokens"
                    tokens += entry.ids
        finally:
            await connection.close()

    async def both() -> None:
        tasks = [asyncio.create_task(listen("early", pair.a, "one"))]
        await asyncio.to_thread(moved.wait)
        tasks.append(asyncio.create_task(listen("late", pair.b, names[0])))
        await asyncio.to_thread(stop.wait)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(both(),))
    thread.start()
    subscribed.wait(5)
    subscribed.clear()
    pair.a.submit("one", prompt, GREEDY)
    names.append(pair.move("one", pair.a, pair.b, prompt, GREEDY, 10))
    moved.set()
    subscribed.wait(5)
    answer = list(pair.b.run(names[0]).token_ids)
    try:
        wait(lambda: told["late"].get(names[0]) == answer, "the destination's journal is not the answer")
        early = told["early"]["one"]
        if len(early) < 10 or early != answer[: len(early)]:
            yield f"the source's journal has {len(early)} tokens"
    finally:
        stop.set()
        thread.join()


@scenario
def a_long_poll_is_answered_by_the_change_it_waits_for(pair: Pair) -> Iterable[str]:
    _, migration = started(pair, GREEDY)
    seen = pair.status(pair.b, migration).revision
    answers: list[Any] = []

    async def poll() -> None:
        connection = connect(pair.b.control, pair.key)
        try:
            waiting = Status(migration=migration, epoch=EPOCH, seen=seen, wait_s=5.0)
            answers.append(await connection.ask(waiting, 6.0))
        finally:
            await connection.close()

    thread = threading.Thread(target=asyncio.run, args=(poll(),))
    thread.start()
    time.sleep(0.2)
    if answers:
        yield f"answered although nothing changed: {answers}"
    begun = time.monotonic()
    for side in (pair.a, pair.b):
        side.ask(Cancel(migration=migration, epoch=EPOCH, reason=Reason.CANCELLED))
    thread.join()
    if time.monotonic() - begun > 2 or answers[0].phase != "cancelled":
        yield f"{answers} after {time.monotonic() - begun:.1f} s"
    pair.a.run("one")


@scenario
def what_is_used_of_vllm_is_there_and_what_is_not_is_named(pair: Pair) -> Iterable[str]:
    for side in (pair.a, pair.b):
        if gone := vllm_internals.missing_in_scheduler(side.scheduler):
            yield f"{gone}"
    bare = SimpleNamespace(requests={}, kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace(touch=None)))
    named = " ".join(vllm_internals.missing_in_scheduler(bare))
    for path, purpose in (
        ("kv_cache_manager.block_pool.get_new_blocks", "reserving blocks"), ("running", "counting"),
        ("kv_cache_manager.coordinator.single_type_managers", "received blocks"),
    ):  # fmt: skip
        if path not in named or purpose not in named:
            yield f"{path} is not missed: {named}"
    if "block_pool.touch" in named or "SimpleNamespace.requests" in named:
        yield f"missed though it is there: {named}"
    if "kv_caches" not in " ".join(vllm_internals.missing_in_runner(bare)):
        yield "the model runner's KV caches are not missed"


@scenario
def what_happened_is_counted(pair: Pair) -> Iterable[str]:
    def figure(side: Side, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{side.metrics_port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"llmfleet_migration_{name}"))

    names = (
        ("a", 'outgoing_total{outcome="released_taken"'), ("b", 'incoming_total{outcome="running"'),
        ("a", "hand_over_seconds_count"), ("a", "sent_bytes_total"), ("b", "received_bytes_total"),
    )  # fmt: skip
    before = [figure(getattr(pair, side), name) for side, name in names]
    prompt = pair.prompt(200)
    pair.a.submit("one", prompt, GREEDY)
    pair.b.run(pair.move("one", pair.a, pair.b, prompt, GREEDY, 10))
    more = [figure(getattr(pair, side), name) - was for (side, name), was in zip(names, before, strict=True)]
    if more[:3] != [1, 1, 1] or more[3] != more[4] or more[3] < 200 * 2048:
        yield f"{dict(zip(names, more, strict=True))}"


def main() -> None:
    model, dtype, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        key_file = Path(directory) / "peer-key"
        key_file.write_text(secrets.token_hex(32))
        key_file.chmod(0o600)
        pair = Pair(model, dtype, str(key_file))
        print(json.dumps({"started": True}), flush=True)
        for name in names or SCENARIOS:
            begun = time.monotonic()
            try:
                wrong = [*SCENARIOS[name](pair)]
                wrong += pair.leaks()
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
            print(json.dumps({"scenario": name, "wrong": wrong, "seconds": time.monotonic() - begun}), flush=True)
    # vLLM's own threads outlive the interpreter's end and crash in it.
    os._exit(0)


if __name__ == "__main__":
    main()
