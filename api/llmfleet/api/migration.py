"""Why a running request did not move from one engine to another: the words that engines, the owner of the stream and
the coordinator use for it (RFC 2).
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a migration did not come about, or ended. The list is closed."""

    UNKNOWN_REQUEST = "unknown_request"
    FINISHED = "finished"
    """The request ended by itself first."""
    SAME_ENGINE = "same_engine"
    INCOMPATIBLE = "incompatible"
    """The engines differ in a field of the fingerprint."""
    UNSUPPORTED = "unsupported"
    """The request uses something that cannot be carried exactly."""
    NO_ROOM = "no_room"
    BUSY = "busy"
    """Another migration of the request runs, or as many as the engine takes at once."""
    STALE_EPOCH = "stale_epoch"
    EXPIRED = "expired"
    """A lease ended."""
    LAGGING = "lagging"
    """The copy does not catch up with the request."""
    CORRUPT = "corrupt"
    PEER_LOST = "peer_lost"
    RESTARTED = "restarted"
    """The engine is another process than the one that was asked before."""
    CANCELLED = "cancelled"
    """The coordinator or the client wanted it no more."""
    UNAUTHORIZED = "unauthorized"
    MALFORMED = "malformed"
    UNSUPPORTED_VERSION = "unsupported_version"
    TOO_LARGE = "too_large"
    FAILED = "failed"
    """The engine failed in answering; its log says how."""


class SourcePhase(StrEnum):
    """How far the engine is that a request leaves."""

    COPYING = "copying"
    FREEZING = "freezing"
    HELD = "held"
    RELEASED = "released"
    FINISHED = "finished"
    CANCELLED = "cancelled"


class TailFate(StrEnum):
    """What became of the last block, the sampler's state and the word to begin."""

    UNKNOWN = "unknown"
    TAKEN = "taken"
    REFUSED = "refused"


class DestinationPhase(StrEnum):
    """How far the engine is that a request comes to."""

    RESERVED = "reserved"
    RUNNING = "running"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Feature(StrEnum):
    """What a request uses beyond greedy text: each has to be carried to another engine, or is refused there."""

    SAMPLING = "sampling"
    """Temperature above zero without a seed: it goes on with other random numbers."""
    SEED = "seed"
    PENALTIES = "penalties"
    MIN_TOKENS = "min_tokens"
    LOGIT_BIAS = "logit_bias"
    ALLOWED_TOKENS = "allowed_tokens"
    """Allowed tokens, or bad words."""
    GRAMMAR = "grammar"
    LOGPROBS = "logprobs"
    PROMPT_LOGPROBS = "prompt_logprobs"
    LORA = "lora"
    CACHE_SALT = "cache_salt"
    PRIORITY = "priority"
    SEVERAL_ANSWERS = "several_answers"
    """`n` above one, or beams."""
    PROMPT_EMBEDDINGS = "prompt_embeddings"
    MULTIMODAL = "multimodal"
    SPECULATIVE_DECODING = "speculative_decoding"
    HYBRID_CACHE = "hybrid_cache"
    """KV groups of hybrid, Mamba or sliding-window models."""
    POOLING = "pooling"
    CLIENT_KV_TRANSFER = "client_kv_transfer"
    """The request came with `kv_transfer_params`, or streams its input: another connector has a part in it."""
    OTHER = "other"
    """Something that this version does not know."""
