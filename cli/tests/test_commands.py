"""`llmfleet plan` and `llmfleet explain` as a user meets them: output, errors, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CompletedProcess

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from llmfleet.api import Condition, FleetPolicySpec, GPUType, LLMService, LLMServiceStatus, Plan
from llmfleet.api.meta import ANNOTATION_PLAN_ID, PLAN_KEY
from llmfleet.cli.cluster import fleet_of
from llmfleet.cli.explanation import explanation_of, in_words
from llmfleet.cli.main import run
from llmfleet.cli.manifests import read_manifests
from llmfleet.cli.planning import inputs_of
from llmfleet.placement import PlanInputs, WarmState, plan

Command = Callable[..., CompletedProcess[str]]

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """`llmfleet` with these arguments: exit code, standard output and standard error."""

    def invoke(*arguments: str | Path) -> CompletedProcess[str]:
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return CompletedProcess(arguments, code, captured.out, captured.err)

    return invoke


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A copy of fleet.yaml that a test may change."""
    copy = tmp_path / "fleet.yaml"
    copy.write_text(Path(__file__).with_name("fleet.yaml").read_text())
    return copy


def one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1


def test_the_table_says_what_serves_what_at_which_cost(command: Command, fleet: Path) -> None:
    outcome = command("plan", "-f", fleet, "--inventory", "slow=4,fast=4")
    assert outcome.returncode == 0
    assert outcome.stderr == ""
    row = next(line.split() for line in outcome.stdout.splitlines() if line.startswith("team/chat "))
    assert row == ["team/chat", "slow", "2", "2", "3", "2.00"]
    assert "per million tokens" in outcome.stdout
    assert "next best 5.00 per hour with 1 fast" in outcome.stdout


def test_table_json_and_yaml_are_the_same_plan(command: Command, fleet: Path) -> None:
    arguments = ("plan", "-f", fleet, "--inventory", "slow=4,fast=4")
    as_json = json.loads(command(*arguments, "-o", "json").stdout)
    as_yaml = yaml.safe_load(command(*arguments, "-o", "yaml").stdout)
    table = command(*arguments).stdout
    timeless = {"solveSeconds": 0}
    assert as_json | timeless == as_yaml | timeless
    assert as_json["planId"] in table
    assert f"{as_json['costPerHour']:.2f} per hour" in table
    for service in as_json["services"]:
        for variant in service["variants"]:
            assert f"{variant['name']} " in table


@pytest.mark.parametrize("arguments", [["plan"], ["explain", "chat"]])
def test_a_plan_that_breaks_its_own_constraints_is_not_shown_and_called_a_bug(
    command: Command, fleet: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def wrong(inputs: PlanInputs, previous: Plan | None) -> tuple[Plan, WarmState]:
        decided, warm = plan(inputs, previous)
        return decided.model_copy(update={"cost_per_hour": 0.01}), warm

    monkeypatch.setattr("llmfleet.cli.planning.plan", wrong)
    outcome = command(*arguments, "-f", fleet, "--inventory", "slow=4,fast=4")
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    assert one_line(outcome.stderr)
    assert "bug of llmfleet" in outcome.stderr
    assert "cost of fleet: 0.01" in outcome.stderr


def test_the_written_plan_is_what_the_published_schema_describes(command: Command, fleet: Path) -> None:
    schema = json.loads((Path(__file__).parents[2] / "docs" / "reference" / "plan.schema.json").read_text())
    for part in (schema, *schema["$defs"].values()):
        part["additionalProperties"] = False  # readers let more fields pass; here each one has to be described
    refused = fleet.read_text().split("---\n")[3].replace("name: chat", "name: lost").replace(": small", ": none")
    fleet.write_text(f"{fleet.read_text()}---\n{refused}")
    for inventory in ("slow=4,fast=4", "slow=1"):
        written = json.loads(command("plan", "-f", fleet, "--inventory", inventory, "-o", "json").stdout)
        jsonschema.validate(written, schema)
    assert written["services"][0]["shortfall"]
    assert written["refusals"]


def test_time_limit_and_gap_win_over_the_policy(fleet: Path) -> None:
    policy = "kind: FleetPolicy\nmetadata: {name: default}\nspec: {optimalityGap: 0.3, solveTimeLimitSeconds: 30}"
    fleet.write_text(f"{fleet.read_text()}---\napiVersion: llmfleet.io/v1alpha1\n{policy}\n")
    manifests = read_manifests([str(fleet)])
    asked, _ = inputs_of(manifests, None, gap=0.0)
    assert (asked.policy.optimality_gap, asked.policy.solve_time_limit_seconds) == (0.0, 30)
    asked, _ = inputs_of(manifests, None, time_limit_s=0.5)
    assert (asked.policy.optimality_gap, asked.policy.solve_time_limit_seconds) == (0.3, 0.5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--time-limit", "0"], "--time-limit 0: input should be greater than or equal to 0.1"),
        (["--time-limit", "nan"], "--time-limit nan: input should be a finite number"),
        (["--gap", "1"], "--gap 1: input should be less than or equal to 0.5"),
    ],
)
def test_a_time_limit_or_gap_out_of_range_is_refused(
    command: Command, fleet: Path, arguments: list[str], named: str
) -> None:
    outcome = command("plan", "-f", fleet, *arguments)
    assert outcome.returncode == 1
    assert one_line(outcome.stderr)
    assert named in outcome.stderr


