"""What coordinator, stream owner and engines say to each other about live migration (RFC 2).

    to      ask                      answer
    both    Capabilities             EngineCapabilities
    both    GetLoad                  Load
    source  ListRequests             RequestList
    dest.   Prepare                  Prepared
    source  Precopy                  SourceStatus
    both    Status                   SourceStatus or DestinationStatus, according to the engine's part
    source  Freeze, Release          SourceStatus
    dest.   Resume                   DestinationStatus
    both    Cancel                   SourceStatus or DestinationStatus
    both    Subscribe, Unsubscribe   Subscribed; then Journal events, until the connection ends

Any ask may be answered by Refused, with a reason of the closed list. An ask about a migration is idempotent: said twice
it is answered by how things stand. In flow bytes from a peer that has proved the shared key but is not trusted beyond
that: every number, text and list has a bound, unknown fields are errors. How messages are framed and authenticated is
`llmfleet.migration.frames`' business.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from llmfleet.api.fingerprint import Fingerprint
from llmfleet.api.meta import ApiModel
from llmfleet.api.migration import DestinationPhase, Feature, Reason, SourcePhase, TailFate

MESSAGES_VERSION: Literal[1] = 1
"""Of the messages: another one has other fields or other meanings."""
MOST_TOKENS = 4_194_304
"""Longest prompt plus answer that a message can speak of."""
MOST_WAIT_S = 30.0
MOST_RANKS = 64
MOST_REQUESTS = 4096

PromptDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 of the prompt's token ids: engines that make other tokens of a text must not go on with each other's."""
MigrationId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""128 random bits in hexadecimal."""
InstanceId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""128 random bits that an engine process draws when it starts."""
RequestId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,256}$")]
"""As the stream's owner named it in `X-Request-Id`."""
Address = Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}$")]
"""`host:port`, an IPv6 address in brackets."""
Epoch = Annotated[int, Field(ge=1, lt=2**31)]
"""Number of the leg of the stream that the migration would begin."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenCount = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
BlockCount = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
WaitSeconds = Annotated[float, Field(ge=0, le=MOST_WAIT_S)]
Features = Annotated[list[Feature], Field(max_length=len(Feature))]
DataAddresses = Annotated[list[Address], Field(min_length=1, max_length=MOST_RANKS)]


class Part(ApiModel):
    """Base of messages and their parts: nothing is converted, nothing unknown is passed over."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Message(Part):
    """Base of everything that is said."""

    version: Literal[1] = MESSAGES_VERSION
    """Of the messages."""


class AboutMigration(Message):
    """Base of asks about one migration."""

    migration: MigrationId
    epoch: Epoch


class Cause(Part):
    """Why something is not done."""

    reason: Reason
    field: str = Field(default="", max_length=128)
    """What the reason is about: a field of the fingerprint, a feature, a field of the message. Empty: the whole."""
    detail: str = Field(default="", max_length=1024)
    """For people: field, value, what would be accepted."""


# Asks


class Capabilities(Message):
    """What kind of engine is this?"""

    kind: Literal["capabilities"] = "capabilities"


class GetLoad(Message):
    """How busy is it?"""

    kind: Literal["load"] = "load"


class ListRequests(Message):
    """What runs, and what of it can move?"""

    kind: Literal["requests"] = "requests"
    request: RequestId | None = None
    """Only this one: an empty list then says that it does not run. Absent: all."""


class Prepare(AboutMigration):
    """Reserve blocks for a request that is to come. Asked of the destination."""

    kind: Literal["prepare"] = "prepare"
    fingerprint: Fingerprint
    """Of the engine that it ran on."""
    tokens: TokenCount
    """Prompt and answer so far. 0: no source will send anything, so only weights and adapter have to be the same; the
    request begins by `resume`."""
    most_tokens: TokenCount
    """Prompt and the longest answer."""
    features: Features
    """What the request uses."""
    adapter: str | None = Field(default=None, max_length=256)
    """Name of its LoRA adapter."""
    prompt_digest: PromptDigest | None = None
    """The owner's request is only parked if its prompt is this one; absent: whatever it is."""


class Destination(Part):
    """Where a source sends to."""

    instance: InstanceId
    data: DataAddresses
    """Addresses of the data channels, by rank."""


class Precopy(AboutMigration):
    """Begin to copy a running request. Asked of the source."""

    kind: Literal["precopy"] = "precopy"
    request: RequestId
    destination: Destination


class Status(AboutMigration):
    """How does it stand? Answered when the revision is another than `seen`, or after `wait_s`."""

    kind: Literal["status"] = "status"
    seen: Count | None = None
    """Revision of the last answer; absent: answer at once."""
    wait_s: WaitSeconds = 0.0


