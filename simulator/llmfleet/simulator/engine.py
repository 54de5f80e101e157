"""One engine with continuous batching, as a pure discrete-event model: requests in, times of their tokens out.

    submit(job, at) ... advance(until) -> events up to then

The rules are those of vLLM 0.32 (V1 scheduler, FCFS, chunked prefill, no prefix cache hits), read off its behaviour:

* Running requests come first, in the order in which they were let in. Each decoding one gets a token; the one whose
  prompt is unfinished gets what is left of the batch. There is at most one such, the last: a prompt is only left
  unfinished where it has used up the batch, so nobody was let in after it.
* Where a running request finds no free KV block, the *last* running one is preempted until it does: its blocks are
  freed, it goes to the head of the queue and computes prompt and answer so far anew. vLLM lets nobody in in a step that
  preempts. Without prefix cache hits that needs no rule of its own: who was preempted last is the first in the queue,
  and until somebody ends there is less room than it had when even that was not enough.
* Then the queue, strictly in order: as long as there is room in the batch, fewer than `max_num_seqs` run, and all that
  the request has so far (prompt, and answer before a preemption) fits the free blocks. Blocks are taken only for the
  chunk computed, so several long prompts may be let in that do not all fit in the end.
* A request whose prompt is complete in a step has a token at its end.
* A request whose prompt another engine has computed takes all its blocks when its turn comes, and waits until its KV
  cache is there, holding up nobody. The last token of its prompt is computed here, in the first step after. Preempted,
  it computes its prompt anew (vLLM's KV connectors).

Between two events (someone arrives, finishes, or finds no block) a decoding batch does the same thing in every step,
and its context grows by one token per request. Such runs are taken at once: their time is an arithmetic series. Nothing
is kept per request and step. A decoding request is known by the step that will be its last and by its *phase*, the
steps (modulo the block size) in which it needs a block; both are fixed when it starts to decode.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import NamedTuple

from llmfleet.simulator.spec import EngineSpec, ps

FOREVER_PS = 10**30
"""Later than anything."""


class Job:
    """One request in an engine, and what became of it. Times in picoseconds, -1 before they are known."""

    __slots__ = (
        "_answered",
        "_blocks",
        "_computed",
        "_last_step",
        "_phase",
        "_received",
        "arrived_ps",
        "finished_ps",
        "first_token_ps",
        "input_tokens",
        "name",
        "output_tokens",
        "preemptions",
        "transfer_ps",
    )

    def __init__(self, name: int, input_tokens: int, output_tokens: int, *, transfer_ps: int | None = None) -> None:
        """`transfer_ps`: how long the KV cache of its prompt takes to come from the engine that has computed it; None:
        the prompt is computed here. Raises ValueError for a request without prompt or answer."""
        for field, value in (("input_tokens", input_tokens), ("output_tokens", output_tokens)):
            if value < 1:
                raise ValueError(f"{field} of request {name}: got {value}, accepted are numbers from 1")
        self.name = name
        """The caller's number for it."""
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.arrived_ps = -1
        self.first_token_ps = -1
        self.finished_ps = -1
        self.preemptions = 0
        self._received = 0 if transfer_ps is None else input_tokens - 1  # tokens of which the KV cache is to come
        self.transfer_ps = transfer_ps or 0
        """How long the KV cache that is computed elsewhere takes to come."""
        self._answered = 0  # tokens of the answer when it last began to compute or to decode
        self._computed = 0  # tokens in the KV cache while it is not decoding
        self._blocks = 0  # blocks it holds while it is not decoding
        self._last_step = -1  # number of the step that ends its answer; -1 while it is not decoding
        self._phase = 0


class Event(NamedTuple):
    """A job got its first token, or its last."""

    at_ps: int
    job: Job
    finished: bool


