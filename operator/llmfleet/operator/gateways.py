"""Demand from the gateways: every gateway's admin port, asked every few seconds.

A configured address may stand for many gateways (a headless Service), so its name is resolved each round and each
address is asked. Whether a gateway that does not answer is away or gone, and what its last counts are still worth, is
for `demand.DemandEstimator` to judge: here each one that exists is asked, and an answer or None is passed on. When a
name does not resolve, the round tells nothing about its gateways and the addresses of the round before are kept.

Details are asked for of a part of the services in each round, of all in the first, so that what they cost to tell and
to read does not come at once where there are many.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit, urlunsplit

import httpx2
from pydantic import ValidationError

from llmfleet.api import ALL_SERVICES, DEMAND_PATH, DETAIL_QUERY, DemandReport, Part

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 2.0
REQUEST_TIMEOUT_S = 2.0
DETAILED_SERVICES = 50
"""Services of which details are told in one round, about: a few milliseconds of a gateway and of the operator."""
_MOST_BYTES = 16 * 2**20

OnRound: TypeAlias = Callable[[Mapping[str, DemandReport | None], Part, float], None]
"""Called after each round with its reports, the services that were to be told in detail, and the time."""


class GatewayPoller:
    """Asks all gateways in rounds and hands each round over."""

    def __init__(
        self,
        urls: tuple[str, ...],
        token_file: Path | None,
        on_round: OnRound,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = POLL_INTERVAL_S,
    ) -> None:
        self._urls = urls
        self._token_file = token_file
        self._on_round = on_round
        self._clock = clock
        self._interval_s = interval_s
        self._addresses: dict[str, list[str]] = {}
        self._silent: set[str] = set()
        self._detail = ALL_SERVICES

    async def run(self) -> None:
        """Polls for ever."""
        # A connection for each question: on one that is kept, a load balancer would show one gateway and hide the rest.
        fresh = httpx2.Limits(max_keepalive_connections=0)
        async with httpx2.AsyncClient(timeout=REQUEST_TIMEOUT_S, trust_env=False, limits=fresh) as client:
            while True:
                reports = await self.poll(client)
                self._on_round(reports, self._detail, self._clock())
                self._detail = _next(self._detail, reports)
                await asyncio.sleep(self._interval_s)

    async def poll(self, client: httpx2.AsyncClient) -> dict[str, DemandReport | None]:
        """One round: report by gateway address, None where there was no valid answer in time."""
        resolved = await asyncio.gather(*[self._resolve(url) for url in self._urls])
        targets = [(target, url) for url, addresses in zip(self._urls, resolved, strict=True) for target in addresses]
        headers = self._authorization()
        reports = await asyncio.gather(*[self._ask(client, target, url, headers) for target, url in targets])
        return {target: report for (target, _), report in zip(targets, reports, strict=True)}

    async def _resolve(self, url: str) -> list[str]:
        """One URL for each address of the host."""
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                found = await asyncio.get_running_loop().getaddrinfo(
                    parts.hostname, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
                )
        except (OSError, TimeoutError) as error:
            self._complain(url, error)
            return self._addresses.get(url, [])
        self._silent.discard(url)
        hosts = sorted({str(sockaddr[0]) for *_, sockaddr in found})
        self._addresses[url] = [
            urlunsplit((parts.scheme, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", parts.path, "", ""))
            for host in hosts
        ]
        return self._addresses[url]

    async def _ask(
        self, client: httpx2.AsyncClient, target: str, url: str, headers: Mapping[str, str]
    ) -> DemandReport | None:
        host = urlsplit(url).netloc
        try:
            # The name is kept in Host and in TLS, so that certificates and virtual hosts work by address too.
            response = await client.get(
                target.rstrip("/") + DEMAND_PATH,
                params={DETAIL_QUERY: str(self._detail)},
                headers={**headers, "host": host},
                extensions={"sni_hostname": urlsplit(url).hostname or ""},
            )
            response.raise_for_status()
            if len(response.content) > _MOST_BYTES:
                raise ValueError(f"answer of {len(response.content)} bytes")
            report = DemandReport.model_validate_json(response.content)
        except (httpx2.HTTPError, ValidationError, ValueError) as error:
            self._complain(target, error)
            return None
        self._silent.discard(target)
        return report

    def _authorization(self) -> dict[str, str]:
        if self._token_file is None:
            return {}
        try:
            return {"authorization": f"Bearer {self._token_file.read_text().strip()}"}
        except OSError as error:
            self._complain(str(self._token_file), error)
            return {}

    def _complain(self, what: str, error: Exception) -> None:
        """Logs a failure once until it is over."""
        if what not in self._silent:
            self._silent.add(what)
            log.warning("no demand from a gateway", extra={"gateway": what, "cause": repr(error)})


def _next(detail: Part, reports: Mapping[str, DemandReport | None]) -> Part:
    """The services to ask details of in the next round."""
    services = max((len(report.services) for report in reports.values() if report is not None), default=0)
    parts = max(1, math.ceil(services / DETAILED_SERVICES))
    return Part((detail.number + 1) % parts if detail.of == parts else 0, parts)
