"""Every example that can be planned without a cluster is planned, and its figures are those of its source."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest

from llmfleet.api import Percentiles
from llmfleet.cli.main import run
from llmfleet.cli.manifests import read_manifests
from llmfleet.cli.refused import RefusedError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
OTHERWISE = {"invalid", "demo"}
"""Folders that are tested in another way: one by one, below; and by the demo, which fills in paths of the machine."""
PLANNABLE = sorted(
    {
        path.parent
        for path in EXAMPLES.rglob("*.yaml")
        if "kind: LLMService" in path.read_text() and path.parent.name not in OTHERWISE
    }
)
REFUSED_BY_PLAN = {
    path.stem: path.with_suffix(".expected").read_text().splitlines()
    for glob in ("2[0-5]-*.yaml", "4[23]-*.yaml")
    for path in sorted((EXAMPLES / "invalid").glob(glob))
}


@pytest.mark.parametrize(
    ("configurations", "variants", "cost_per_hour"),
    [("default", {"h100-80gb"}, 7.516), ("default, fp8", {"l4-tp2-fp8", "l4-fp8"}, 6.3)],
)
def test_another_precision_is_cheaper_where_the_service_names_it(
    configurations: str,
    variants: set[str],
    cost_per_hour: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (EXAMPLES / "precisions").glob("*.yaml"):
        text = path.read_text().replace("[default, fp8]", f"[{configurations}]")
        (tmp_path / path.name).write_text(text)
    assert run(["plan", "-f", str(tmp_path), "-o", "json"]) == 0
    service = json.loads(capsys.readouterr().out)["services"][0]
    assert {variant["name"] for variant in service["variants"]} == variants
    assert service["costPerHour"] == pytest.approx(cost_per_hour)


def test_the_quickstart_is_among_what_can_be_planned() -> None:
    assert EXAMPLES / "quickstart" in PLANNABLE


@pytest.mark.parametrize("folder", PLANNABLE, ids=lambda f: f.name)
def test_an_example_plans_without_shortfall(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "-f", str(folder), "-o", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["status"] == "optimal"
    assert plan["services"]
    assert all(service["unservedRps"] == 0 for service in plan["services"])


def test_spot_is_cheaper_and_what_a_service_asks_to_survive_is_survived(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "-f", str(EXAMPLES / "spot"), "-o", "json"]) == 0
    services = {service["service"]: service for service in json.loads(capsys.readouterr().out)["services"]}
    types = {name: {variant["gpuType"] for variant in service["variants"]} for name, service in services.items()}
    assert types["careful"] == {"a100-80gb"}
    assert types["thrifty"] == {"a100-spot-a", "a100-spot-b"}
    assert all(service.get("shortfall") is None for service in services.values())
    losses = {name: [loss["gpuTypes"] for loss in service["losses"]] for name, service in services.items()}
    both = ["a100-spot-a", "a100-spot-b"]
    assert losses == {"careful": [], "thrifty": [[name] for name in both], "bold": [both]}
    assert all(loss["unservedRps"] == 0 for service in services.values() for loss in service["losses"])
    cost = {name: service["costPerHour"] for name, service in services.items()}
    assert max(cost["thrifty"], cost["bold"]) < 0.9 * cost["careful"]


def test_what_goes_on_after_a_loss_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "bold", "-n", "spot", "-f", str(EXAMPLES / "spot")]) == 0
    lines = capsys.readouterr().out.splitlines()
    after = lines.index("After the loss of")
    assert lines[after + 1] == "  a100-spot-a and a100-spot-b: 20 of 20 requests per second go on"


def test_the_quickstart_is_served_cheapest_by_a_mix_of_types_and_by_one_that_costs_less_than_the_gap_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["plan", "-f", str(EXAMPLES / "quickstart"), "--inventory", "l4=8,a100-80gb=8", "-o", "json"]
    assert run([*command, "--gap", "0"]) == 0
    cheapest = json.loads(capsys.readouterr().out)["services"][0]
    assert [variant["gpuType"] for variant in cheapest["variants"]] == ["a100-80gb", "h100-80gb"]
    assert cheapest["costPerHour"] < cheapest["nextBest"]["costPerHour"]
    assert run(command) == 0
    decided = json.loads(capsys.readouterr().out)
    assert [variant["gpuType"] for variant in decided["services"][0]["variants"]] == ["h100-80gb"]
    assert decided["status"] == "optimal"
    assert decided["bound"] == pytest.approx(cheapest["costPerHour"])


@pytest.mark.parametrize("name", REFUSED_BY_PLAN)
def test_what_the_operator_would_refuse_is_refused_without_a_cluster_too(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, bad = EXAMPLES / "invalid" / "sound", EXAMPLES / "invalid" / f"{name}.yaml"
    assert run(["plan", "-f", str(sound), "-f", str(bad), "--inventory", "example-gpu=4", "-o", "json"]) == 1
    captured = capsys.readouterr()
    first, *texts = REFUSED_BY_PLAN[name]
    assert first.split()[2] in captured.err
    for text in texts:
        assert text in captured.err
    assert [service["service"] for service in json.loads(captured.out)["services"]] == ["sound"]


def test_the_quickstart_s_profile_is_computed_from_its_measurements() -> None:
    runs = defaultdict(list)
    with (EXAMPLES / "quickstart" / "measured.csv").open() as file:
        for row in csv.DictReader(file):
            cell = (row["hardware"], int(row["prompt_size"]), int(row["token_size"]), int(row["batch_size"]))
            runs[cell].append([float(row[f"{column}_time_ms"]) for column in ("prompt", "token", "e2e")])

    profile = read_manifests([str(EXAMPLES / "quickstart" / "modelprofile.yaml")]).profiles[0]
    points = {
        (measurement.gpu_type, point.input_tokens, point.output_tokens, point.concurrency): point
        for measurement in profile.spec.measurements
        for point in measurement.points
    }
    assert points.keys() == runs.keys()
    for cell, point in points.items():
        prompt, token, end_to_end = zip(*runs[cell], strict=True)
        batch = cell[3]
        assert point.requests == batch * len(runs[cell])
        assert point.requests_per_second == pytest.approx(1000 * batch * len(end_to_end) / sum(end_to_end), abs=1e-4)
        for measured, stated in ((prompt, point.ttft_ms), (token, point.tpot_ms)):
            assert levels(stated) == pytest.approx(levels(nearest_rank(measured)), rel=1e-3)


def nearest_rank(values: tuple[float, ...]) -> Percentiles:
    """Percentiles as the smallest value that is not exceeded by the asked share of values."""
    ordered = sorted(values)
    p50, p90, p95, p99 = (ordered[math.ceil(level / 100 * len(ordered)) - 1] for level in (50, 90, 95, 99))
    return Percentiles(p50=p50, p90=p90, p95=p95, p99=p99, max=ordered[-1])


def levels(percentiles: Percentiles) -> list[float]:
    return [percentiles.p50, percentiles.p90, percentiles.p95, percentiles.p99, percentiles.max]


@pytest.mark.parametrize(
    "path",
    sorted((EXAMPLES / "invalid").glob("[01]*.yaml")) + sorted((EXAMPLES / "invalid").glob("4[014]*.yaml")),
    ids=lambda path: path.stem,
)
def test_what_the_api_server_would_refuse_is_refused_in_a_file_too(path: Path) -> None:
    with pytest.raises(RefusedError, match=path.name) as refused:
        read_manifests([str(path)])
    field = path.with_suffix(".expected").read_text().splitlines()[2].removeprefix(".").split(":")[0]
    section = field.split(".")[0]
    assert "given twice" in str(refused.value) or section in str(refused.value)
