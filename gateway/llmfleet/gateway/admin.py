"""The admin port: metrics, health, and the demand that the operator plans for.

It has a listener of its own, so that it is never reachable where clients are. `/v1/demand` asks for the bearer token
of a file, which is read at each request: a rotated Secret works at once, and a file that is gone or empty lets nobody
in. `/metrics`, `/healthz` and `/readyz` ask for nothing.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmfleet.api import DEMAND_PATH, DETAIL_QUERY, DemandReport, Part
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.transport.errors import ApiError


def admin_app(
    *,
    demand: Callable[[Part | None], DemandReport],
    ready: Callable[[], bool],
    metrics: GatewayMetrics,
    token_file: Path | None,
) -> Starlette:
    """The admin port's application."""

    async def read_demand(request: Request) -> Response:
        refusal = _refusal(request, token_file)
        if refusal is not None:
            metrics.admin_refused.labels(refusal.code).inc()
            return Response(refusal.body(), refusal.status, media_type="application/json")
        report = demand(Part.parse(request.query_params.get(DETAIL_QUERY, "")))
        return Response(report.model_dump_json(by_alias=True, exclude_none=True), media_type="application/json")

    async def read_metrics(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        is_ready = ready()
        return JSONResponse({"status": "ok" if is_ready else "not ready"}, 200 if is_ready else 503)

    return Starlette(
        routes=[
            Route(DEMAND_PATH, read_demand),
            Route("/metrics", read_metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
        ]
    )


def _refusal(request: Request, token_file: Path | None) -> ApiError | None:
    if token_file is None:
        message = "This gateway runs without an admin token file, so that nobody may read its demand."
        return ApiError(403, message, "permission_error", "no_admin_token")
    try:
        expected = token_file.read_bytes().strip()
    except OSError:
        expected = b""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip().encode()
    if expected and scheme.lower() == "bearer" and hmac.compare_digest(given, expected):
        return None
    message = "Send the token of the admin token file as 'Authorization: Bearer <token>'."
    return ApiError(401, message, "invalid_request_error", "invalid_admin_token")


class AdminServer(uvicorn.Server):
    """Uvicorn without its signal handlers: the gateway decides when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


def admin_server(app: Starlette) -> AdminServer:
    """A server for the admin application; `serve(sockets)` runs it until `should_exit` is set."""
    return AdminServer(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    )
