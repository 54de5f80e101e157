"""`llmfleet requests`, `drain`, `migrate`: what runs on which engine; an engine left, or a request moved, by hand.

    gateways' admin ports ──GET /v1/engines──► requests by engine, added up over gateways
    drain ──POST or DELETE /v1/engines/<id>/drain──► every gateway
    migrate ──POST /v1/requests/<id>/migrate──► the gateway that has the request

A gateway knows its own streams and moves its own, so all of them are asked. An address may stand for many (a headless
Service); its name is resolved and each address is asked. What one gateway refuses, or one that does not answer, is an
error: an engine that only half of them leave is not left.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote, urlsplit

import typer

from llmfleet.cli.refused import RefusedError, shown

if TYPE_CHECKING:
    import httpx

_TIMEOUT_S = 10.0
_MIGRATION_S = 120.0
"""A long context takes its time to be copied; the gateway gives up before."""
_LOOK_S = 1.0
_GOES_ON = ("moved", "resumed", "finished")
"""Results of a migration after which there is nothing to complain of."""

GatewayUrls = Annotated[
    list[str],
    typer.Option(
        metavar="URL",
        envvar="LLMFLEET_GATEWAY_URLS",
        help="Admin address of gateways; a name stands for all its addresses. May be repeated.",
        show_default=False,
    ),
]
TokenFile = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        envvar="LLMFLEET_GATEWAY_TOKEN_FILE",
        help="Bearer token of the gateways' admin ports.",
        show_default=False,
    ),
]


def requests(
    gateway_url: GatewayUrls,
    gateway_token_file: TokenFile,
    engine: Annotated[
        str | None,
        typer.Argument(metavar="[ENGINE]", help="Show each request of this engine.", show_default="a line per engine"),
    ] = None,
    output: Annotated[Literal["table", "json"], typer.Option("-o", "--output", help="Form of the answer.")] = "table",
) -> None:
    """Show how many requests run on each engine, and which engines leave; or each request of one engine.

    A request has the id that its client got as `x-request-id`. Nothing of what it asks is shown.

    \b
    Examples:
      llmfleet requests --gateway-url http://llmfleet-gateway-admin:8081 --gateway-token-file token
      llmfleet requests 10.0.3.7 --gateway-url http://llmfleet-gateway-admin:8081 --gateway-token-file token
    """
    gateways = _gateways(gateway_url)
    with _client(gateway_token_file) as client:
        engines = _engines(client, gateways)
        if engine is not None:
            found = _the_one(engine, engines)
            listed = [one for gateway in gateways for one in _requests(client, gateway, found)]
            if output == "json":
                print(json.dumps({"requests": listed}, indent=2))
            else:
                _print_requests(listed)
            return
    if output == "json":
        print(json.dumps({"engines": engines}, indent=2))
    else:
        _print_table(engines)


def drain(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Id, address or pod uid, as `requests` shows it.")],
    gateway_url: GatewayUrls,
    gateway_token_file: TokenFile,
    undo: Annotated[bool, typer.Option("--undo", help="Give it new requests again.")] = False,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait until nothing runs there.", min=0)
    ] = 0.0,
) -> None:
    """Leave an engine: it gets no new requests, and those that run on it move to others.

    Nothing happens to its pod. What cannot move runs to its end. It holds until it is undone, in the gateways that run
    now.

    \b
    Examples:
      llmfleet drain 10.0.3.7:8000 --gateway-url http://llmfleet-gateway-admin:8081 --gateway-token-file token --wait 60
    """
    gateways = _gateways(gateway_url)
    with _client(gateway_token_file) as client:
        found = _the_one(engine, _engines(client, gateways))
        for gateway in gateways:
            path = f"/v1/engines/{quote(found, safe='')}/drain"
            _ask(client, gateway, path, "DELETE" if undo else "POST", absent_is_fine=True)
        if undo:
            return
        left = _running(client, gateways, found)
        deadline_s = time.monotonic() + wait
        while left and time.monotonic() < deadline_s:
            time.sleep(_LOOK_S)
            left = _running(client, gateways, found)
    print(f"engine {found}: {left} requests run there")
    if left and wait:
        raise RefusedError(f"engine {found}: {left} requests still run there after {wait:g} s")


def migrate(
    request: Annotated[
        str, typer.Argument(metavar="REQUEST", help="Its `x-request-id`, as `requests ENGINE` shows it.")
    ],
    gateway_url: GatewayUrls,
    gateway_token_file: TokenFile,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE", help="Where it goes on.", show_default="the engine to which a drain would send it"
        ),
    ] = None,
) -> None:
    """Move a running request to another engine. Its client notices nothing.

    It ends with an error where the request stays: where the other engine has no room, for one.

    \b
    Examples:
      llmfleet migrate 7f3c1e --to 10.0.3.8 --gateway-url http://llmfleet-gateway-admin:8081 --gateway-token-file token
    """
    gateways = _gateways(gateway_url)
    with _client(gateway_token_file) as client:
        path = f"/v1/requests/{quote(request, safe='')}/migrate"
        if to is not None:
            path += f"?to={quote(_the_one(to, _engines(client, gateways)), safe='')}"
        answers = [
            _ask(client, gateway, path, "POST", absent_is_fine=True, timeout_s=_MIGRATION_S) for gateway in gateways
        ]
    found = [answer for answer in answers if answer is not None]
    if not found:
        raise RefusedError(f"request {shown(request)} runs at none of the {len(gateways)} gateways")
    try:
        engine, result = str(found[0]["engine"]), str(found[0]["result"])
        why = " ".join(filter(None, (found[0]["reason"], found[0]["detail"])))
    except (KeyError, TypeError):
        raise RefusedError(f"gateway {gateways[0][0]}: the answer is no outcome: is it of this version?") from None
    if result not in _GOES_ON:
        raise RefusedError(f"request {shown(request)} {result}, engine {engine}: {why}")
    print(f"request {request}: {result}, engine {engine}")


def _client(token_file: Path) -> httpx.Client:
    import httpx

    try:
        token = token_file.read_text().strip()
    except OSError as error:
        raise RefusedError(f"--gateway-token-file {token_file}: {error.strerror or error}") from None
    # Past the environment's proxy: admin ports are inside the cluster.
    return httpx.Client(timeout=_TIMEOUT_S, trust_env=False, headers={"authorization": f"Bearer {token}"})


def _gateways(urls: Sequence[str]) -> list[tuple[str, str]]:
    """(address, its name) of every gateway."""
    found: dict[str, str] = {}
    for url in urls:
        try:
            parts = urlsplit(url)
            port = parts.port or 80
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.scheme != "http" or not parts.hostname:
            raise RefusedError(f"--gateway-url {shown(url)}: accepted is http://HOST[:PORT]")
        try:
            resolved = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise RefusedError(f"--gateway-url {url}: {error.strerror or error}") from None
        for host in sorted({str(address[0]) for *_, address in resolved}):
            found[f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"] = parts.netloc
    return list(found.items())


def _ask(
    client: httpx.Client,
    gateway: tuple[str, str],
    path: str,
    method: str = "GET",
    *,
    absent_is_fine: bool = False,
    timeout_s: float = _TIMEOUT_S,
) -> Any:
    import httpx

    address, name = gateway
    try:
        answer = client.request(method, address + path, headers={"host": name}, timeout=timeout_s)
    except httpx.HTTPError as error:
        raise RefusedError(f"gateway {address}: {error or type(error).__name__}") from None
    if answer.status_code == httpx.codes.NOT_FOUND and absent_is_fine:
        return None
    if answer.is_error:
        raise RefusedError(f"gateway {address}: {answer.status_code}: {_said(answer)}")
    try:
        return answer.json()
    except ValueError:
        raise RefusedError(f"gateway {address}: the answer is no JSON: is this its admin port?") from None


def _said(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.reason_phrase


def _engines(client: httpx.Client, gateways: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Every engine that a gateway knows, with the requests of all gateways; it leaves if it does so for one of them."""
    found: dict[str, dict[str, Any]] = {}
    for gateway in gateways:
        answer = _ask(client, gateway, "/v1/engines")
        try:
            for engine in answer["engines"]:
                known = found.setdefault(engine["id"], {**engine, "requests": 0})
                known["requests"] += engine["requests"]
                known["leaving"] = known["leaving"] or engine["leaving"]
        except (KeyError, TypeError):
            raise RefusedError(f"gateway {gateway[0]}: the answer lists no engines: is it of this version?") from None
    return sorted(found.values(), key=lambda engine: (engine["service"], engine["variant"], engine["id"]))


