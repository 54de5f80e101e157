"""Everything that is used of vLLM beyond its documented plug points (`--scheduler-cls`, `--worker-cls`).

Written against vLLM 0.32. `missing_in_scheduler` and `missing_in_runner` look for what the plug-in relies on, so that
another vLLM is met with a sentence and without migration rather than with an exception in the middle of a step; that
it *means* what is expected here is what the tests on a real engine show.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from llmfleet.api.migration import Feature
from llmfleet.engine.generators import generator_at
from llmfleet.engine.memory import HostMemory, Layer

_SCHEDULER = {
    "get_request_counts": "saying what runs and waits",
    "kv_cache_manager.block_pool.get_new_blocks": "reserving blocks for a request that comes",
    "kv_cache_manager.block_pool.free_blocks": "giving reserved and pinned blocks back",
    "kv_cache_manager.block_pool.touch": "pinning the blocks of a request that leaves",
    "kv_cache_manager.block_pool.get_num_free_blocks": "refusing what does not fit",
    "kv_cache_manager.block_pool.num_gpu_blocks": "saying how many blocks there are",
    "kv_cache_manager.coordinator.single_type_managers": "giving received blocks to their request",
    "kv_cache_manager.cache_blocks": "entering received blocks into the prefix cache",
    "structured_output_manager.accept_tokens": "bringing a grammar to where the request is",
    "kv_cache_config.kv_cache_groups": "refusing models whose KV cache is not plain attention",
    "max_model_len": "ending a resumed request that was complete",
}
_RUNNER = {
    "input_batch.generators": "computing prompts of requests with a seed in portions",
    "requests": "giving the model runner the state of a request that comes",
    "kv_caches": "reading and writing the KV cache",
    "kv_cache_config.num_blocks": "reading and writing the KV cache",
}
_REQUEST = {
    "append_output_token_ids": "resuming a request",
    "num_output_tokens": "resuming a request",
    "num_tokens": "resuming a request",
    "is_finished": "finding the live request that is to move",
    "max_tokens": "cutting a request",
    "num_output_placeholders": "cutting a request",
    "num_in_flight_tokens": "knowing which blocks are full",
    "num_computed_tokens": "knowing which blocks are full",
    "num_preemptions": "resuming a request",
    "structured_output_request": "waiting for a grammar",
}
_STEP = {
    "preempted_req_ids": "noticing that a request lost its blocks",
    "num_scheduled_tokens": "noticing a resumed request's first step",
    "scheduled_cached_reqs": "telling the model runner of a resumed request",
}


def missing_in_scheduler(scheduler: Any) -> tuple[str, ...]:
    """What this vLLM lacks of what the plug-in uses, and what for. Empty: all is there."""
    # A request's attributes are those that its constructor sets, and those of its class.
    constructed = {*dir(Request), *Request.__init__.__code__.co_names}
    fields = {field.name for field in dataclasses.fields(SchedulerOutput)}
    return (
        *_gone(scheduler, _SCHEDULER),
        *(f"Request.{name} ({purpose})" for name, purpose in _REQUEST.items() if name not in constructed),
        *(f"SchedulerOutput.{name} ({purpose})" for name, purpose in _STEP.items() if name not in fields),
    )


def missing_in_runner(runner: Any) -> tuple[str, ...]:
    """The same of a worker's model runner."""
    return _gone(runner, _RUNNER)


def _gone(owner: Any, paths: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        f"{type(owner).__name__}.{path} ({purpose})" for path, purpose in paths.items() if not _has(owner, path)
    )