class Freeze(AboutMigration):
    """Cut. Answered when the source is beyond `freezing`, or after `wait_s`."""

    kind: Literal["freeze"] = "freeze"
    wait_s: WaitSeconds = 0.0


class Release(AboutMigration):
    """End the hold."""

    kind: Literal["release"] = "release"


class Cancel(AboutMigration):
    """Nobody wants this migration any more."""

    kind: Literal["cancel"] = "cancel"
    reason: Reason


class Resume(AboutMigration):
    """Begin the parked request from these tokens with the blocks that are there; the rest is computed."""

    kind: Literal["resume"] = "resume"
    tokens: list[TokenId] = Field(max_length=MOST_TOKENS)
    """The answer so far, from its first token."""


class Subscribe(Message):
    """Tell me the tokens of these requests, those that begin later included, from the first token on."""

    kind: Literal["subscribe"] = "subscribe"
    requests: list[RequestId] = Field(min_length=1, max_length=MOST_REQUESTS)


class Unsubscribe(Message):
    """No more of these."""

    kind: Literal["unsubscribe"] = "unsubscribe"
    requests: list[RequestId] = Field(min_length=1, max_length=MOST_REQUESTS)


# Answers


class EngineLimits(Part):
    """What the engine takes at most."""

    lease_s: float = Field(gt=0, le=86_400)
    """A migration of which nothing is heard for so long is given up."""
    incoming: Count
    """Migrations that come at once."""
    outgoing: Count
    incoming_tokens: Count
    """Tokens, expected ones included, of all that come at once."""
    incoming_kv_share: float = Field(ge=0, le=1)
    """Share of the KV cache that may be reserved."""


class EngineCapabilities(Message):
    """What kind of engine this is."""

    kind: Literal["engine_capabilities"] = "engine_capabilities"
    instance: InstanceId
    fingerprint: Fingerprint
    transports: list[Literal["tcp", "nixl"]] = Field(min_length=1, max_length=2)
    """Ways in which blocks can be copied, the preferred one first."""
    data: DataAddresses
    """Addresses of the data channels, by rank."""
    limits: EngineLimits


class Load(Message):
    """How busy an engine is."""

    kind: Literal["engine_load"] = "engine_load"
    blocks_total: BlockCount
    blocks_free: BlockCount
    """Neither used, reserved nor held."""
    blocks_reserved: BlockCount
    """For requests that come."""
    blocks_held: BlockCount
    """Of requests that have left and are not released yet."""
    running: Count
    waiting: Count
    step_ms: float = Field(ge=0, le=1e9)
    """Of recent scheduler steps, a moving mean; 0 before the first."""
    incoming: Count
    """Migrations in reservation."""
    outgoing: Count
    """Migrations that copy, freeze or hold."""


class RunningRequest(Part):
    """A request that runs or waits."""

    request: RequestId
    prompt_tokens: TokenCount
    output_tokens: TokenCount
    most_tokens: TokenCount
    """Prompt and the longest answer."""
    blocks: BlockCount
    """Of KV cache."""
    features: Features
    adapter: str | None = Field(default=None, max_length=256)
    prompt_digest: PromptDigest | None = None
    """Absent where all requests are listed."""
    refusal: Cause | None = None
    """Why it cannot leave; absent: it can."""


class RequestList(Message):
    """What runs."""

    kind: Literal["request_list"] = "request_list"
    requests: list[RunningRequest] = Field(max_length=MOST_REQUESTS)


class Prepared(Message):
    """Blocks are reserved."""

    kind: Literal["prepared"] = "prepared"
    migration: MigrationId
    epoch: Epoch
    lease_s: float = Field(gt=0, le=86_400)
    """The reservation ends when nothing is heard for so long."""
    destination: Destination
    """To be told to the source."""


class SourceStatus(Message):
    """How a migration stands at its source."""

    kind: Literal["source_status"] = "source_status"
    migration: MigrationId
    epoch: Epoch
    revision: Count
    """Grows with every change of what is below."""
    phase: SourcePhase
    full_blocks: BlockCount
    """Blocks that no step will change any more."""
    sent_blocks: BlockCount
    acknowledged_blocks: BlockCount
    caught_up: bool
    """A cut now would leave little to copy."""
    tail: TailFate
    reason: Reason | None = None
    """Why it is finished or cancelled."""
    output_tokens: TokenCount
    """Generated so far; from `held` on: all that were generated here."""
    bytes_sent: Count
    stages: Count
    """Of the copy: each takes what has become full during the one before."""


