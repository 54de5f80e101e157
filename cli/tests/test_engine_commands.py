"""`llmfleet requests` and `llmfleet drain` speak to every gateway, and say what one of them refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmfleet.cli.main import run

ONE, TWO = "uid-1@10.0.0.5:8000", "uid-2@10.0.0.6:8000"


class Gateway:
    """The admin port of a gateway that has `requests` on its engines, one less each time it is asked about them."""

    def __init__(self, **requests: int) -> None:
        self.requests = {ONE: requests.get("one", 0), TWO: requests.get("two", 0)}
        self.leaving: set[str] = set()
        self.url = ""

    def engines(self) -> list[dict[str, Any]]:
        shown = [
            {
                "id": engine,
                "service": "team/chat",
                "variant": "slow",
                "revision": "r",
                "migrates": True,
                "leaving": {"reason": "asked", "until": None} if engine in self.leaving else None,
                "requests": count,
            }
            for engine, count in self.requests.items()
        ]
        for engine in self.leaving:
            self.requests[engine] = max(0, self.requests[engine] - 1)
        return shown


@contextmanager
def served(*gateways: Gateway) -> Iterator[list[str]]:
    """The options that name them all."""
    servers = []
    for gateway in gateways:

        class Handler(BaseHTTPRequestHandler):
            of = gateway

            def answer(self) -> None:
                allowed = self.headers["authorization"] == "Bearer secret"
                engine = self.path.removeprefix("/v1/engines/").removesuffix("/drain").replace("%40", "@")
                engine = engine.replace("%3A", ":")
                if not allowed:
                    body: dict[str, Any] = {"error": {"message": "Send the token."}}
                elif self.path == "/v1/engines":
                    body = {"engines": self.of.engines()}
                else:
                    (self.of.leaving.add if self.command == "POST" else self.of.leaving.discard)(engine)
                    body = {}
                content = json.dumps(body).encode()
                self.send_response(200 if allowed else 401)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        gateway.url = f"http://127.0.0.1:{server.server_port}"
        servers.append(server)
    try:
        yield [f"--gateway-url={gateway.url}" for gateway in gateways]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def token(tmp_path: Path) -> str:
    (tmp_path / "token").write_text("secret\n")
    return f"--gateway-token-file={tmp_path / 'token'}"


def test_requests_are_those_of_all_gateways(token: str, capsys: pytest.CaptureFixture[str]) -> None:
    with served(Gateway(one=2, two=1), Gateway(one=3)) as urls:
        assert run(["requests", token, *urls]) == 0
        header, *rows = capsys.readouterr().out.splitlines()
        assert header.split() == ["SERVICE", "VARIANT", "ENGINE", "REQUESTS", "MOVES", "LEAVING"]
        assert [row.split() for row in rows] == [
            ["team/chat", "slow", ONE, "5", "yes"],
            ["team/chat", "slow", TWO, "1", "yes"],
        ]
        assert run(["requests", token, *urls, "-o", "json"]) == 0
        assert [engine["requests"] for engine in json.loads(capsys.readouterr().out)["engines"]] == [5, 1]


@pytest.mark.parametrize("name", [ONE, "uid-1", "10.0.0.5:8000", "10.0.0.5"])
def test_an_engine_is_left_by_every_gateway_and_taken_back(
    token: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gateways = [Gateway(one=1), Gateway()]
    with served(*gateways) as urls:
        assert run(["drain", name, token, *urls]) == 0
        assert [gateway.leaving for gateway in gateways] == [{ONE}, {ONE}]
        assert capsys.readouterr().out == f"engine {ONE}: 1 requests run there\n"
        assert run(["drain", name, token, *urls, "--undo"]) == 0
        assert [gateway.leaving for gateway in gateways] == [set(), set()]


def test_waiting_ends_when_nothing_runs_there_or_with_an_error(
    token: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmfleet.cli.engine_commands._LOOK_S", 0.01)
    with served(Gateway(one=3)) as urls:
        assert run(["drain", ONE, token, *urls, "--wait", "30"]) == 0
        assert capsys.readouterr().out == f"engine {ONE}: 0 requests run there\n"
    with served(Gateway(one=10**6)) as urls:
        assert run(["drain", ONE, token, *urls, "--wait", "0.1"]) == 1
        assert "requests still run there after 0.1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drain", "10.0.0.9"], 'engine "10.0.0.9" is of none of the 2 engines'),
        (["requests", "--gateway-url=ftp://x"], "accepted is http://HOST[:PORT]"),
        (["requests", "--gateway-token-file=/nowhere"], "--gateway-token-file /nowhere: No such file"),
    ],
)
def test_what_cannot_be_is_told_by_name(
    token: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(Gateway()) as urls:
        assert run([arguments[0], token, *urls, *arguments[1:]]) == 1
    assert said in capsys.readouterr().err


def test_a_gateway_that_refuses_or_is_away_is_an_error(
    token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong").write_text("other")
    with served(Gateway()) as urls:
        assert run(["requests", f"--gateway-token-file={tmp_path / 'wrong'}", *urls]) == 1
        assert "401: Send the token." in capsys.readouterr().err
    assert run(["requests", token, *urls]) == 1
    assert urls[0].removeprefix("--gateway-url=") in capsys.readouterr().err
