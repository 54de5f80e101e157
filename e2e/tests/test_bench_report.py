"""The shape of a benchmark's report, which every area shares."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from e2e.bench.report import Report


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def _written(report: Report, directory: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(report.write(directory).read_text())
    return document


@pytest.mark.usefixtures("quiet")
def test_a_row_holds_median_spread_and_the_comparison_with_its_peer(tmp_path: Path) -> None:
    report = Report("area")
    report.add("latency", "us", [30.0, 10.0, 20.0], target=25.0, peer="theirs", peer_runs=[40.0, 50.0, 30.0])
    document = _written(report, tmp_path)
    assert document.keys() == {"area", "commit", "cpu_model", "load_average", "rows"}
    assert document["rows"] == [
        {
            "name": "latency",
            "value": 20.0,
            "unit": "us",
            "peer": "theirs",
            "peer_value": 40.0,
            "ratio": 0.5,
            "target": 25.0,
            "ok": True,
            "runs": 3,
            "spread": [10.0, 30.0],
            "note": "",
        }
    ]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("runs", "at_most", "ok"), [([6.0], True, True), ([6.1], True, False), ([6.1], False, True), ([5.9], False, False)]
)
def test_a_target_is_a_bound_that_may_be_reached(runs: list[float], at_most: bool, ok: bool) -> None:
    assert Report("area").add("figure", "s", runs, target=6.0, at_most=at_most).ok is ok


@pytest.mark.usefixtures("quiet")
def test_without_a_target_nothing_is_judged() -> None:
    assert Report("area").add("figure", "s", [1.0]).ok is None


@pytest.mark.usefixtures("quiet")
def test_what_could_not_be_measured_stays_in_the_report_and_meets_no_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("area")
    report.add("figure", "s", [], target=6.0, note="needs root")
    [row] = _written(report, tmp_path)["rows"]
    assert (row["value"], row["spread"], row["runs"], row["ok"]) == (None, None, 0, False)
    assert "MISSED" in capsys.readouterr().out


def test_every_row_of_a_busy_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    row = Report("area").add("figure", "s", [1.0], target=6.0, note="warm")
    assert row.ok is True
    assert row.note.startswith("warm; busy machine: load 99.0")