class DestinationStatus(Message):
    """How a migration stands at its destination."""

    kind: Literal["destination_status"] = "destination_status"
    migration: MigrationId
    epoch: Epoch
    revision: Count
    """Grows with every change of what is below."""
    phase: DestinationPhase
    blocks: BlockCount
    """Blocks in their places, without a gap."""
    parked: bool
    """The owner's request is here and waits."""
    complete: bool
    """The tail is here and verified, on all ranks."""
    reason: Reason | None = None
    """Why it is cancelled or expired."""
    computed_tokens: TokenCount | None = None
    """Tokens whose KV was computed here because it did not come; absent until the request runs. The request's newest
    token never has KV yet and does not count."""


class Subscribed(Message):
    """How many requests this connection is told of now."""

    kind: Literal["subscribed"] = "subscribed"
    requests: Count


class Refused(Message, Cause):
    """Whoever was asked will not."""

    kind: Literal["refused"] = "refused"


# Events


class JournalEntry(Part):
    """New tokens of one request."""

    request: RequestId
    index: TokenCount
    """Of the first of them in the answer, from 0."""
    ids: list[TokenId] = Field(max_length=MOST_TOKENS)
    """Token ids."""


class Journal(Message):
    """What a scheduler step gave to the requests of a subscription."""

    kind: Literal["journal"] = "journal"
    entries: list[JournalEntry] = Field(max_length=MOST_REQUESTS)
    lagging: bool = False
    """The connection is slow: engines are further than what is told here."""


AnyAsk = (
    Capabilities | GetLoad | ListRequests | Prepare | Precopy | Status | Freeze | Release | Cancel | Resume
    | Subscribe | Unsubscribe
)  # fmt: skip
AnyAnswer = (
    EngineCapabilities | Load | RequestList | Prepared | SourceStatus | DestinationStatus | Subscribed | Refused
)  # fmt: skip
Ask = Annotated[AnyAsk, Field(discriminator="kind")]
Answer = Annotated[AnyAnswer, Field(discriminator="kind")]

MESSAGES: TypeAdapter[AnyAsk | AnyAnswer | Journal] = TypeAdapter(Ask | Answer | Journal)
"""Everything that is said, for its schema."""

M = TypeVar("M")
_ASK: TypeAdapter[AnyAsk] = TypeAdapter(Ask)
_ANSWER: TypeAdapter[AnyAnswer] = TypeAdapter(Answer)
_JOURNAL: TypeAdapter[Journal] = TypeAdapter(Journal)


class MessageError(ValueError):
    """What was received is no message of this version. `refused` is what to answer."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(f"{refused.reason}: {refused.detail}")
        self.refused = refused


def to_payload(message: Message) -> bytes:
    """A message as it goes over the wire: JSON in UTF-8, absent instead of null."""
    return message.model_dump_json(by_alias=True, exclude_none=True).encode()


def parse_ask(payload: bytes) -> AnyAsk:
    """Reads an ask. Raises MessageError, which names field, value and what is accepted."""
    return _parse(_ASK, payload)


def parse_answer(payload: bytes) -> AnyAnswer:
    """Reads an answer. Raises MessageError, which names field, value and what is accepted."""
    return _parse(_ANSWER, payload)


def parse_journal(payload: bytes) -> Journal:
    """Reads an event. Raises MessageError, which names field, value and what is accepted."""
    return _parse(_JOURNAL, payload)


def _parse(adapter: TypeAdapter[M], payload: bytes) -> M:
    try:
        return adapter.validate_json(payload)
    except ValidationError as error:
        raise MessageError(_refused(error, payload)) from None


def _refused(error: ValidationError, payload: bytes) -> Refused:
    first = error.errors(include_url=False)[0]
    version = _version(payload)
    if version is not None and version != MESSAGES_VERSION:
        detail = f"version: accepted is {MESSAGES_VERSION}, got {_shown(version)}"
        return Refused(reason=Reason.UNSUPPORTED_VERSION, field="version", detail=detail)
    field = ".".join(str(step) for step in first["loc"])[:128]
    detail = f"{field or 'message'}: {first['msg']}, got {_shown(first['input'])}"
    return Refused(reason=Reason.MALFORMED, field=field, detail=detail[:1024])


def _version(payload: bytes) -> Any:
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return message.get("version") if isinstance(message, dict) else None


def _shown(value: Any) -> str:
    """A value for an error message: a list or an object may be large, or hold somebody's tokens."""
    if isinstance(value, dict | list | tuple | bytes):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:80]
