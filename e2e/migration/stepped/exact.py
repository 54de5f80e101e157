"""Whatever a request uses, it comes out as if it had stayed: token for token, log probability for log probability."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from e2e.migration.stepped.engines import (
    ANSWER_TOKENS,
    EPOCH,
    GREEDY,
    SCENARIOS,
    Pair,
    differences,
    scenario,
)
from llmfleet.api.migration_messages import Release

CONTEXTS = (20, 31, 300, 1000) if os.environ.get("LLMFLEET_TEST_FULL") else (20, 300)

CUTS = (1, 12, 40) if os.environ.get("LLMFLEET_TEST_FULL") else (1, 40)


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


@scenario
def ten_hops(pair: Pair) -> Iterable[str]:
    """One request goes back and forth, and takes all log probabilities along each time."""
    params = SamplingParams(max_tokens=250, temperature=1.0, seed=13, presence_penalty=0.5, logprobs=1)
    prompt = pair.prompt(200)
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