def test_less_inventory_makes_another_plan(command: Command, fleet: Path) -> None:
    plan = json.loads(command("plan", "-f", fleet, "--inventory", "slow=0,fast=4", "-o", "json").stdout)
    assert [variant["name"] for variant in plan["services"][0]["variants"]] == ["fast"]


def test_a_shortage_is_said_with_what_would_help(command: Command, fleet: Path) -> None:
    outcome = command("plan", "-f", fleet, "--inventory", "slow=1")
    assert outcome.returncode == 0
    assert "SHORT: team/chat is short of 1.2 of 3 requests per second" in outcome.stdout
    assert "would help" in outcome.stdout
    conflict = "cannot all hold while all is served: inventory 0 of GPUType fast, inventory 1 of GPUType slow"
    assert f"team/chat: {conflict}" in outcome.stdout
    assert f"limits that {conflict}" in command("explain", "chat", "-f", fleet, "--inventory", "slow=1").stdout


def test_the_previous_plan_is_kept_where_a_change_saves_too_little(
    command: Command, fleet: Path, tmp_path: Path
) -> None:
    previous = tmp_path / "plan.json"
    previous.write_text(command("plan", "-f", fleet, "--inventory", "fast=1", "-o", "json").stdout)
    dear_slow = fleet.read_text().replace("pricePerHour: {onDemand: 1}", "pricePerHour: {onDemand: 2.48}")
    fleet.write_text(dear_slow)
    stable = ("plan", "-f", fleet, "--inventory", "slow=4,fast=1", "-o", "json")
    assert json.loads(command(*stable).stdout)["costPerHour"] == pytest.approx(4.96)
    assert json.loads(command(*stable, "--previous", previous).stdout)["costPerHour"] == pytest.approx(5.0)


def test_files_may_follow_one_option_as_a_shell_expands_them(command: Command, fleet: Path, tmp_path: Path) -> None:
    documents = fleet.read_text().split("---\n")
    paths = []
    for number, document in enumerate(documents):
        paths.append(tmp_path / f"part-{number}.yaml")
        paths[-1].write_text(document)
    fleet.unlink()
    assert command("plan", "-f", *paths).returncode == 0


