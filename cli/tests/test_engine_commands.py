"""`llmfleet requests`, `drain` and `migrate` speak to every gateway, and say what one of them refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from llmfleet.cli.main import run

ONE, TWO = "uid-1@10.0.0.5:8000", "uid-2@10.0.0.6:8000"


class Gateway:
    """The admin port of a gateway that has `requests` on its engines, one less each time it is asked about them."""

    def __init__(self, **requests: int) -> None:
        self.requests = {ONE: requests.get("one", 0), TWO: requests.get("two", 0)}
        self.leaving: set[str] = set()
        self.streams = {"r1": ONE} if requests.get("one") else {}
        self.outcome = {"result": "moved", "reason": None, "detail": ""}
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

    def listed(self, path: str) -> list[dict[str, Any]]:
        shown = {"service": "team/chat", "streamed": True, "answered_tokens": 7, "can_move": True, "moving": False}
        there = [name for name, engine in self.streams.items() if engine in unquote(path)]
        return [{"id": name, "engine": self.streams[name], **shown} for name in there]

    def migrated(self, path: str) -> dict[str, Any]:
        name, _, to = path.removeprefix("/v1/requests/").partition("/migrate")
        if name not in self.streams:
            return {"error": {"message": "no such request"}}
        if self.outcome["result"] == "moved":
            self.streams[name] = to.removeprefix("?to=") or TWO
        return {"engine": self.streams[name], **self.outcome}


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
                elif self.path.endswith("/requests"):
                    body = {"requests": self.of.listed(self.path)}
                elif "/migrate" in self.path:
                    body = self.of.migrated(unquote(self.path))
                elif self.path == "/v1/engines":
                    body = {"engines": self.of.engines()}
                else:
                    (self.of.leaving.add if self.command == "POST" else self.of.leaving.discard)(engine)
                    body = {}
                content = json.dumps(body).encode()
                self.send_response(401 if not allowed else 404 if "error" in body else 200)
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


def test_the_requests_of_one_engine_are_shown_one_by_one(token: str, capsys: pytest.CaptureFixture[str]) -> None:
    with served(Gateway(one=1), Gateway()) as urls:
        assert run(["requests", "10.0.0.5", token, *urls]) == 0
        header, row = capsys.readouterr().out.splitlines()
        assert header.split() == ["REQUEST", "SERVICE", "ANSWERED", "MOVES"]
        assert row.split() == ["r1", "team/chat", "~7", "yes"]
        assert run(["requests", "10.0.0.6", token, *urls, "-o", "json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"requests": []}


@pytest.mark.parametrize("to", [[], ["--to", "10.0.0.6"]])
def test_a_request_is_moved_by_the_gateway_that_has_it(
    token: str, to: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    gateways = [Gateway(), Gateway(one=1)]
    with served(*gateways) as urls:
        assert run(["migrate", "r1", token, *urls, *to]) == 0
    assert gateways[1].streams == {"r1": TWO}
    assert capsys.readouterr().out == f"request r1: moved, engine {TWO}\n"


def test_a_request_that_stays_or_is_nowhere_is_an_error(token: str, capsys: pytest.CaptureFixture[str]) -> None:
    gateway = Gateway(one=1)
    gateway.outcome = {"result": "stayed", "reason": "no_room", "detail": "9 blocks are needed, 2 are free"}
    with served(gateway) as urls:
        assert run(["migrate", "r1", token, *urls]) == 1
        said = f'request "r1" stayed, engine {ONE}: no_room 9 blocks are needed, 2 are free'
        assert said in capsys.readouterr().err
        assert run(["migrate", "r2", token, *urls]) == 1
        assert 'request "r2" runs at none of the 1 gateways' in capsys.readouterr().err
        assert run(["migrate", "r1", token, *urls, "--to", "10.0.0.9"]) == 1
        assert 'engine "10.0.0.9" is of none' in capsys.readouterr().err