def _has(owner: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def unsupported_engine(scheduler: Any) -> Feature | None:
    """The feature of the whole engine for which its requests cannot move, or None."""
    groups = scheduler.kv_cache_config.kv_cache_groups
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        return Feature.HYBRID_CACHE
    config = scheduler.vllm_config
    if config.speculative_config is not None:
        return Feature.SPECULATIVE_DECODING
    if config.parallel_config.pipeline_parallel_size > 1:
        return Feature.OTHER
    if config.parallel_config.data_parallel_size > 1 or config.model_config.logits_processors:
        return Feature.OTHER
    return None


def unsupported_request(request: Request) -> Feature | None:
    """The feature for which this request cannot be carried exactly, or None."""
    params = request.sampling_params
    if params is None:
        return Feature.POOLING
    if re.match(r"\d+_", request.request_id):
        return Feature.SEVERAL_ANSWERS
    if request.prompt_embeds is not None:
        return Feature.PROMPT_EMBEDDINGS
    if request.mm_features:
        return Feature.MULTIMODAL
    if request.resumable:
        return Feature.CLIENT_KV_TRANSFER
    if params.prompt_logprobs is not None:
        return Feature.PROMPT_LOGPROBS
    if getattr(params, "thinking_token_budget", None) is not None:
        return Feature.OTHER
    return None


def names(request_id: str) -> tuple[str, ...]:
    """What the client may have called the request, best guess first.

    The API server puts the kind of endpoint before the name, sometimes a number behind it, and random letters.
    """
    named = re.fullmatch(r"(cmpl-|chatcmpl-)?(.+)-[0-9a-f]{8}", request_id)
    if named is None:
        return (request_id,)
    # Completions number the answers of a request, responses its turns.
    numbers = {"cmpl-": r"-\d+", None: r"_\d+"}.get(named[1], "")
    numbered = re.fullmatch(rf"(.+){numbers}", named[2]) if numbers else None
    return (numbered[1], named[2]) if numbered else (named[2],)


def block_pool(scheduler: Any) -> Any:
    """Where the engine's KV blocks are taken from and given back to."""
    return scheduler.kv_cache_manager.block_pool


def grammar_is_ready(request: Request) -> bool:
    """Whether the request has no grammar, or one that is compiled."""
    grammar = request.structured_output_request
    return grammar is None or bool(grammar.is_grammar_ready)


def blocks_of(scheduler: Any, request_id: str) -> list[Any]:
    """The blocks that the request holds now, in order."""
    return list(scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks.get(request_id, ()))


def adopt_blocks(scheduler: Any, request: Request, blocks: Sequence[Any], kv_tokens: int) -> None:
    """Give `blocks` to the request as its own, with KV for its first `kv_tokens` tokens in them: the state in which
    vLLM itself has a request whose KV cache has been loaded from elsewhere."""
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    manager.req_to_blocks[request.request_id] = list(blocks)
    request.num_computed_tokens = kv_tokens


def publish_blocks(scheduler: Any, request: Request) -> None:
    """Enter the request's full blocks into the prefix cache."""
    scheduler.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)