def test_a_refused_service_is_printed_beside_the_others_and_ends_with_code_1(command: Command, fleet: Path) -> None:
    service = fleet.read_text().split("---\n")[3]
    fleet.write_text(
        f"{fleet.read_text()}---\n{service.replace('name: chat', 'name: lost').replace(': small', ': none')}"
    )
    outcome = command("plan", "-f", fleet)
    assert outcome.returncode == 1
    assert "team/chat " in outcome.stdout
    assert "REFUSED: ProfileNotFound" in outcome.stdout
    assert one_line(outcome.stderr)
    assert "1 of 2 services refused, first team/lost: ProfileNotFound" in outcome.stderr


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("kind: GPUType", "apiVersion and kind are required"),
        ("apiVersion: v1\nkind: Secret\n", "no LLMService"),
        (": : :", "not valid YAML"),
    ],
)
def test_a_refused_input_is_one_line_and_code_1(command: Command, tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "input.yaml"
    path.write_text(content)
    outcome = command("plan", "-f", path)
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    assert one_line(outcome.stderr)
    assert outcome.stderr.startswith("llmfleet: error: ")
    assert named in outcome.stderr


@pytest.mark.parametrize("content", ["", "{}", '{"planId": "x"}', '{"unknown": 1}'])
def test_a_previous_plan_that_is_none_is_refused(command: Command, fleet: Path, tmp_path: Path, content: str) -> None:
    previous = tmp_path / "plan.json"
    previous.write_text(content)
    outcome = command("plan", "-f", fleet, "--previous", previous)
    assert outcome.returncode == 1
    assert one_line(outcome.stderr)
    assert "not a plan" in outcome.stderr


@pytest.mark.parametrize(
    "arguments", [["plan"], ["plan", "--file", "x"], ["plan", "-f", "x", "-o", "xml"], ["plen"], ["plan", "-f"]]
)
def test_wrong_usage_is_one_line_and_code_2(command: Command, arguments: list[str]) -> None:
    outcome = command(*arguments)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert one_line(outcome.stderr)


def test_explain_says_what_was_chosen_and_what_the_alternatives_cost(command: Command, fleet: Path) -> None:
    outcome = command("explain", "chat", "-n", "team", "-f", fleet, "--inventory", "slow=4,fast=4")
    assert outcome.returncode == 0
    assert outcome.stderr == ""
    assert "team/chat: 3 of 3 requests per second for 2.00 per hour" in outcome.stdout
    assert "2 x slow: 3 requests per second for 2.00 per hour, 75% of what they hold" in outcome.stdout
    assert "1 x fast: 5.00 per hour (+150%)" in outcome.stdout
    assert "fast (price): the cheapest plan with fast costs 5 per hour" in outcome.stdout


def test_explain_says_what_engines_in_service_have_taught(command: Command, fleet: Path) -> None:
    def learnt(**log_ratios: float) -> str:
        objects = list(yaml.safe_load_all(fleet.read_text()))
        profile = next(obj for obj in objects if obj["kind"] == "ModelProfile")
        bins = {
            metric: [{"concurrency": 1.0, "logRatio": ratio, "deviation": 0.0, "weight": 1000.0, "at": 0.0}]
            for metric, ratio in log_ratios.items()
        }
        entry = {"gpuType": "slow", "tensorParallel": 1, "pipelineParallel": 1, "configuration": "default", **bins}
        profile["status"] = {"corrections": [entry]}
        fleet.write_text(yaml.safe_dump_all(objects))
        said = command("explain", "chat", "-f", fleet, "--inventory", "slow=4,fast=4").stdout.splitlines()
        return next((line.strip() for line in said if "engines in service" in line), "")

    assert learnt(tpot=0.1) == "its engines in service: TPOT up to 1.10 times what the profile says"
    assert learnt(tpot=-0.5, ttft=0.05) == "its engines in service: TTFT up to 1.05 times what the profile says"
    assert learnt(tpot=-0.5) == "its engines in service: as fast as the profile says"


def test_explain_in_json_holds_the_figures_of_the_words(command: Command, fleet: Path) -> None:
    arguments = ("explain", "chat", "-n", "team", "-f", fleet, "--inventory", "slow=4,fast=4")
    figures = json.loads(command(*arguments, "-o", "json").stdout)
    assert figures["costPerHour"] == 2.0
    assert [variant["name"] for variant in figures["chosen"]] == ["slow"]


def test_explain_says_what_a_little_more_would_be_worth(command: Command, fleet: Path) -> None:
    outcome = command("explain", "chat", "-f", fleet, "--inventory", "slow=1,fast=1")
    assert "1 more device of GPUType slow: saves 3.00 per hour (2 x slow)" in outcome.stdout
    assert "10 ms more of spec.objective.ttft: nothing" in outcome.stdout
    outcome = command("explain", "chat", "-f", fleet, "--inventory", "slow=1")
    assert "1 more device of GPUType slow: serves 1.2 more requests per second for 1.00 per hour more" in outcome.stdout


def test_explain_says_what_changed_since_an_earlier_plan_and_why(command: Command, fleet: Path, tmp_path: Path) -> None:
    previous = tmp_path / "plan.json"
    previous.write_text(command("plan", "-f", fleet, "-o", "json").stdout)
    arguments = ("explain", "chat", "-f", fleet, "--previous", previous)
    assert "the same replicas for 2.00 per hour" in command(*arguments).stdout
    fleet.write_text(fleet.read_text().replace("requestsPerSecond: 3\n", "requestsPerSecond: 12\n"))
    said = command(*arguments).stdout
    assert "1 x fast for 5.00 per hour, where there were 2 x slow for 2.00" in said
    assert "because: demand went from 3 to 12 requests per second" in said
    figures = json.loads(command(*arguments, "-o", "json").stdout)
    assert figures["changes"]["causes"][0]["decisive"] is True
    assert "changes" not in json.loads(command("explain", "chat", "-f", fleet, "-o", "json").stdout)


def test_a_refused_service_is_explained_by_its_refusal(command: Command, fleet: Path) -> None:
    fleet.write_text(fleet.read_text().replace("profile: small", "profile: none"))
    outcome = command("explain", "chat", "-n", "team", "-f", fleet)
    assert outcome.returncode == 0
    assert "team/chat has no plan: ProfileNotFound" in outcome.stdout


def test_explaining_an_unknown_service_is_refused_with_those_that_there_are(command: Command, fleet: Path) -> None:
    outcome = command("explain", "chat", "-n", "other", "-f", fleet)
    assert outcome.returncode == 1
    assert "no LLMService other/chat; there are team/chat" in outcome.stderr


def test_a_name_is_enough_where_it_is_the_only_one(command: Command, fleet: Path) -> None:
    assert "team/chat: 3 of 3" in command("explain", "chat", "-f", fleet).stdout
    documents = fleet.read_text().split("---\n")
    fleet.write_text("---\n".join([*documents, documents[3].replace("namespace: team", "namespace: second")]))
    outcome = command("explain", "chat", "-f", fleet)
    assert outcome.returncode == 1
    assert "second/chat, team/chat; say which with -n" in outcome.stderr


def test_a_service_without_demand_is_said_to_have_none_and_is_offered_no_types(command: Command, fleet: Path) -> None:
    expected = fleet.read_text()
    fleet.write_text(expected[: expected.index("  traffic:")])
    assert "team/chat: no demand: " in command("plan", "-f", str(fleet), "--inventory", "slow=4,fast=4").stdout
    words = command("explain", "chat", "-f", str(fleet), "--inventory", "slow=4,fast=4").stdout
    assert "nothing: there is no demand" in words
    assert "On one GPU type alone" not in words


def test_options_for_files_need_files(command: Command) -> None:
    outcome = command("explain", "chat", "--inventory", "slow=4")
    assert outcome.returncode == 2
    assert "-f" in outcome.stderr


def test_no_cluster_is_one_line_that_says_what_to_do(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    outcome = command("explain", "chat")
    assert outcome.returncode == 1
    assert outcome.stderr.count("\n") == 1
    assert "set KUBECONFIG" in outcome.stderr


def test_the_plan_in_force_is_explained_and_not_a_new_one(fleet: Path) -> None:
    # The operator measured 3 requests per second and had no `slow` devices. Meanwhile there are some, and the service
    # expects more; 1 x fast for 3 requests per second is still what serves.
    observed = fleet.read_text().replace("mode: expected", "mode: observe")
    fleet.write_text(observed)
    decided, _ = plan(inputs_of(read_manifests([str(fleet)]), "fast=1")[0], None)
    table = {
        "metadata": {"annotations": {ANNOTATION_PLAN_ID: decided.plan_id}},
        "data": {PLAN_KEY: json.dumps(decided.services[0].to_wire())},
    }
    fleet.write_text(observed.replace("requestsPerSecond: 3", "requestsPerSecond: 9"))
    now = read_manifests([str(fleet)])
    live = fleet_of(now.services, now.profiles, _with_status(now.gpu_types), FleetPolicySpec(), [table], NOW)
    assert live.plan.plan_id == decided.plan_id
    explanation = explanation_of(live.plan, live.inputs, now.services[0])
    words = "\n".join(in_words(explanation, live.plan, now.services[0]))
    assert "1 x fast: 3 requests per second for 5.00 per hour" in words
    assert explanation.single_types[0].replicas == {"slow": 2}
    assert "is False" not in words

    overlay = _condition("Planned", "InvalidOverlay", "no such volume")
    broken = _with_conditions(now.services[0], overlay, _condition("Ready", "InvalidOverlay", "no such volume"))
    words = "\n".join(in_words(explanation, live.plan, broken))
    assert words.count("is False") == 1
    assert "Planned is False (InvalidOverlay): no such volume" in words


def test_a_service_without_plan_is_explained_by_its_condition(fleet: Path) -> None:
    service = read_manifests([str(fleet)]).services[0]
    refused = _with_conditions(service, _condition("Planned", "NoInventory", "buy some"))
    assert _words_of([refused], fleet) == "team/chat has no plan: NoInventory\n  buy some"


def test_a_service_that_nobody_planned_says_so(fleet: Path) -> None:
    manifests = read_manifests([str(fleet)])
    assert "no operator has planned" in _words_of(manifests.services, fleet)


def _words_of(services: list[LLMService], fleet: Path) -> str:
    manifests = read_manifests([str(fleet)])
    live = fleet_of(services, manifests.profiles, manifests.gpu_types, FleetPolicySpec(), [], NOW)
    return "\n".join(in_words(explanation_of(live.plan, live.inputs, services[0]), live.plan, services[0]))


def _condition(kind: str, reason: str, message: str) -> Condition:
    return Condition(type=kind, status="False", reason=reason, message=message, last_transition_time=NOW)


def _with_conditions(service: LLMService, *conditions: Condition) -> LLMService:
    return service.model_copy(update={"status": LLMServiceStatus(conditions=list(conditions))})


def _with_status(gpu_types: list[GPUType]) -> list[GPUType]:
    return [
        gpu_type.model_copy(update={"status": gpu_type.status.model_copy(update={"allocatable_devices": 4})})
        for gpu_type in gpu_types
    ]
