"""`llmfleet plan --trace` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmfleet.cli.main import run

FLEET = Path(__file__).with_name("fleet.yaml")
FOUR = (  # three gaps in 2 s
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2026-11-16 18:15:46.6805900,400,100\n"
    "2026-11-16 18:15:46.9805900,12,7\n"
    "2026-11-16 18:15:48.0805900,512,128\n"
    "2026-11-16 18:15:48.6805900,200,90\n"
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "four.csv"
    path.write_text(FOUR)
    return path


def plan(capfd: pytest.CaptureFixture[str], *arguments: str, fleet: Path = FLEET) -> tuple[int, Any, str]:
    code = run(["plan", "-f", str(fleet), "--inventory", "slow=4,fast=4", "-o", "json", *arguments])
    captured = capfd.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def test_a_service_is_planned_for_the_trace_at_its_own_rate(capfd: pytest.CaptureFixture[str], trace: Path) -> None:
    code, found, err = plan(capfd, "--trace", f"team/chat={trace}")
    assert code == 0
    assert found["services"][0]["demand"] == pytest.approx([1.5])
    assert err == f"team/chat: 4 requests in 2 s of {trace}, planned at 1.5 requests per second\n"


def test_a_rate_stretches_the_trace(capfd: pytest.CaptureFixture[str], trace: Path) -> None:
    code, found, err = plan(capfd, "--trace", f"chat={trace},rps=7.5")
    assert code == 0
    assert found["services"][0]["demand"] == pytest.approx([7.5])
    assert [(variant["name"], variant["replicas"]) for variant in found["services"][0]["variants"]] == [("fast", 1)]
    assert "planned at 7.5 requests per second" in err


def test_every_request_falls_into_the_bucket_of_its_size(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, trace: Path
) -> None:
    documents = list(yaml.safe_load_all(FLEET.read_text()))
    (profile,) = [document for document in documents if document["kind"] == "ModelProfile"]
    profile["spec"]["buckets"]["inputTokens"] = [100, 256, 512]
    for measurement in profile["spec"]["measurements"]:
        (largest,) = measurement["points"]
        measurement["points"] += [largest | {"inputTokens": 100}, largest | {"inputTokens": 256}]
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(yaml.safe_dump_all(documents))
    code, found, _ = plan(capfd, "--trace", f"chat={trace},rps=8", fleet=fleet)
    assert code == 0
    assert found["services"][0]["demand"] == pytest.approx([2, 2, 4])


def test_what_the_service_cannot_take_is_planned_and_said(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    sizes = [(400, 100), (600, 100), (1000, 100), (400, 100)]
    path.write_text(
        "".join(
            json.dumps({"timestamp": 500 * i, "input_length": a, "output_length": b}) + "\n"
            for i, (a, b) in enumerate(sizes)
        )
    )
    code, found, err = plan(capfd, "--trace", f"chat={path}")
    assert code == 0
    assert found["services"][0]["demand"] == pytest.approx([2.0])
    assert "25.00% exceed spec.model.contextLength 1024: the engine will refuse them" in err
    assert "50.00% lie above the last bucket (512, 128) of ModelProfile small and are planned as it" in err


def test_an_edit_of_the_rate_is_one_of_the_trace(capfd: pytest.CaptureFixture[str], trace: Path) -> None:
    code, found, _ = plan(capfd, "--trace", f"chat={trace}", "--what-if", "rate:chat=x2")
    assert code == 0
    assert (found["services"][0]["before"]["demandRps"], found["services"][0]["after"]["demandRps"]) == (1.5, 3.0)


def test_the_plan_for_a_trace_can_be_explained(capfd: pytest.CaptureFixture[str], trace: Path) -> None:
    files = ["-f", str(FLEET), "--inventory", "slow=4,fast=4"]
    costs = []
    for option in (f"chat={trace}", f"chat={trace},rps=7.5"):
        assert run(["explain", "chat", *files, "--trace", option, "-o", "json"]) == 0
        out, err = capfd.readouterr()
        costs.append(json.loads(out)["costPerHour"])
        assert "4 requests in 2 s" in err
    assert costs == [1.0, 5.0]
    assert run(["explain", "chat", "--trace", f"chat={trace}"]) == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("chat", "--trace chat: accepted is SERVICE=FILE or SERVICE=FILE,rps=R"),
        ("nobody=FILE", "there is no LLMService 'nobody'; there are team/chat"),
        ("chat=FILE,rps=0", "rps is '0'; accepted are requests per second, more than 0 and at most 1e+06"),
        ("chat=FILE,rps=many", "rps is 'many'; accepted are"),
        ("chat=FILE,rps=nan", "rps is 'nan'; accepted are"),
        ("chat=none.csv", "none.csv: cannot be read: No such file or directory"),
        ("chat=BAD", "line 3: ContextTokens: got '12.5'; accepted are whole numbers from 1 to 16777216"),
        (
            "chat=ONE",
            "1 requests at one moment have no rate; accepted are times that differ, or a rate such",
        ),
        ("chat=BYTES", "cannot be read: not UTF-8 text"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_code_1(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, trace: Path, option: str, message: str
) -> None:
    files = {"BAD": FOUR.replace(",12,", ",12.5,"), "ONE": "".join(FOUR.splitlines(keepends=True)[:2])}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe\xff")
    option = option.replace("FILE", str(trace))
    for name in (*files, "BYTES"):
        option = option.replace(name, str(tmp_path / name))
    code, found, err = plan(capfd, "--trace", option)
    assert (code, found) == (1, None)
    assert err.startswith("llmfleet: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_service_has_one_trace(capfd: pytest.CaptureFixture[str], trace: Path) -> None:
    code, _, err = plan(capfd, "--trace", f"chat={trace}", "--trace", f"team/chat={trace}")
    assert code == 1
    assert "team/chat has a trace already; accepted is one for each" in err
