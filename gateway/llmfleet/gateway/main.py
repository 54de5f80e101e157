"""The gateway's process: settings in, discovery, data plane and admin port wired together, a clean end on SIGTERM.

On SIGTERM or SIGINT the gateway stops accepting, lets running requests finish for `drain_s` seconds, then ends what is
left and returns. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import uvloop
from starlette.applications import Starlette

from llmfleet.gateway.admin import admin_app, admin_server
from llmfleet.gateway.discovery import KubernetesDiscovery, static_fleet
from llmfleet.gateway.fleet import Fleet
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.policy import Router
from llmfleet.gateway.reports import ReportScraper
from llmfleet.gateway.settings import Address, GatewaySettings, SettingsError
from llmfleet.gateway.transport import AsyncioDataPlane, Certificate, TlsError, listening_socket

log = logging.getLogger("llmfleet.gateway")


def run(settings: GatewaySettings) -> None:
    """Runs the gateway until it is told to end.

    Raises SettingsError for settings that cannot work, and OSError where an address cannot be listened on.
    """
    _configure_log(settings.log_format)
    uvloop.run(_run(settings))


async def _run(settings: GatewaySettings) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        if ending.is_set():
            raise SystemExit(1)
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    async with gateway(settings) as running:
        log.info("serving on port %d, admin on port %d", running.api_port, running.admin_port)
        told = asyncio.create_task(ending.wait())
        # Should discovery end, the gateway ends too, instead of routing for ever by what it knew last.
        await asyncio.wait({told} | ({running.watching} if running.watching else set()), return_when="FIRST_COMPLETED")
        told.cancel()
        log.info("draining for at most %g s", settings.drain_s)
    if running.watching is not None and not running.watching.cancelled():
        running.watching.result()


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that serves."""

    api_port: int
    admin_port: int
    watching: asyncio.Task[None] | None
    """The discovery, where there is one to do; it ends only by a defect."""


@contextlib.asynccontextmanager
async def gateway(settings: GatewaySettings) -> AsyncIterator[Running]:
    """A running gateway on the current event loop; leaving the context drains it. Raises what `run` raises."""
    metrics = GatewayMetrics()
    router = Router(time.monotonic, uuid.uuid4().hex)
    plane = AsyncioDataPlane(router, settings.limits, metrics)
    listen, admin_listen = (
        Address.parse(settings.listen, "listen"),
        Address.parse(settings.admin_listen, "admin-listen"),
    )
    certificate = _certificate(settings)
    scraper = ReportScraper(router.report, time.monotonic)

    def update(fleet: Fleet) -> None:
        plane.update(fleet)
        scraper.update(fleet)

    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(scraper.close)
        discovery: KubernetesDiscovery | None = None
        watching: asyncio.Task[None] | None = None
        if settings.engines:
            update(static_fleet(settings.engines, settings.routing_file, settings.peer_key_file))
        else:
            discovery = KubernetesDiscovery(
                update,
                metrics,
                namespace=settings.namespace,
                kubeconfig=settings.kubeconfig,
                drain_taints=settings.drain_taints,
            )
            plane.tell_drains(discovery.events.tell)
        app = admin_app(plane=plane, metrics=metrics, token_file=settings.admin_token_file)
        admin_port = await stack.enter_async_context(_serving(app, admin_listen))
        if discovery is not None:
            watching = asyncio.create_task(discovery.run())
            stack.push_async_callback(_cancelled, watching)
        if certificate is not None:
            stack.push_async_callback(_cancelled, asyncio.create_task(certificate.watch()))
        # Last in, first out: discovery and admin port last until the requests have drained.
        api_port = await plane.start(listen.host, listen.port, None if certificate is None else certificate.context)
        stack.push_async_callback(plane.drain, settings.drain_s)
        yield Running(api_port, admin_port, watching)


def _certificate(settings: GatewaySettings) -> Certificate | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    try:
        return Certificate(settings.tls_cert, settings.tls_key)
    except TlsError as error:
        raise SettingsError(str(error)) from None


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


@contextlib.asynccontextmanager
async def _serving(app: Starlette, address: Address) -> AsyncIterator[int]:
    """The admin port while the context lasts; gives the port."""
    listener = listening_socket(address.host, address.port)
    server = admin_server(app)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listener.close()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _configure_log(log_format: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("llmfleet")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