def full_blocks(request: Request, block_size: int) -> int:
    """How many of its blocks no step will write to any more. Between steps only."""
    return int((request.num_computed_tokens - request.num_in_flight_tokens) // block_size)


def cap(request: Request) -> int:
    """Make the next token the last one. Returns the cap that there was."""
    before: int = request.max_tokens
    request.max_tokens = min(before, request.num_output_tokens + request.num_output_placeholders + 1)
    return before


def was_cut(request: Request, cap_before: int, max_model_len: int) -> bool:
    """Whether the request ended by `cap` and would not have ended at this token anyway."""
    return bool(
        request.status == RequestStatus.FINISHED_LENGTH_CAPPED
        and request.num_output_tokens < cap_before
        and request.num_tokens < max_model_len
    )


def check_tokens(scheduler: Any, request: Request, tokens: list[int], kv_tokens: int) -> None:
    """Raises ValueError where these cannot be the request's tokens so far, with KV for the first `kv_tokens` of all."""
    vocabulary = scheduler.vllm_config.model_config.get_vocab_size()
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise ValueError(f"tokens from {min(tokens)} to {max(tokens)} where the model has {vocabulary}")
    most = min(request.max_tokens, scheduler.max_model_len - request.num_prompt_tokens)
    if len(tokens) > most:
        raise ValueError(f"{len(tokens)} tokens of an answer that has at most {most}")
    if not 0 <= kv_tokens < request.num_prompt_tokens + len(tokens):
        raise ValueError(f"KV cache of {kv_tokens} tokens where there are {request.num_prompt_tokens + len(tokens)}")


def continue_with(scheduler: Any, request: Request, tokens: list[int]) -> bool:
    """Put a request that has not run into the state of one that was preempted after `tokens`.

    Returns False where it is complete with them. Raises ValueError where its grammar does not accept them.
    """
    if request.use_structured_output:
        # One by one, as they came: a reasoning parser looks at what is before each.
        for token in tokens:
            request.append_output_token_ids(token)
            if not scheduler.structured_output_manager.accept_tokens(request, [token]):
                raise ValueError(f"the grammar of {request.request_id} does not accept its own tokens")
    else:
        request.append_output_token_ids(tokens)
    request.num_preemptions = 1
    request.status = RequestStatus.PREEMPTED
    return not tokens or not check_stop(request, scheduler.max_model_len)


def resumed_first_time(output: SchedulerOutput, request: Request) -> NewRequestData | None:
    """What the model runner must know of a request that it hears of as "resumed" but has never seen."""
    cached = output.scheduled_cached_reqs
    if request.request_id not in cached.resumed_req_ids:
        return None
    return NewRequestData.from_request(request, cached.new_block_ids[cached.req_ids.index(request.request_id)])


def remember_resumed(runner: Any, data: NewRequestData, tokens: list[int], generator_state: bytes | None) -> None:
    """Give the model runner the state that it would have, had it generated `tokens` itself."""
    runner.requests[data.req_id] = CachedRequestState(
        req_id=data.req_id,
        prompt_token_ids=data.prompt_token_ids,
        prompt_embeds=data.prompt_embeds,
        prompt_is_token_ids=data.prompt_is_token_ids,
        mm_features=data.mm_features,
        sampling_params=data.sampling_params,
        pooling_params=None,
        generator=_generator(runner, data, len(tokens), generator_state),
        block_ids=data.block_ids,
        num_computed_tokens=data.num_computed_tokens,
        output_token_ids=list(tokens),
        lora_request=data.lora_request,
    )


def _generator(runner: Any, data: NewRequestData, draws: int, state: bytes | None) -> torch.Generator | None:
    params = data.sampling_params
    if params is None or params.sampling_type != SamplingType.RANDOM_SEED:
        return None
    return generator_at(runner.device, runner.input_batch.vocab_size, params.seed, draws, state, data.req_id)


def let_draws_be_taken_back(runner: Any, output: SchedulerOutput) -> None:
    """Requests that begin with this step, which is computed but not sampled yet, get generators that vLLM needs."""
    if runner.device.type != "cpu":
        return
    for data in output.scheduled_new_reqs:
        generator = _generator(runner, data, 0, None)
        if generator is not None and (state := runner.requests.get(data.req_id)) is not None:
            state.generator = generator
            runner.input_batch.generators[runner.input_batch.req_id_to_index[data.req_id]] = generator


def generator_state(runner: Any, request_id: str) -> bytes | None:
    """State of the request's own random generator after its last token; None where it has none."""
    state = runner.requests.get(request_id)
    if state is None or state.generator is None:
        return None
    return bytes(state.generator.get_state().numpy().tobytes())


def host_memory(runner: Any) -> HostMemory | None:
    """The KV cache of a runner whose device is the CPU; None for other devices."""
    layers: dict[int, Layer] = {}
    for cache in runner.kv_caches:
        if cache.device.type != "cpu":
            return None
        page = cache[0]
        if not page.is_contiguous():
            raise ValueError("a block of this KV cache is not one piece of memory")
        size = cache.element_size()
        # Layers that share a cache have it once.
        layers[cache.data_ptr()] = Layer(cache.data_ptr(), cache.stride(0) * size, page.numel() * size)
    return HostMemory(list(layers.values()), runner.kv_cache_config.num_blocks)


def features(request: Request) -> list[Feature]:
    """What the request uses beyond greedy text."""
    params = request.sampling_params
    if params is None:
        return [Feature.POOLING]
    uses = {
        Feature.SAMPLING: params.sampling_type == SamplingType.RANDOM,
        Feature.SEED: params.sampling_type == SamplingType.RANDOM_SEED,
        Feature.PENALTIES: bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        ),
        Feature.MIN_TOKENS: params.min_tokens > 0,
        Feature.LOGIT_BIAS: bool(params.logit_bias),
        Feature.ALLOWED_TOKENS: bool(params.allowed_token_ids or params.bad_words),
        Feature.GRAMMAR: request.use_structured_output,
        Feature.LOGPROBS: params.logprobs is not None,
        Feature.LORA: request.lora_request is not None,
        Feature.CACHE_SALT: request.cache_salt is not None,
        Feature.PRIORITY: request.priority != 0,
    }
    return [feature for feature, used in uses.items() if used]
