"""Whether a replica has a place for one more request, or the gateway keeps it a while longer.

What an engine has queued nobody can reorder or take elsewhere, so it gets no more than keeps it busy: a request is held
back while the replica has others of this gateway without a first token, and

- their prefill will take longer than `hold_ms`, about two steps of a busy engine, less where the objective is tight; or
- its KV cache is full, by its own report, so that whoever comes stands in its queue; or
- the oldest of them should have had its first token long since: the engine has a queue that no report and no fit shows.

A replica without such requests always has a place: whatever is believed of it, it is asked.

`batch` takes only idle capacity: where anything runs, half of that backlog, a fifth of the KV cache and of the
objective's time per token are left to others. Where a service has no objective, nothing is held back: nobody has said
what waiting would protect.
"""

from __future__ import annotations

from llmfleet.api.llmservice import Objective
from llmfleet.gateway.policy.replicas import Replica
from llmfleet.gateway.policy.sizes import Prediction

HOLD_MS = 200.0
"""Prefill in front of a further request, in milliseconds, with which an engine is busy for longer than it takes to send
it the next one: two steps with a chunk of 2048 tokens at 20,000 tokens per second."""
HOLD_SHARE = 0.25
"""Most of the objective's TTFT that such prefill may take."""
OVERDUE = 1.5
"""Times its predicted prefill, beyond the backlog that is allowed, after which a first token is overdue."""
HEADROOM = 0.2
"""Share of KV cache and of the objective's time per token that batch leaves to others."""
LOOK_AGAIN_S = 0.05
"""How often it is looked whether time alone has made a place."""


def hold_ms(objective: Objective) -> float:
    """Prefill in front of a further request, in milliseconds, from which it is held back."""
    return min(HOLD_MS, HOLD_SHARE * objective.ttft.milliseconds)


def has_place(replica: Replica, prediction: Prediction, objective: Objective, now: float, *, batch: bool) -> bool:
    """Whether a further request may go to this replica now."""
    if replica.in_flight == 0 and replica.others.in_flight == 0.0:
        return True
    bound_ms = hold_ms(objective)
    if batch:
        return (
            replica.backlog_ms(now) <= 0.5 * bound_ms
            and replica.pace_ms <= (1.0 - HEADROOM) * objective.tpot.milliseconds
            and replica.room_tokens >= prediction.prompt_tokens + HEADROOM * replica.kv_tokens
        )
    if replica.unstarted == 0:
        return True
    if replica.backlog_ms(now) > bound_ms or replica.room_tokens < prediction.prompt_tokens:
        return False
    sent_s, tokens = replica.oldest
    due_ms = replica.latency.ttft_base_ms + OVERDUE * replica.latency.ttft_ms_per_input_token * tokens
    return (now - sent_s) * 1e3 <= due_ms + bound_ms
