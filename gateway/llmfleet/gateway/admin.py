"""The admin port: metrics, health, the demand that the operator plans for, and engines that are to leave.

    GET    /v1/engines               every engine, whether it leaves, and this gateway's requests there
    POST   /v1/engines/<id>/drain    no new requests; those that run move away
    DELETE /v1/engines/<id>/drain    new requests again
    GET    /v1/engines/<id>/requests this gateway's requests there
    POST   /v1/requests/<id>/migrate?to=<engine>    one of them moves; without `to` where a drain would send it

It has a listener of its own, so that it is never reachable where clients are. All of `/v1/` asks for the bearer token
of a file, which is read at each request: a rotated Secret works at once, and a file that is gone or empty lets nobody
in. `/metrics`, `/healthz` and `/readyz` ask for nothing.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmfleet.api import DEMAND_PATH, DETAIL_QUERY, Part
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.moving.asked import CannotMoveError, NotFoundError
from llmfleet.gateway.transport.dataplane import DataPlane, EngineState
from llmfleet.gateway.transport.errors import ApiError


def admin_app(
    *,
    plane: DataPlane,
    metrics: GatewayMetrics,
    token_file: Path | None,
) -> Starlette:
    """The admin port's application."""

    def refused(request: Request) -> Response | None:
        refusal = _refusal(request, token_file)
        if refusal is None:
            return None
        metrics.admin_refused.labels(refusal.code).inc()
        return _error(refusal)

    async def read_demand(request: Request) -> Response:
        if (refusal := refused(request)) is not None:
            return refusal
        report = plane.demand(Part.parse(request.query_params.get(DETAIL_QUERY, "")))
        return Response(report.model_dump_json(by_alias=True, exclude_none=True), media_type="application/json")

    async def read_metrics(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        is_ready = plane.ready()
        return JSONResponse({"status": "ok" if is_ready else "not ready"}, 200 if is_ready else 503)

    async def read_engines(request: Request) -> Response:
        return refused(request) or JSONResponse({"engines": [_shown(state) for state in plane.engines()]})

    async def read_requests(request: Request) -> Response:
        if (refusal := refused(request)) is not None:
            return refusal
        engine_id = request.path_params["engine"]
        try:
            return JSONResponse({"requests": [asdict(state) for state in plane.requests(engine_id)]})
        except KeyError:
            return _error(_no_engine(engine_id, plane))

    async def migrate(request: Request) -> Response:
        if (refusal := refused(request)) is not None:
            return refusal
        try:
            engine_id, outcome = await plane.migrate(request.path_params["request"], request.query_params.get("to"))
        except NotFoundError as error:
            return _error(ApiError(404, f"{error}.", "invalid_request_error", "not_found"))
        except CannotMoveError as error:
            return _error(ApiError(409, f"{error}.", "invalid_request_error", "cannot_move"))
        return JSONResponse(
            {
                "engine": engine_id,
                "result": outcome.result,
                "reason": outcome.reason,
                "detail": " ".join(filter(None, (outcome.field, outcome.detail))),
            }
        )

    async def drain(request: Request) -> Response:
        if (refusal := refused(request)) is not None:
            return refusal
        engine_id = request.path_params["engine"]
        try:
            (plane.leave if request.method == "POST" else plane.stay)(engine_id)
        except KeyError:
            return _error(_no_engine(engine_id, plane))
        [state] = [state for state in plane.engines() if state.engine.id == engine_id]
        return JSONResponse(_shown(state), 202 if request.method == "POST" else 200)

    return Starlette(
        routes=[
            Route(DEMAND_PATH, read_demand),
            Route("/v1/engines", read_engines),
            Route("/v1/engines/{engine:path}/drain", drain, methods=["POST", "DELETE"]),
            Route("/v1/engines/{engine:path}/requests", read_requests),
            Route("/v1/requests/{request:path}/migrate", migrate, methods=["POST"]),
            Route("/metrics", read_metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
        ]
    )


def _shown(state: EngineState) -> dict[str, object]:
    engine, leaving = state.engine, state.engine.leaving
    return {
        "id": engine.id,
        "service": state.service,
        "variant": engine.variant,
        "revision": engine.revision,
        "migrates": engine.control is not None,
        "leaving": None if leaving is None else {"reason": leaving.reason, "until": leaving.until_s},
        "requests": state.requests,
    }


def _no_engine(engine_id: str, plane: DataPlane) -> ApiError:
    known = len(plane.engines())
    message = f"There is no engine {engine_id!r}; GET /v1/engines lists those that there are, {known} now."
    return ApiError(404, message, "invalid_request_error", "engine_not_found")


def _error(error: ApiError) -> Response:
    return Response(error.body(), error.status, media_type="application/json")


def _refusal(request: Request, token_file: Path | None) -> ApiError | None:
    if token_file is None:
        message = "This gateway runs without an admin token file, so that nobody may ask it anything."
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
