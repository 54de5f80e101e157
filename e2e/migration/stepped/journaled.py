"""A request whose engine is lost goes on from the tokens of a journal alone, with no KV cache and no state."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from vllm import SamplingParams

from e2e.migration.stepped.engines import EPOCH, MOST_BATCHED_TOKENS, Pair, differences, scenario, wait
from llmfleet.api.migration_messages import Capabilities, Prepare, Prepared, Resume
from llmfleet.engine.resume import UNKNOWN_LOGPROB


def parked(pair: Pair, prompt: list[int], params: SamplingParams) -> str:
    """The request waits at `b`. Its migration."""
    migration = secrets.token_hex(16)
    about: dict[str, Any] = {"migration": migration, "epoch": EPOCH}
    fingerprint, most_tokens = pair.a.ask(Capabilities()).fingerprint, len(prompt) + (params.max_tokens or 0)
    prepare = Prepare(**about, fingerprint=fingerprint, tokens=0, most_tokens=most_tokens, features=[])
    assert isinstance(pair.b.ask(prepare), Prepared)
    pair.b.submit(f"llmfleet-{migration}", prompt, params)
    wait(lambda: pair.parked(pair.b, migration), "the request is not parked")
    return migration


def resumed(pair: Pair, migration: str, tokens: list[int]) -> str:
    """`b` goes on with it in its next step. Its name there."""
    pair.b.ask(Resume(migration=migration, epoch=EPOCH, tokens=tokens))
    return f"llmfleet-{migration}"


@scenario
def many_resumes_at_once_are_computed_in_portions(pair: Pair) -> Iterable[str]:
    """More tokens than a step has room for, of requests with a seed among others: vLLM draws from a generator for the
    token of each portion, throws it away, and wants the draw back."""
    seeded = SamplingParams(max_tokens=50, temperature=1.0, seed=17, presence_penalty=0.4)
    greedy = SamplingParams(max_tokens=50, temperature=0.0)
    lost = [(pair.prompt(MOST_BATCHED_TOKENS * 3 // 4), params) for params in (greedy, seeded, seeded)]
    references = [pair.undisturbed(prompt, params) for prompt, params in lost]
    waiting = [parked(pair, prompt, params) for prompt, params in lost]
    names = [
        resumed(pair, migration, list(reference.token_ids[:30]))
        for migration, reference in zip(waiting, references, strict=True)
    ]
    for name, reference in zip(names, references, strict=True):
        yield from differences(pair.b.run(name), reference)


@scenario
def new_requests_with_a_seed_are_computed_in_portions(pair: Pair) -> Iterable[str]:
    """Those among them that begin anew, since nothing of them had come."""
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=23)
    prompts = [pair.prompt(MOST_BATCHED_TOKENS * 3 // 4) for _ in range(3)]
    references = [pair.undisturbed(prompt, params) for prompt in prompts]
    for number, prompt in enumerate(prompts):
        pair.b.submit(f"new-{number}", prompt, params)
    for number, reference in enumerate(references):
        yield from differences(pair.b.run(f"new-{number}"), reference)


@scenario
def log_probabilities_are_made_anew_from_where_they_were_told(pair: Pair) -> Iterable[str]:
    """Those of the tokens before are nobody's: as many entries, with a value that says so."""
    params = SamplingParams(max_tokens=30, temperature=0.0, logprobs=2)
    prompt = pair.prompt(100)
    reference = pair.undisturbed(prompt, params)
    for told in (10, 30):
        name = resumed(pair, parked(pair, prompt, params), list(reference.token_ids[:told]))
        answer = pair.b.run(name)
        values = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        expected = [entry[token].logprob for entry, token in zip(reference.logprobs, answer.token_ids, strict=True)]
        if values != [UNKNOWN_LOGPROB] * told + expected[told:]:
            yield f"{told} told: {values} instead of {expected}"
