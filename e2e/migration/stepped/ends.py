"""However a request or a migration ends, the client has its answer and both engines have their blocks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from e2e.migration.stepped.engines import (
    ANSWER_TOKENS,
    EPOCH,
    GREEDY,
    LEASE_S,
    MAX_MODEL_LEN,
    Pair,
    differences,
    parked_without_a_source,
    scenario,
    started,
    wait,
)
from llmfleet.api import Reason
from llmfleet.api.migration_messages import Cancel, Capabilities, Freeze, GetLoad, Prepare, Prepared, Release, Resume


@scenario
def natural_end_wins_over_the_copy(pair: Pair) -> Iterable[str]:
    one = started(pair, SamplingParams(max_tokens=8, temperature=0.0))
    yield from differences(pair.a.run("one"), one.reference)
    if pair.status(pair.a, one.migration).phase != "finished":
        yield f"source: {pair.status(pair.a, one.migration)}"
    wait(lambda: pair.status(pair.b, one.migration).phase == "cancelled", "the destination was not told")


@scenario
def an_end_at_the_very_cut_is_an_end(pair: Pair) -> Iterable[str]:
    """The cap that the cut lowers is where the answer ends anyway."""
    one = started(pair, SamplingParams(max_tokens=8, temperature=0.0), at=7)
    state = pair.freeze(pair.a, "one", one.migration)
    if state.phase != "finished":
        yield f"source: {state}"
    yield from differences(pair.a.run("one"), one.reference)


@scenario
def an_end_of_the_model_at_the_very_cut_is_an_end(pair: Pair) -> Iterable[str]:
    """The cut comes with the last token that the model's length has room for."""
    one = started(pair, context=MAX_MODEL_LEN - 8, at=7)
    if (state := pair.freeze(pair.a, "one", one.migration)).phase != "finished":
        yield f"source: {state}"
    yield from differences(pair.a.run("one"), one.reference)


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
    one = started(pair)
    pair.a.engine.abort_request(["one"])
    pair.a.step()
    if pair.status(pair.a, one.migration).phase != "finished":
        yield f"source: {pair.status(pair.a, one.migration)}"
    wait(lambda: pair.status(pair.b, one.migration).phase == "cancelled", "the destination was not told")


@scenario
def a_preemption_wins_over_the_copy(pair: Pair) -> Iterable[str]:
    one = started(pair)
    pair.a.step()
    pair.a.scheduler.reset_prefix_cache(reset_running_requests=True)
    yield from differences(pair.a.run("one"), one.reference)
    if pair.status(pair.a, one.migration).phase != "cancelled":
        yield f"source: {pair.status(pair.a, one.migration)}"


@scenario
def a_preemption_for_want_of_blocks_ends_the_copy(pair: Pair) -> Iterable[str]:
    pair.a.submit("older", pair.prompt(300), SamplingParams(max_tokens=400, temperature=0.0))
    one = started(pair)
    pool = pair.a.scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pair.a.free_blocks)
    request = pair.a.plug._find("one").request
    while not request.num_preemptions and not pair.a.ended("one"):
        pair.a.step()
    pool.free_blocks(taken)
    if pair.status(pair.a, one.migration).phase != "cancelled":
        yield f"source: {pair.status(pair.a, one.migration)}"
    yield from differences(pair.a.run("one"), one.reference)
    pair.a.run("older")


@scenario
def a_preemption_after_the_freeze_only_delays_the_cut(pair: Pair) -> Iterable[str]:
    one = started(pair)
    copied = pair.copy(pair.a, one.migration)
    pair.b.submit(one.moved, one.prompt, GREEDY)
    pair.a.ask(Freeze(migration=one.migration, epoch=EPOCH))
    pair.a.scheduler.reset_prefix_cache(reset_running_requests=True)
    held = pair.freeze(pair.a, "one", one.migration)
    if held.phase != "held":
        yield f"source: {held}"
    if held.bytes_sent < 2 * copied.bytes_sent:
        yield f"blocks that were computed anew were not sent anew: {copied}, {held}"
    yield from differences(pair.b.run(one.moved), one.reference)
    pair.a.ask(Release(migration=one.migration, epoch=EPOCH))


@scenario
def a_cancelled_copy_leaves_the_request_alone(pair: Pair) -> Iterable[str]:
    one = started(pair)
    pair.copy(pair.a, one.migration)
    pair.b.submit(one.moved, one.prompt, GREEDY)
    pair.b.step()
    for side in (pair.a, pair.b):
        side.ask(Cancel(migration=one.migration, epoch=EPOCH, reason=Reason.CANCELLED))
    yield from differences(pair.a.run("one"), one.reference)
    refused = pair.b.run(one.moved)
    if refused.finish_reason != "error" or refused.token_ids:
        yield f"the parked request: {refused}"


@scenario
def leases_end_what_nobody_asks_about(pair: Pair) -> Iterable[str]:
    one = started(pair)
    pair.a.step()
    load = pair.b.ask(GetLoad())
    if not load.blocks_reserved:
        yield "nothing was reserved"
    _, alone = parked_without_a_source(pair, GREEDY)
    time.sleep(2.5 * LEASE_S)
    for side in (pair.a, pair.b):
        load = side.ask(GetLoad())
        if load.blocks_reserved or load.blocks_held or load.incoming or load.outgoing:
            yield f"after the lease: {load}"
    if pair.b.run(alone).finish_reason != "error":
        yield "what no source will ever begin waits on"
    yield from differences(pair.a.run("one"), one.reference)
    pair.b.submit(one.moved, one.prompt, GREEDY)
    if pair.b.run(one.moved).finish_reason != "error":
        yield "a request that comes too late runs from its first token"


@scenario
def a_hold_ends_with_its_lease(pair: Pair) -> Iterable[str]:
    """The coordinator died after the cut: the destination runs, the source lets go."""
    one = started(pair)
    pair.copy(pair.a, one.migration)
    pair.b.submit(one.moved, one.prompt, GREEDY)
    pair.freeze(pair.a, "one", one.migration)
    yield from differences(pair.b.run(one.moved), one.reference)
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
        one = started(pair, params)
        pair.copy(pair.a, one.migration)
        delivered = list(pair.a.outputs["one"].outputs[0].token_ids)
        # Channels that break: nothing more is said to the destination.
        for address in pair.b.ask(Capabilities()).data:
            pair.a.plug.lost(address)
        pair.a.engine.abort_request(["one"])
        pair.a.outputs.pop("one")
        pair.b.submit(one.moved, one.prompt, params)
        while not pair.status(pair.b, one.migration).parked:
            pair.b.step()
        blocks = pair.status(pair.b, one.migration).blocks
        pair.b.ask(Resume(migration=one.migration, epoch=EPOCH, tokens=delivered))
        yield from differences(pair.b.run(one.moved), one.reference)
        computed = pair.status(pair.b, one.migration).computed_tokens
        if not blocks or computed != len(one.prompt) + len(delivered) - 1 - 32 * blocks:
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
