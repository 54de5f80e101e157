"""Requests that go on here from tokens that another engine generated, as if they came back from preemption.

In flow a request that the API server has parsed and, from its old engine or its stream's owner, the tokens so far.
Three things are then done that vLLM's scheduler would not do for a new request:

    before the next step    the tokens are appended, the grammar is brought to them, received blocks become its own
    with its first step     the model runner, which has never seen it, is given the state that it would have
    after its first step    the tokens are put before the first new one, so that the API server, which detokenizes,
                            matches stop strings and counts, sees an answer that was generated here
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from llmfleet.engine import vllm_internals
from llmfleet.engine.hand_over import HandOver, Logprobs

UNKNOWN_LOGPROB = -9999.0
"""Told of tokens whose log probability died with their engine: what OpenAI's API calls "not in the top list"."""


@dataclass(frozen=True)
class Resumed:
    """Goes to the model runner with the request's first step, as an attribute of the scheduler's output."""

    data: NewRequestData
    tokens: list[int]
    generator: bytes | None


class Resumes:
    """Requests between their admission and their first output. Used under the monitor only."""

    def __init__(self, scheduler: Any, add_request: Callable[[Request], None]) -> None:
        self._scheduler = scheduler
        self._add_request = add_request
        self._unseen: dict[str, tuple[Request, HandOver]] = {}
        self._silent: dict[str, HandOver] = {}
        self._complete: list[tuple[Request, HandOver]] = []

    @property
    def waiting(self) -> bool:
        """Whether there is an output to give although nothing runs."""
        return bool(self._complete)

    def admit(self, request: Request, hand_over: HandOver, blocks: Sequence[Any]) -> bool:
        """Queue the request where it was. It owns `blocks` from now on.

        Returns False where the tokens are a complete answer: it is given without a step, and the blocks are not taken.
        Raises ValueError where the tokens cannot be this request's: they came from a peer, and what is wrong with them
        must be found before the scheduler or the model runner trip over it.
        """
        vllm_internals.check_tokens(self._scheduler, request, hand_over.tokens, hand_over.kv_tokens)
        if not vllm_internals.continue_with(self._scheduler, request, hand_over.tokens):
            self._complete.append((request, hand_over))
            return False
        if blocks:
            vllm_internals.adopt_blocks(self._scheduler, request, blocks, hand_over.kv_tokens)
        self._add_request(request)
        if blocks:
            vllm_internals.publish_blocks(self._scheduler, request)
        self._unseen[request.request_id] = (request, hand_over)
        if hand_over.tokens:
            self._silent[request.request_id] = hand_over
        return True

    def scheduled(self, output: SchedulerOutput) -> list[Resumed]:
        """Of the requests that this step begins with, what the model runner needs to know."""
        begun = []
        for request_id in self._unseen.keys() & output.num_scheduled_tokens.keys():
            request, hand_over = self._unseen[request_id]
            data = vllm_internals.resumed_first_time(output, request)
            if data is not None:
                begun.append(Resumed(data, hand_over.tokens, hand_over.generator))
                del self._unseen[request_id]
        return begun

    def told(self, output: EngineCoreOutput) -> None:
        """Put the tokens of the other engine before the first ones of this one."""
        hand_over = self._silent.get(output.request_id)
        if hand_over is None or not output.new_token_ids:
            return
        del self._silent[output.request_id]
        output.new_token_ids = hand_over.tokens + list(output.new_token_ids)
        if output.new_logprobs is not None:
            output.new_logprobs = joined(hand_over, output.new_logprobs)

    def complete_outputs(self) -> list[tuple[int, EngineCoreOutput]]:
        """Answers that were complete with the tokens so far, by client."""
        complete, self._complete = self._complete, []
        return [
            (
                request.client_index,
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=list(hand_over.tokens),
                    finish_reason=request.get_finished_reason() or FinishReason.STOP,
                    stop_reason=request.stop_reason,
                    new_logprobs=_complete(request, hand_over),
                ),
            )
            for request, hand_over in complete
        ]

    def forget(self, request_id: str) -> None:
        """The request went away."""
        self._unseen.pop(request_id, None)
        self._silent.pop(request_id, None)


def joined(hand_over: HandOver, new: LogprobsLists) -> LogprobsLists:
    """Log probabilities of the tokens so far and those after them."""
    before = hand_over.logprobs
    # Steps give as many columns as whoever wants most in the batch; both have what this request wants.
    width = min(new.logprob_token_ids.shape[1], before.token_ids.shape[1] if before is not None else sys.maxsize)
    if before is None:
        before = _unknown(hand_over.tokens, width)
    return LogprobsLists(
        np.concatenate([before.token_ids[:, :width], new.logprob_token_ids[:, :width]]),
        np.concatenate([before.values[:, :width], new.logprobs[:, :width]]),
        np.concatenate([before.ranks, new.sampled_token_ranks]),
        None,
    )


def _complete(request: Request, hand_over: HandOver) -> LogprobsLists | None:
    """Of an answer to which nothing is added. vLLM expects as many entries as tokens wherever a request wants any."""
    if hand_over.logprobs is not None:
        return lists(hand_over.logprobs)
    params = request.sampling_params
    if params is None or params.logprobs is None:
        return None
    return lists(_unknown(hand_over.tokens, 1 + max(0, params.logprobs)))


def _unknown(tokens: list[int], width: int) -> Logprobs:
    """Of tokens whose log probabilities nobody has any more."""
    ids = np.repeat(np.asarray(tokens, dtype=np.int32)[:, None], width, axis=1)
    values = np.full((len(tokens), width), UNKNOWN_LOGPROB, dtype=np.float32)
    return Logprobs(ids, values, np.zeros(len(tokens), dtype=np.int32))


def lists(logprobs: Logprobs) -> LogprobsLists:
    """As vLLM's API server expects them."""
    return LogprobsLists(logprobs.token_ids, logprobs.values, logprobs.ranks, None)
