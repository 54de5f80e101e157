"""Many at once; and what engines tell of themselves: journal, long polls, metrics, what they miss of vLLM."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams

from e2e.migration.stepped.engines import (
    EPOCH,
    GREEDY,
    Pair,
    Side,
    scenario,
    started,
    wait,
)
from llmfleet.api import Reason
from llmfleet.api.migration_messages import Cancel, Freeze, Release, Status
from llmfleet.engine import vllm_internals
from llmfleet.migration.control import Subscription, connect


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
    migration = started(pair).migration
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
    bare = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace(touch=None)))
    named = " ".join(vllm_internals.missing_in_scheduler(bare))
    for path, purpose in (
        ("kv_cache_manager.block_pool.get_new_blocks", "reserving blocks"), ("get_request_counts", "runs and waits"),
        ("kv_cache_manager.coordinator.single_type_managers", "received blocks"),
    ):  # fmt: skip
        if path not in named or purpose not in named:
            yield f"{path} is not missed: {named}"
    if "block_pool.touch" in named or "Request." in named:
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
    if (here := [figure(side, "requests ") for side in (pair.a, pair.b)]) != [1, 0]:
        yield f"requests of both engines before the move: {here}"
    pair.b.run(pair.move("one", pair.a, pair.b, prompt, GREEDY, 10))
    if (here := [figure(side, "requests ") for side in (pair.a, pair.b)]) != [0, 0]:
        yield f"requests of both engines at the end: {here}"
    more = [figure(getattr(pair, side), name) - was for (side, name), was in zip(names, before, strict=True)]
    if more[:3] != [1, 1, 1] or more[3] != more[4] or more[3] < 200 * 2048:
        yield f"{dict(zip(names, more, strict=True))}"
