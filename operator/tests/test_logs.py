"""What a log line looks like, and what never gets into one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from llmfleet.operator import logs


@pytest.fixture
def root_logger() -> Iterator[None]:
    """Puts the root logger back as pytest had it."""
    handlers, level = logging.root.handlers[:], logging.root.level
    levels = {name: logging.getLogger(name).level for name in logs._NOISY}
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.mark.usefixtures("root_logger")
def test_a_json_line_has_the_sentence_and_the_fields_apart(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "INFO")
    logging.getLogger("llmfleet.test").info("applied", extra={"service": "team/chat", "kind": "Deployment"})
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["msg"], line["service"], line["kind"]) == ("info", "applied", "team/chat", "Deployment")
    assert line["time"].endswith("Z")


@pytest.mark.usefixtures("root_logger")
def test_an_error_is_one_json_line_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "INFO")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("llmfleet.test").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: broken" in json.loads(line)["error"]


@pytest.mark.usefixtures("root_logger")
def test_a_console_line_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console", "INFO")
    logging.getLogger("llmfleet.test").warning("applied", extra={"service": "team/chat"})
    assert capsys.readouterr().err.split()[1:] == ["WARNING", "applied", "service=team/chat"]


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize("library", ["httpx", "httpx2", "httpcore2.http11", "aiohttp.access", "kopf.objects"])
def test_libraries_that_log_requests_are_held_back_even_when_debugging(
    library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("json", "DEBUG")
    logging.getLogger(library).info("GET / authorization: Bearer secret")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("root_logger")
def test_an_outage_is_not_logged_at_every_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "INFO")
    for attempt in range(1, 205):
        logging.getLogger("kopf.clients").error(f"Request attempt #{attempt} failed; will retry: GET /pods")
    attempts = [json.loads(line)["msg"].split()[2] for line in capsys.readouterr().err.splitlines()]
    assert attempts == ["#3", "#100", "#200"]
