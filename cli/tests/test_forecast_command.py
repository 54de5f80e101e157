"""`llmfleet plan --forecast`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmfleet.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ["plan", "-f", str(ROOT / "examples" / "quickstart"), "--inventory", "l4=8,a100-80gb=8"]


def buckets(capfd: pytest.CaptureFixture[str]) -> list[float]:
    assert run([*EXAMPLE, "-o", "json"]) == 0
    (service,) = json.loads(capfd.readouterr().out)["services"]
    demand: list[float] = service["demand"]
    return demand


def written(path: Path, rps: list[float], **changes: object) -> Path:
    points = [{"afterSeconds": 720, "rps": rps}]
    one = {"namespace": "quickstart", "service": "chat", "percentile": 90, "points": points}
    path.write_text(json.dumps({"schemaVersion": 1, "services": [{**one, **changes}]}))
    return path


def test_what_is_forecast_is_planned_for_and_said(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = written(tmp_path / "forecast.json", [4 * rps for rps in buckets(capfd)])
    assert run([*EXAMPLE, "--forecast", str(file)]) == 0
    said = capfd.readouterr().out
    assert "requests per second are forecast, 90 % sure to be no more, within the 720 s that replicas take" in said


def test_what_cannot_be_used_is_refused_by_file_path_and_value(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "forecast.json"
    for changes, words in (
        ({"percentile": 10}, "services[0].percentile is 10"),
        ({"percentil": 10}, "services[0].percentil is 10"),
        ({"service": "nobody"}, "of quickstart/nobody; accepted are quickstart/chat"),
    ):
        assert run([*EXAMPLE, "--forecast", str(written(file, buckets(capfd), **changes))]) == 1
        refused = capfd.readouterr().err
        assert str(file) in refused
        assert words in refused
    assert run([*EXAMPLE, "--forecast", str(tmp_path / "none.json")]) == 1
    assert "cannot be read" in capfd.readouterr().err
