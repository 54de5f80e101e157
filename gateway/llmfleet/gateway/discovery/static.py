"""A fleet without Kubernetes: engines from the command line, optionally with a routing table from a file.

Without a table there is one implicit service that takes every model name and spreads its requests over all engines.
Engines are not probed: one that fails is ejected by the policy and tried again. Streams of an engine that says its
plug-in's control port can move to another one that does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from llmfleet.api import Buckets, LatencyCoefficients, RoutedVariant, RoutingTable
from llmfleet.gateway.fleet import ANY_MODEL, Engine, Fleet, Service
from llmfleet.gateway.settings import SettingsError
from llmfleet.migration.handshake import PeerKeyError, read_peer_key
from llmfleet.migration.ports import host_and_port

log = logging.getLogger("llmfleet.gateway")

_ENGINE_FORM = (
    "engines must be http://HOST[:PORT], or VARIANT=http://HOST[:PORT] with a routing file, and may end with "
    "#control=HOST:PORT"
)
_CONTROL = "#control="
_VARIANT = "static"
_UNMEASURED = LatencyCoefficients(
    ttft_base_ms=50.0, ttft_ms_per_input_token=0.1, tpot_base_ms=20.0, tpot_ms_per_running=1.0
)
"""Nobody has measured these engines. With equal coefficients only what is in flight decides."""
_BUCKETS = Buckets(
    input_tokens=[128, 512, 2048, 8192, 32768],
    output_tokens=[64, 256, 1024, 4096],
)


def static_fleet(engines: Sequence[str], routing_file: Path | None = None, peer_key_file: Path | None = None) -> Fleet:
    """The fleet that the settings describe. Raises SettingsError naming the engine or the file."""
    table = _implicit_table(len(engines)) if routing_file is None else _read_table(routing_file)
    names = [variant.name for variant in table.variants]
    for text in engines if routing_file is None else ():
        if text.partition(_CONTROL)[0].rpartition("=")[1]:
            raise SettingsError(f"{_ENGINE_FORM}, got {text!r} without a routing file")
    parsed = tuple(_engine(text, names) for text in engines)
    if len({engine.id for engine in parsed}) != len(parsed):
        raise SettingsError("engines must differ from each other")
    return Fleet([Service(table, parsed, peer_key=_peer_key(parsed, peer_key_file))])


def _peer_key(engines: Sequence[Engine], file: Path | None) -> bytes | None:
    controlled = [engine.id for engine in engines if engine.control is not None]
    if file is None:
        if controlled:
            raise SettingsError(f"engine {controlled[0]} has a control port: peer-key-file must name the engines' key")
        return None
    if not controlled:
        raise SettingsError(f"peer-key-file {file} is for engines with {_CONTROL}HOST:PORT, and none has it")
    try:
        key = read_peer_key(file)
    except PeerKeyError as error:
        raise SettingsError(f"peer-key-file: {error}") from None
    if key.warning:
        log.warning("%s", key.warning)
    return key.key


def _implicit_table(replicas: int) -> RoutingTable:
    return RoutingTable(
        plan_id="static",
        namespace="static",
        service="static",
        served_name=ANY_MODEL,
        context_length=_BUCKETS.input_tokens[-1] + _BUCKETS.output_tokens[-1],
        buckets=_BUCKETS,
        variants=[RoutedVariant(name=_VARIANT, replicas=replicas, selector={}, latency=_UNMEASURED)],
    )


def _read_table(file: Path) -> RoutingTable:
    try:
        table = RoutingTable.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise SettingsError(f"routing-file {file} is not a RoutingTable: {error}") from None
    if table.api_keys_secret is not None:
        raise SettingsError(
            f"routing-file {file}: apiKeysSecret {table.api_keys_secret!r} needs Kubernetes; leave it out"
        )
    if not table.variants:
        raise SettingsError(f"routing-file {file}: variants must name at least one variant")
    return table


def _engine(text: str, variants: list[str]) -> Engine:
    address, controlled, control = text.partition(_CONTROL)
    variant, given, url = address.rpartition("=")
    if not given:
        if len(variants) != 1:
            raise SettingsError(f"engine {text!r} must say its variant: VARIANT=URL with one of {', '.join(variants)}")
        variant = variants[0]
    elif variant not in variants:
        raise SettingsError(f"engine {text!r}: variant must be one of {', '.join(variants)}, got {variant!r}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise SettingsError(f"{_ENGINE_FORM}, got {text!r}") from None
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise SettingsError(f"{_ENGINE_FORM}, got {text!r}")
    if controlled:
        try:
            host_and_port(control)
        except ValueError as error:
            raise SettingsError(f"engine {text!r}: control: {error}") from None
    host, number = parts.hostname, 80 if port is None else port
    return Engine(
        id=f"http://{host}:{number}", host=host, port=number, variant=variant, control=control if controlled else None
    )