def _the_one(wanted: str, engines: Sequence[dict[str, Any]]) -> str:
    """Id of the engine that was named by its id, its address with or without port, or its pod's uid."""

    def names(engine_id: str) -> set[str]:
        uid, _, address = engine_id.partition("@")
        return {engine_id, uid, address, address.rpartition(":")[0]} - {""}

    found = [str(engine["id"]) for engine in engines if wanted in names(str(engine["id"]))]
    if len(found) != 1:
        known = ", ".join(str(engine["id"]) for engine in engines[:5]) or "none"
        problem = "is of several" if found else "is of none"
        raise RefusedError(f"engine {shown(wanted)} {problem} of the {len(engines)} engines: {known}")
    return found[0]


def _requests(client: httpx.Client, gateway: tuple[str, str], engine_id: str) -> list[dict[str, Any]]:
    answer = _ask(client, gateway, f"/v1/engines/{quote(engine_id, safe='')}/requests", absent_is_fine=True)
    try:
        return [] if answer is None else list(answer["requests"])
    except (KeyError, TypeError):
        raise RefusedError(f"gateway {gateway[0]}: the answer lists no requests: is it of this version?") from None


def _running(client: httpx.Client, gateways: Sequence[tuple[str, str]], engine_id: str) -> int:
    return sum(int(engine["requests"]) for engine in _engines(client, gateways) if engine["id"] == engine_id)


def _print_table(engines: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("SERVICE", "VARIANT", "ENGINE", "REQUESTS", "MOVES", "LEAVING"):
        table.add_column(column, justify="right" if column == "REQUESTS" else "left", overflow="fold")
    for engine in engines:
        leaving = engine["leaving"]
        table.add_row(
            str(engine["service"]),
            str(engine["variant"]),
            str(engine["id"]),
            str(engine["requests"]),
            "yes" if engine["migrates"] else "no",
            str(leaving["reason"]) if leaving else "",
        )
    Console(file=sys.stdout, width=200 if not sys.stdout.isatty() else None).print(table)


def _print_requests(requests: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("REQUEST", "SERVICE", "ANSWERED", "MOVES"):
        table.add_column(column, justify="right" if column == "ANSWERED" else "left", overflow="fold")
    for request in requests:
        moves = "now" if request["moving"] else "yes" if request["can_move"] else "no"
        table.add_row(str(request["id"]), str(request["service"]), f"~{request['answered_tokens']}", moves)
    Console(file=sys.stdout, width=200 if not sys.stdout.isatty() else None).print(table)
