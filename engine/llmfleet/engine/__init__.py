"""The vLLM plug-in: it makes an unpatched vLLM able to hand a running request to another engine (RFC 2).

    scheduler.py  worker.py     vLLM's own classes with a few methods wrapped: the only code that vLLM calls
        │             │
    migrations.py   requests that leave (outgoing.py) and that come (incoming.py), under one lock; the pure state
        │           machines of `llmfleet.migration` decide, these carry out
        ├── blocks.py    references on KV blocks: pinned at a source, reserved at a destination
        ├── memory.py    the bytes of a block, in place
        ├── channel.py   data from engine to engine
        ├── resume.py    a request that comes back as if from preemption
        ├── journal.py   token ids to the streams' owners
        └── control.py   what coordinators and owners ask, answered by a thread of its own

Nothing in vLLM is replaced while it runs. What of it is used beyond its documented plug points is listed in
`vllm_internals.py`, and looked for when the engine starts.

One lock, the *monitor*, is held while the scheduler plans a step and while it takes the results in, but not while the
model runs. Whoever holds it may take blocks from the pool or give them back. So an engine that has nothing to do, and
takes no steps, still reserves, receives and lets go.
"""
