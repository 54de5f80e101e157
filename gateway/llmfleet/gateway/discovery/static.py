"""A fleet without Kubernetes: engines from the command line, optionally with a routing table from a file.

Without a table there is one implicit service that takes every model name and spreads its requests over all engines.
Engines are not probed: one that fails is ejected by the policy and tried again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from llmfleet.api import Buckets, LatencyCoefficients, RoutedVariant, RoutingTable
from llmfleet.gateway.fleet import ANY_MODEL, Engine, Fleet, Service
from llmfleet.gateway.settings import SettingsError

_ENGINE_FORM = "engines must be http://HOST[:PORT], or VARIANT=http://HOST[:PORT] with a routing file"
_VARIANT = "static"
_UNMEASURED = LatencyCoefficients(
    ttft_base_ms=50.0, ttft_ms_per_input_token=0.1, tpot_base_ms=20.0, tpot_ms_per_running=1.0
)
"""Nobody has measured these engines. With equal coefficients only what is in flight decides."""
_BUCKETS = Buckets(
    input_tokens=[128, 512, 2048, 8192, 32768],
    output_tokens=[64, 256, 1024, 4096],
)


def static_fleet(engines: Sequence[str], routing_file: Path | None = None) -> Fleet:
    """The fleet that the settings describe. Raises SettingsError naming the engine or the file."""
    table = _implicit_table(len(engines)) if routing_file is None else _read_table(routing_file)
    names = [variant.name for variant in table.variants]
    for text in engines if routing_file is None else ():
        if text.rpartition("=")[1]:
            raise SettingsError(f"{_ENGINE_FORM}, got {text!r} without a routing file")
    parsed = tuple(_engine(text, names) for text in engines)
    if len({engine.id for engine in parsed}) != len(parsed):
        raise SettingsError("engines must differ from each other")
    return Fleet([Service(table, parsed)])


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
    variant, given, url = text.rpartition("=")
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
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise SettingsError(f"{_ENGINE_FORM}, got {text!r}")
    host, number = parts.hostname, 80 if port is None else port
    return Engine(id=f"http://{host}:{number}", host=host, port=number, variant=variant)
