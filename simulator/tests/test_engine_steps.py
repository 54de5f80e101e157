"""The engine model against a plain one that moves every token by itself, and against what paper and pencil give."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.simulator import Engine, EngineSpec, Job, StepTime
from llmfleet.simulator.engine import FOREVER_PS
from llmfleet.simulator.spec import PS_PER_MS, ps

STEP = StepTime(overhead_ms=3, weights_ms=5, token_ms=0.5, sequence_ms=0.25, context_token_ms=0.0625, pair_ms=0.03125)


def spec(**fields: object) -> EngineSpec:
    return EngineSpec.model_validate(
        {"step": STEP, "max_num_batched_tokens": 16, "max_num_seqs": 4, "kv_blocks": 100, "block_tokens": 4} | fields
    )


Request = tuple[int, int, int]
"""Arrival in picoseconds, input tokens, output tokens."""


@dataclass
class Slow:
    """A request of the plain engine."""

    name: int
    arrived_ps: int
    tokens: int
    left: int
    computed: int = 0
    blocks: int = 0
    first_ps: int = -1
    last_ps: int = -1
    preempted: int = 0
    decoding: bool = False
    transfer_ps: int | None = None
    """How long its KV cache takes to come; None: its prompt is computed here."""
    there_ps: int = -1


Transfers = list[int | None]
"""By request, how long its KV cache takes to come, in picoseconds."""


def slow_run(spec: EngineSpec, requests: list[Request], transfers: Transfers | None = None) -> tuple[list[Slow], int]:
    """One step after the other, one request after the other, every block counted where it is taken."""
    jobs = [Slow(number, at, inputs, outputs) for number, (at, inputs, outputs) in enumerate(requests)]
    for job, transfer_ps in zip(jobs, transfers or [], strict=False):
        job.transfer_ps = transfer_ps if job.tokens > 1 else None
    coming, waiting, running = list(jobs), list[Slow](), list[Slow]()
    receiving, received = list[Slow](), list[Slow]()
    now, free, step = 0, spec.kv_blocks, spec.step

    def blocks(tokens: int) -> int:
        return (tokens + spec.block_tokens - 1) // spec.block_tokens

    def receive() -> int:
        """Those at the head of the queue whose KV cache comes take their blocks; gives the blocks."""
        taken = 0
        while waiting and waiting[0].transfer_ps is not None and blocks(waiting[0].tokens) <= free - taken:
            job = waiting.pop(0)
            job.blocks = blocks(job.tokens)
            taken += job.blocks
            job.computed = job.tokens - 1
            job.there_ps = now + (job.transfer_ps or 0)
            receiving.append(job)
        return taken

    steps = 0
    while coming or waiting or running or receiving or received:
        while coming and coming[0].arrived_ps + ps(spec.frontend_ms) <= now:
            waiting.append(coming.pop(0))
        for job in sorted(receiving, key=lambda job: job.there_ps):
            if job.there_ps <= now:
                receiving.remove(job)
                received.append(job)
        budget, batch, preempted = spec.max_num_batched_tokens, list[tuple[Slow, int]](), False
        index = 0
        while index < len(running):
            job = running[index]
            count = min(job.tokens - job.computed, budget)
            while (needed := blocks(job.computed + count) - job.blocks) > free:
                victim = running.pop()
                free += victim.blocks
                victim.blocks = victim.computed = 0
                victim.preempted += 1
                victim.decoding = False
                victim.transfer_ps = None
                waiting.insert(0, victim)
                preempted = True
                if victim is job:
                    break
            if job.blocks == 0:
                break
            free -= needed
            job.blocks += needed
            budget -= count
            batch.append((job, count))
            index += 1
        while received and budget > 0 and len(running) < spec.max_num_seqs:
            running.append(received.pop(0))
            budget -= 1
            batch.append((running[-1], 1))
        free -= receive()
        while not preempted and waiting and budget > 0 and len(running) < spec.max_num_seqs:
            job = waiting[0]
            if blocks(job.tokens) > free:
                break
            running.append(waiting.pop(0))
            count = min(job.tokens, budget)
            job.blocks = blocks(count)
            free -= job.blocks
            budget -= count
            batch.append((job, count))
            free -= receive()
        assert free >= 0
        if not batch:  # nobody can be computed before somebody comes, or a cache does
            assert coming or receiving
            arrivals = [coming[0].arrived_ps + ps(spec.frontend_ms)] if coming else []
            now = min([*arrivals, *(job.there_ps for job in receiving)])
            continue
        time = ps(step.overhead_ms) + max(ps(step.weights_ms), ps(step.token_ms) * sum(count for _, count in batch))
        for job, count in batch:
            time += ps(step.sequence_ms)
            if job.decoding:
                time += ps(step.context_token_ms) * job.tokens
            else:
                time += ps(step.pair_ms) * sum(job.computed + position for position in range(1, count + 1))
        now += time
        steps += 1
        for job, count in batch:
            job.computed += count
            if job.computed == job.tokens:
                job.decoding = True
                job.tokens += 1
                job.left -= 1
                job.first_ps = now if job.first_ps < 0 else job.first_ps
                if job.left == 0:
                    job.last_ps = now
                    running.remove(job)
                    free += job.blocks
    assert free == spec.kv_blocks
    return jobs, steps


def run(spec: EngineSpec, requests: list[Request], transfers: Transfers | None = None) -> tuple[list[Job], Engine]:
    """The model, everything at once."""
    engine = Engine(spec)
    jobs = []
    for number, (at, inputs, outputs) in enumerate(requests):
        jobs.append(Job(number, inputs, outputs, transfer_ps=transfers[number] if transfers else None))
        engine.submit(jobs[-1], at)
    engine.advance(FOREVER_PS)
    return jobs, engine


@st.composite
def loads(draw: st.DrawFn) -> tuple[EngineSpec, list[Request]]:
    block_tokens = draw(st.sampled_from([1, 3, 4, 16]))
    seqs = draw(st.integers(1, 6))
    step = {name: draw(st.sampled_from([0.0, value])) for name, value in STEP.model_dump().items()}
    step["overhead_ms"] = draw(st.sampled_from([1.0, 7.0]))
    made = EngineSpec(
        step=StepTime(**step),
        frontend_ms=draw(st.sampled_from([0.0, 2.5])),
        max_num_seqs=seqs,
        max_num_batched_tokens=draw(st.integers(seqs, 24)),
        kv_blocks=draw(st.integers(8, 40)),
        block_tokens=block_tokens,
    )
    most = made.kv_tokens + 1
    requests, now = [], 0
    for _ in range(draw(st.integers(1, 12))):
        now += draw(st.integers(0, 60)) * PS_PER_MS
        inputs = draw(st.integers(1, min(40, most - 1)))
        requests.append((now, inputs, draw(st.integers(1, min(40, most - inputs)))))
    return made, requests


def times(job: Job) -> tuple[int, int, int]:
    return job.first_token_ps, job.finished_ps, job.preemptions


@settings(max_examples=400, deadline=None)
@given(loads())
def test_every_request_gets_its_tokens_when_the_plain_engine_gives_them(load: tuple[EngineSpec, list[Request]]) -> None:
    made, requests = load
    slow, steps = slow_run(made, requests)
    jobs, engine = run(made, requests)
    assert [times(job) for job in jobs] == [(one.first_ps, one.last_ps, one.preempted) for one in slow]
    assert engine.steps == steps


@settings(max_examples=300, deadline=None)
@given(loads(), st.data())
def test_caches_that_come_from_elsewhere_are_waited_for_as_in_the_plain_engine(
    load: tuple[EngineSpec, list[Request]], data: st.DataObject
) -> None:
    made, requests = load
    some = st.one_of(st.none(), st.integers(0, 80).map(lambda ms: ms * PS_PER_MS))
    transfers = [data.draw(some) for _ in requests]
    slow, steps = slow_run(made, requests, transfers)
    jobs, engine = run(made, requests, transfers)
    assert [times(job) for job in jobs] == [(one.first_ps, one.last_ps, one.preempted) for one in slow]
    assert engine.steps == steps
    assert engine.unfinished == 0


@settings(max_examples=100, deadline=None)
@given(loads(), st.integers(1, 30))
def test_runs_of_steps_taken_at_once_end_where_single_steps_end(
    load: tuple[EngineSpec, list[Request]], tick_ms: int
) -> None:
    made, requests = load
    at_once, whole = run(made, requests)
    single = Engine(made)
    jobs = [Job(number, inputs, outputs) for number, (_, inputs, outputs) in enumerate(requests)]
    for job, (at, _, _) in zip(jobs, requests, strict=True):
        single.submit(job, at)
    events = []
    end = max(job.finished_ps for job in at_once)
    # No step is shorter than a millisecond, so with ticks of one each call begins at most one.
    for now in range(0, end + tick_ms * PS_PER_MS, tick_ms * PS_PER_MS):
        events += single.advance(now)
        assert all(event.at_ps <= now for event in events)
    assert [times(job) for job in jobs] == [times(job) for job in at_once]
    assert [event.at_ps for event in events] == sorted(event.at_ps for event in events)
    assert (single.steps, single.busy_ps, single.computed_tokens, single.most_blocks) == (
        whole.steps,
        whole.busy_ps,
        whole.computed_tokens,
        whole.most_blocks,
    )


@settings(max_examples=100, deadline=None)
@given(loads())
def test_every_request_ends_once_and_every_token_is_computed(load: tuple[EngineSpec, list[Request]]) -> None:
    made, requests = load
    engine = Engine(made)
    for number, (at, inputs, outputs) in enumerate(requests):
        engine.submit(Job(number, inputs, outputs), at)
    events = engine.advance(FOREVER_PS)
    assert sorted(event.job.name for event in events if event.finished) == list(range(len(requests)))
    assert sorted(event.job.name for event in events if not event.finished) == list(range(len(requests)))
    assert engine.unfinished == 0
    assert engine.most_blocks <= made.kv_blocks
    tokens = sum(inputs + outputs - 1 for _, inputs, outputs in requests)
    if engine.preemptions == 0:
        assert engine.computed_tokens == tokens
    else:
        assert engine.computed_tokens > tokens


def test_an_answer_alone_takes_its_prompt_and_then_a_step_per_token() -> None:
    (job,), engine = run(spec(), [(0, 6, 3)])
    prompt_ms = 3 + 5 + 0.25 + 0.03125 * (1 + 2 + 3 + 4 + 5 + 6)
    assert job.first_token_ps == ps(prompt_ms)
    assert job.finished_ps == ps(prompt_ms + 2 * (3 + 5 + 0.25) + 0.0625 * (7 + 8))
    assert (engine.steps, engine.computed_tokens) == (3, 6 + 2)


def test_a_long_prompt_is_taken_in_chunks_beside_the_tokens_of_others() -> None:
    flat = StepTime(overhead_ms=10)
    made = spec(step=flat, max_num_batched_tokens=8)
    (talker, reader), _ = run(made, [(0, 4, 6), (1, 20, 1)])
    # Steps end at 10, 20, ...; 20 prompt tokens in chunks of 7, 7 and 6 from the second step on.
    assert talker.first_token_ps == ps(10)
    assert talker.finished_ps == ps(60)
    assert reader.first_token_ps == reader.finished_ps == ps(40)


def test_small_prompts_cost_nothing_while_the_weights_are_being_read() -> None:
    made = spec(step=StepTime(weights_ms=5, token_ms=0.5))
    assert [run(made, [(0, tokens, 1)])[0][0].finished_ps for tokens in (1, 10, 12)] == [ps(5), ps(5), ps(6)]


def test_nobody_overtakes_in_the_queue() -> None:
    made = spec(step=StepTime(overhead_ms=10), kv_blocks=10)
    # The second needs 9 blocks and waits for the first's to be free; the third would have fitted beside the first.
    jobs, _ = run(made, [(0, 16, 4), (1, 16 + 20, 1), (2, 4, 1)])
    assert [job.first_token_ps for job in jobs] == [ps(10), ps(70), ps(70)]
    assert jobs[0].finished_ps == ps(40)


def test_without_free_blocks_the_last_one_in_starts_anew() -> None:
    made = spec(step=StepTime(overhead_ms=10), kv_blocks=4)
    (kept, victim), engine = run(made, [(0, 4, 9), (0, 4, 6)])
    # Both take a block for the prompt and one for the next four tokens. In the sixth step the first needs a third
    # block and there is none.
    assert (kept.preemptions, victim.preemptions) == (0, 1)
    assert kept.finished_ps == ps(90)
    # Five tokens are there; the 9 tokens so far come back in one step beside the first's, which brings the sixth.
    assert victim.first_token_ps == ps(10)
    assert victim.finished_ps == ps(100)
    assert engine.computed_tokens == (4 + 8) + (4 + 4) + 9
    assert engine.most_blocks == 4


def test_at_most_so_many_run_at_once() -> None:
    made = spec(step=StepTime(overhead_ms=10), max_num_seqs=2)
    jobs, _ = run(made, [(0, 2, 3), (0, 2, 3), (0, 2, 1)])
    assert [job.first_token_ps for job in jobs] == [ps(10), ps(10), ps(40)]


def test_the_frontend_delays_a_request_and_occupies_nobody() -> None:
    made = spec(step=StepTime(overhead_ms=10), frontend_ms=4)
    jobs, engine = run(made, [(0, 2, 1), (ps(1), 2, 1)])
    assert [job.first_token_ps for job in jobs] == [ps(14), ps(24)]
    assert engine.busy_ps == ps(20)


def test_who_arrives_at_the_very_start_of_a_step_is_in_it() -> None:
    engine = Engine(spec(step=StepTime(overhead_ms=10)))
    engine.submit(Job(0, 2, 3), 0)
    assert [event.finished for event in engine.advance(ps(10))] == [False]
    late = Job(1, 2, 1)
    engine.submit(late, ps(10))
    engine.advance(FOREVER_PS)
    assert late.first_token_ps == ps(20)


def test_a_run_of_growing_steps_stops_for_who_arrives_at_the_very_start_of_one() -> None:
    growing = spec(step=StepTime(overhead_ms=10, context_token_ms=1))
    # Steps begin at 10 (context 3), 23 (4), 37 (5), 52 (6) and so on.
    for begins, ends in ((10, 23), (23, 37), (37, 52), (52, 68)):
        (_, late), _ = run(growing, [(0, 2, 20), (ps(begins), 1, 1)])
        assert late.first_token_ps == ps(ends)
        (_, later), _ = run(growing, [(0, 2, 20), (ps(begins) + 1, 1, 1)])
        assert later.first_token_ps > ps(ends)


def test_next_events_stops_at_each_moment_in_which_something_happens() -> None:
    engine = Engine(spec(step=StepTime(overhead_ms=10)))
    engine.submit(Job(0, 2, 3), 0)
    engine.submit(Job(1, 2, 1), 0)
    moments = []
    while events := engine.next_events():
        moments.append((events[0].at_ps, [(event.job.name, event.finished) for event in events]))
    assert moments == [(ps(10), [(0, False), (1, False), (1, True)]), (ps(30), [(0, True)])]


def test_a_cache_from_elsewhere_leaves_the_last_token_of_the_prompt_to_compute() -> None:
    made = spec(step=StepTime(overhead_ms=10), frontend_ms=4)
    (job,), engine = run(made, [(0, 9, 3)], [ps(25)])
    assert job.first_token_ps == ps(4 + 25 + 10)
    assert job.finished_ps == ps(4 + 25 + 30)
    assert engine.computed_tokens == 1 + 2


def test_who_waits_for_a_cache_has_its_blocks_and_holds_nobody_up() -> None:
    made = spec(step=StepTime(overhead_ms=10), kv_blocks=4)
    coming, short, long = run(made, [(0, 8, 1), (0, 4, 1), (0, 12, 1)], [ps(45), None, None])[0]
    assert short.first_token_ps == ps(10)
    assert coming.first_token_ps == ps(55)
    assert long.first_token_ps == ps(65)


def test_what_can_never_fit_is_refused() -> None:
    engine = Engine(spec(kv_blocks=2))
    engine.submit(Job(0, 4, 5), 0)
    with pytest.raises(ValueError, match="need KV for 9 tokens; the engine holds 8"):
        engine.submit(Job(1, 4, 6), 0)
    with pytest.raises(ValueError, match="output_tokens of request 2: got 0"):
        Job(2, 4, 0)


def test_arrivals_come_in_order() -> None:
    engine = Engine(spec())
    engine.submit(Job(0, 1, 1), 5)
    with pytest.raises(ValueError, match="at_ps 4 is before"):
        engine.submit(Job(1, 1, 1), 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": {"overheadMs": float("nan")}}, "overheadMs"),
        ({"step": {}}, "all zero"),
        ({"step": {"tokenMs": -1}}, "tokenMs"),
        ({"maxNumSeqs": 17, "max_num_batched_tokens": 16}, r"at least maxNumSeqs \(17\), got 16"),
        ({"kvBlocks": 0}, "kvBlocks"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineSpec.model_validate({"step": {"overheadMs": 1}, "kvBlocks": 10} | fields)
