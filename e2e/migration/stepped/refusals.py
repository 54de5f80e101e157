"""What cannot be is refused with its reason, and ends no engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from vllm import SamplingParams

from e2e.migration.stepped.engines import (
    ANSWER_TOKENS,
    EPOCH,
    GREEDY,
    LEASE_S,
    MAX_MODEL_LEN,
    MOST_INCOMING,
    Pair,
    differences,
    parked_without_a_source,
    scenario,
    started,
)
from llmfleet.api import Feature, Reason
from llmfleet.api.migration_messages import (
    Cancel,
    Capabilities,
    GetLoad,
    ListRequests,
    Precopy,
    Prepare,
    Refused,
    Resume,
    Status,
)


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
    yield from expect(prepare(tokens=4000, most_tokens=MAX_MODEL_LEN + 1), Reason.TOO_LARGE, "most_tokens")
    answers = (prepare(tokens=3900, most_tokens=MAX_MODEL_LEN) for _ in range(MOST_INCOMING))
    yield from expect(next((answer for answer in answers if isinstance(answer, Refused)), None), Reason.NO_ROOM)
    # To a full engine, and more than may be copied to it at once: a resume takes no more than a new request does.
    for _ in range(MOST_INCOMING + 1):
        if isinstance(refused := prepare(tokens=0, most_tokens=MAX_MODEL_LEN), Refused):
            yield f"a resume was refused: {refused}"
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
    one = started(pair)
    pair.copy(pair.a, one.migration)
    pair.b.submit(one.moved, [*one.prompt[:-1], one.prompt[-1] ^ 1], GREEDY)
    if pair.b.run(one.moved).finish_reason != "error":
        yield "another request is parked"
    refused = pair.status(pair.b, one.migration)
    if (refused.phase, refused.reason) != ("cancelled", Reason.UNKNOWN_REQUEST):
        yield f"destination: {refused}"
    pair.a.ask(Cancel(migration=one.migration, epoch=EPOCH, reason=Reason.CANCELLED))
    yield from differences(pair.a.run("one"), one.reference)


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
