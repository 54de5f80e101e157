"""Engines that are slower than measured: what gateways tell of them is learnt, planned with, and not forgotten."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from e2e.operator.objects import INPUT_EDGES, OUTPUT_EDGES, TPOT_MS, gpu_type, policy, profile, service
from e2e.operator.rig import Json, Rig
from llmfleet.api import Buckets, DemandReport, ObservedSums, ServiceDemand, VariantLoad
from llmfleet.api.meta import PLAN_KEY

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]

BUCKETS = Buckets(input_tokens=list(INPUT_EDGES), output_tokens=list(OUTPUT_EDGES))
REQUESTS_PER_S = 50
TOKENS = 50


class SlowFleet:
    """The admin port of a gateway whose engines take `factor` times what was measured: kwok's engines answer nobody."""

    def __init__(self, team: str, token_file: Path) -> None:
        self.token_file = token_file
        self.factor = 1.0
        self.admin_url = ""
        self._team = team
        self._started = time.monotonic()
        self._requests = 0
        self._decode_ms = 0.0

    def report(self) -> DemandReport:
        """Cumulative, and more with each second."""
        uptime_s = time.monotonic() - self._started
        new = int(uptime_s * REQUESTS_PER_S) - self._requests
        self._requests += new
        self._decode_ms += new * (TOKENS - 1) * TPOT_MS * self.factor
        n = self._requests
        cell = ObservedSums(0, 1, n, 2.0 * n, 128 * n, 30.0 * n, (TOKENS - 1) * n, self._decode_ms)
        chat = ServiceDemand(
            namespace=self._team,
            service="chat",
            buckets=BUCKETS,
            arrived=[n, 0, 0],
            completed=[n, *[0] * (BUCKETS.count - 1)],
            observed={"slow": [cell] if n else []},
            loads={"slow": VariantLoad(1, 2.0 * uptime_s)},
        )
        return DemandReport(instance_id="slow-fleet", uptime_seconds=uptime_s, services=[chat])

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answers on a free port."""
        fleet = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = fleet.report().model_dump_json(by_alias=True, exclude_none=True).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
            self.admin_url = f"http://127.0.0.1:{server.server_address[1]}"
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield
            server.shutdown()


def test_what_slow_engines_teach_is_planned_with_and_outlives_the_operator(rig: Rig, team: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t")
    engines = SlowFleet(team, token)
    engines.factor = 2.0

    def status() -> Json:
        return dict((rig.get("ModelProfile", "tiny", team) or {}).get("status", {}))

    def conditions() -> dict[str, str]:
        return {c["type"]: f"{c['status']} {c['reason']}" for c in status().get("conditions", [])}

    def promised_ms() -> float:
        found = rig.list("ConfigMap", team)
        plans = [json.loads(one["data"][PLAN_KEY]) for one in found if PLAN_KEY in one.get("data", {})]
        return plans[0]["predicted"]["tpotMs"] if plans else 0.0

    with engines.serving():
        with rig.operator(gateway=engines):
            # A step every 15 windows.
            rig.apply(
                policy(demandWindowSeconds=1, replanIntervalSeconds=1),
                gpu_type("slow", "example.com/slow", 0.6),
                profile(team, {"slow": 2.5}),
                service(team, "chat", 1.0),
            )
            rig.wait("there is a plan", lambda: promised_ms() > 0)
            before_ms = promised_ms()
            rig.wait("something was learnt", lambda: status().get("corrections"))
            assert conditions() == {"Accepted": "True Accepted", "UpToDate": "False ProfileOutdated"}
            assert status()["lastAccepted"]
            rig.wait("an Event says so", lambda: "ProfileOutdated" in rig.events(team, "tiny"))
            rig.wait("plans count with it", lambda: promised_ms() > 1.8 * before_ms)
        learnt = status()["corrections"]
        assert learnt[0]["gpuType"] == "slow"
        engines.factor = 1.0
        with rig.operator():
            # Nothing but the status can tell this one.
            rig.apply(service(team, "other", 1.0))
            rig.wait_ready(team, "other")
            assert promised_ms() > 1.8 * before_ms
            assert status()["corrections"] == learnt