class Engine:
    """One engine and its queue."""

    def __init__(self, spec: EngineSpec) -> None:
        step = spec.step
        self.spec = spec
        self.steps = 0
        """Steps begun."""
        self.preemptions = 0
        self.computed_tokens = 0
        """Tokens computed in all steps; what is computed anew counts again."""
        self.busy_ps = 0
        """Time of all steps together."""
        self.most_blocks = 0
        """Most KV blocks in use at once."""
        self._overhead, self._weights, self._token = ps(step.overhead_ms), ps(step.weights_ms), ps(step.token_ms)
        self._sequence, self._context_token = ps(step.sequence_ms), ps(step.context_token_ms)
        self._pair = ps(step.pair_ms)
        self._now = 0  # end of the last step begun
        self._free = spec.kv_blocks
        self._coming: deque[Job] = deque()  # submitted, still in the frontend
        self._waiting: deque[Job] = deque()
        self._receiving: list[tuple[int, int, Job]] = []  # (when its KV cache is there, tie-breaker, job)
        self._received: deque[Job] = deque()
        self._running: dict[Job, None] = {}  # in order of admission
        self._partial: Job | None = None
        self._decoding = 0
        self._context = 0  # KV entries that the decoding requests read in the next step
        self._phases = [0] * spec.block_tokens  # decoding requests by the steps in which they need a block
        self._ends: list[tuple[int, int, Job]] = []  # (last step, tie-breaker, job); entries of jobs that left stay
        self._sequence_number = 0
        self._events: deque[Event] = deque()
        self._frontend = ps(spec.frontend_ms)

    @property
    def unfinished(self) -> int:
        """Requests submitted and not finished in a step begun so far."""
        queued = len(self._coming) + len(self._waiting) + len(self._receiving) + len(self._received)
        return queued + len(self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to run or to tell."""
        return not self._events and not self.unfinished

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, and those whose KV cache is on its way."""
        return self.unfinished - len(self._running)

    @property
    def kv_used_tokens(self) -> int:
        """Tokens' worth of KV blocks in use."""
        return (self.spec.kv_blocks - self._free) * self.spec.block_tokens

    def answered(self, job: Job) -> int | None:
        """Tokens that a decoding request has got by the last step begun; None while it does not decode here."""
        return None if job._last_step < 0 or job not in self._running else self._answered_by_now(job)

    def take_out(self, job: Job) -> int | None:
        """A decoding request leaves for another engine with its KV cache: the picoseconds at which it stops here.

        None, and nothing happens, where it does not decode here: it waits, computes its prompt, or is done.
        """
        if job._last_step < 0 or job not in self._running:
            return None
        self._stop_decoding(job)
        job._received = self._whole(job) - 1
        return self._now

    def submit(self, job: Job, at_ps: int) -> None:
        """A request arrives. Raises ValueError if it can never fit, or arrives before one that was submitted before."""
        needed = job.input_tokens + job.output_tokens - 1
        if needed > self.spec.kv_tokens:
            raise ValueError(
                f"request {job.name}: input_tokens {job.input_tokens} and output_tokens {job.output_tokens} need KV "
                f"for {needed} tokens; the engine holds {self.spec.kv_tokens}"
            )
        if self._coming and at_ps < self._coming[-1].arrived_ps:
            raise ValueError(f"request {job.name}: at_ps {at_ps} is before that of the request submitted before it")
        job.arrived_ps = at_ps
        self._coming.append(job)

    def advance(self, until_ps: int) -> list[Event]:
        """Begins every step that starts before `until_ps`; the events up to and including then, in order of time.

        Requests that arrive at `until_ps` may still be submitted after the call.
        """
        while self._now < until_ps and self._begin(until_ps):
            pass
        events = self._events
        due: list[Event] = []
        while events and events[0].at_ps <= until_ps:
            due.append(events.popleft())
        return due

    def next_events(self) -> list[Event]:
        """Runs until something happens to a job: the events of that moment, or none when all are finished."""
        while not self._events and self._begin(FOREVER_PS):
            pass
        return self.advance(self._events[0].at_ps) if self._events else []

    def _begin(self, until_ps: int) -> bool:
        """Begins a step, or a run of equal ones, before `until_ps`. False if there is nothing to do until then."""
        self._take_in()
        while not self._can_step():
            next_ps = self._next_ps()
            if next_ps >= until_ps:
                return False
            self._now = max(self._now, next_ps)
            self._take_in()
        prompts, prompt_tokens, pairs = self._take_prompts()
        decoding = self._decoding
        tokens = decoding + prompt_tokens
        duration = (
            self._overhead
            + max(self._weights, self._token * tokens)
            + self._sequence * (decoding + len(prompts))
            + self._context_token * self._context
            + self._pair * pairs
        )
        steps = 1
        if not prompts:
            steps = self._run_length(duration, min(until_ps, self._next_ps()) - self._now)
        self._free -= self._blocks_for(steps)
        self.most_blocks = max(self.most_blocks, self.spec.kv_blocks - self._free)
        spent = steps * duration + self._context_token * decoding * (steps * (steps - 1) // 2)
        self._now += spent
        self.busy_ps += spent
        self.steps += steps
        self.computed_tokens += steps * tokens
        self._context += steps * decoding
        self._end_answers()
        for job in prompts:
            self._end_prompt(job)
        return True

    def _take_in(self) -> None:
        """Those who have come by now, and whose KV cache has; then room for who is running."""
        coming, frontend, receiving = self._coming, self._frontend, self._receiving
        while coming and coming[0].arrived_ps + frontend <= self._now:
            self._waiting.append(coming.popleft())
        while receiving and receiving[0][0] <= self._now:
            self._received.append(heapq.heappop(receiving)[2])
        self._make_room()
        if not self._running:
            self._receive(0)

    def _next_ps(self) -> int:
        """When the next request or KV cache comes."""
        request = self._coming[0].arrived_ps + self._frontend if self._coming else FOREVER_PS
        return min(request, self._receiving[0][0]) if self._receiving else request

    def _can_step(self) -> bool:
        """Whether there is something to compute: those who receive may have the blocks that the queue needs."""
        if self._running or self._received:
            return True
        return bool(self._waiting) and self._blocks(self._whole(self._waiting[0])) <= self._free

    def _receive(self, spoken_for: int) -> None:
        """Takes the blocks of those at the head of the queue whose KV cache comes from elsewhere."""
        waiting = self._waiting
        while waiting and waiting[0]._received:
            job = waiting[0]
            blocks = self._blocks(self._whole(job))
            if blocks > self._free - spoken_for:
                return
            waiting.popleft()
            self._free -= blocks
            job._blocks, job._computed = blocks, job._received
            self._sequence_number += 1
            heapq.heappush(self._receiving, (self._now + job.transfer_ps, self._sequence_number, job))

    @staticmethod
    def _whole(job: Job) -> int:
        """All that a request has so far: its prompt, and its answer before a preemption."""
        return job.input_tokens + job._answered

    def _make_room(self) -> None:
        """Preempts from the end until everyone who is left gets the blocks of this step."""
        while True:
            needed = self._phases[self.steps % self.spec.block_tokens]
            if (partial := self._partial) is not None:
                needed += self._blocks(partial._computed + self._chunk(partial)) - partial._blocks
            if needed <= self._free:
                return
            self._preempt(next(reversed(self._running)))

    def _chunk(self, job: Job) -> int:
        """Tokens that a prompt begun earlier gets in this step: what the decoding requests leave of the batch."""
        remaining = job.input_tokens + job._answered - job._computed
        return min(remaining, self.spec.max_num_batched_tokens - self._decoding)

    def _preempt(self, job: Job) -> None:
        if job is self._partial:
            del self._running[job]
            self._partial = None
            self._free += job._blocks
        else:
            self._stop_decoding(job)
        job._computed = job._blocks = job._received = 0
        job.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(job)

    def _stop_decoding(self, job: Job) -> None:
        del self._running[job]
        job._answered = self._answered_by_now(job)
        context = job.input_tokens + job._answered
        self._free += self._blocks(context - 1)
        self._context -= context
        self._decoding -= 1
        self._phases[job._phase] -= 1
        job._last_step = -1
        job._computed = job._blocks = 0

    def _take_prompts(self) -> tuple[list[Job], int, int]:
        """The prompts of this step, their tokens, and the pairs of their attention."""
        spec, waiting = self.spec, self._waiting
        prompts: list[Job] = []
        tokens = pairs = 0
        if (partial := self._partial) is not None:
            tokens = self._chunk(partial)
            pairs = self._compute(partial, tokens)
            prompts.append(partial)
        budget = spec.max_num_batched_tokens - self._decoding - tokens
        while self._received and budget > 0 and len(self._running) < spec.max_num_seqs:
            job = self._received.popleft()
            self._running[job] = None
            pairs += self._compute(job, 1)
            prompts.append(job)
            tokens += 1
            budget -= 1
        if waiting:
            # The decoding requests' blocks of this step are spoken for, though not yet taken.
            spoken_for = self._phases[self.steps % spec.block_tokens]
            self._receive(spoken_for)
            while budget > 0 and waiting and len(self._running) < spec.max_num_seqs:
                job = waiting[0]
                whole = self._whole(job)
                if self._blocks(whole) > self._free - spoken_for:
                    break
                waiting.popleft()
                self._running[job] = None
                chunk = min(whole, budget)
                pairs += self._compute(job, chunk)
                prompts.append(job)
                tokens += chunk
                budget -= chunk
                self._partial = job
                self._receive(spoken_for)
        return prompts, tokens, pairs

    def _compute(self, job: Job, chunk: int) -> int:
        """Takes the blocks of a chunk; gives its pairs of query and key."""
        pairs = chunk * job._computed + chunk * (chunk + 1) // 2
        job._computed += chunk
        blocks = self._blocks(job._computed)
        self._free -= blocks - job._blocks
        job._blocks = blocks
        return pairs

    def _run_length(self, first_ps: int, remaining_ps: int) -> int:
        """How many steps of decoding nothing interferes with: the first takes `first_ps`, and the last starts less
        than `remaining_ps` from now. At least one; `_make_room` has seen to the first one's blocks."""
        ends = self._ends
        while ends[0][2]._last_step != ends[0][0] or ends[0][2] not in self._running:
            heapq.heappop(ends)
        steps = ends[0][0] - self.steps
        # Starts before the limit: (n-1) first + growth (n-1)(n-2)/2 < remaining, by n - 1 = m.
        growth = self._context_token * self._decoding
        if (steps - 1) * first_ps + growth * ((steps - 1) * (steps - 2) // 2) >= remaining_ps:
            linear = 2 * first_ps - growth
            if growth:
                most = (math.isqrt(linear * linear + 8 * growth * (remaining_ps - 1)) - linear) // (2 * growth)
            else:
                most = (remaining_ps - 1) // first_ps
            steps = min(steps, most + 1)
        if self._blocks_for(steps) > self._free:
            block_tokens = self.spec.block_tokens
            cycles = min(steps // block_tokens, self._free // self._decoding)
            free, steps = self._free - cycles * self._decoding, cycles * block_tokens
            while (needed := self._phases[(self.steps + steps) % block_tokens]) <= free:
                free -= needed
                steps += 1
        return steps

    def _blocks_for(self, steps: int) -> int:
        """Blocks that the decoding requests need in the next `steps` steps."""
        block_tokens, phases = self.spec.block_tokens, self._phases
        cycles, rest = divmod(steps, block_tokens)
        start = self.steps % block_tokens
        needed = cycles * self._decoding + sum(phases[start : start + rest])
        if start + rest > block_tokens:
            needed += sum(phases[: start + rest - block_tokens])
        return needed

    def _end_answers(self) -> None:
        ends = self._ends
        while ends and ends[0][0] <= self.steps:
            last_step, _, job = heapq.heappop(ends)
            # One that has left may have such a step elsewhere.
            if job._last_step == last_step and job in self._running:
                context = job.input_tokens + job.output_tokens
                self._decoding -= 1
                self._context -= context
                self._phases[job._phase] -= 1
                self._finish(job, self._blocks(context - 1))

    def _end_prompt(self, job: Job) -> None:
        """The end of a step that computed a part of a prompt: the last part brings a token."""
        whole = job.input_tokens + job._answered
        if job._computed < whole:
            return
        if job is self._partial:
            self._partial = None
        job._answered += 1
        if job.first_token_ps < 0:
            job.first_token_ps = self._now
            self._events.append(Event(self._now, job, False))
        if job._answered == job.output_tokens:
            self._finish(job, job._blocks)
            return
        self._decoding += 1
        self._context += whole + 1
        job._phase = (self.steps - whole) % self.spec.block_tokens
        self._phases[job._phase] += 1
        job._last_step = self.steps + job.output_tokens - job._answered
        self._sequence_number += 1
        heapq.heappush(self._ends, (job._last_step, self._sequence_number, job))

    def _finish(self, job: Job, blocks: int) -> None:
        del self._running[job]
        self._free += blocks
        job.finished_ps = self._now
        self._events.append(Event(self._now, job, True))

    def _answered_by_now(self, job: Job) -> int:
        """Tokens that a decoding request has got so far."""
        return job.output_tokens - (job._last_step - self.steps)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.spec.block_tokens)
