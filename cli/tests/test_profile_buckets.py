"""`llmfleet profile --buckets-from`: buckets that suit a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llmfleet.cli.main import run

SIZES = [(100, 1), (110, 20), (105, 22), (4000, 20), (4100, 300)]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "requests.csv"
    rows = "".join(f"{at},{inputs},{outputs}\n" for at, (inputs, outputs) in enumerate(SIZES))
    path.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    return path


def test_the_buckets_of_a_trace_are_printed_as_a_profile_holds_them(
    capfd: pytest.CaptureFixture[str], trace: Path
) -> None:
    assert run(["profile", "--buckets-from", str(trace), "--bucket-excess", "0.1"]) == 0
    out, err = capfd.readouterr()
    assert yaml.safe_load(out) == {"buckets": {"inputTokens": [110, 4100], "outputTokens": [22, 300]}}
    prompts, answers = (10 + 5 + 100) / 8415, (20 + 2 + 2) / 364
    assert err == (
        f"2 input and 2 output edges for the 5 requests of {trace}: prompts are over-estimated by {prompts:.1%}, "
        f"answers by {answers:.1%}\n"
    )


def test_a_tighter_bound_takes_more_edges_and_answers_of_one_token_count_as_two(
    capfd: pytest.CaptureFixture[str], trace: Path
) -> None:
    assert run(["profile", "--buckets-from", str(trace), "--bucket-excess", "0"]) == 0
    found = yaml.safe_load(capfd.readouterr().out)["buckets"]
    assert found == {"inputTokens": [100, 105, 110, 4000, 4100], "outputTokens": [2, 20, 22, 300]}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--buckets-from", "TRACE", "--bucket-excess", "-1"], 1, "excess: got -1; accepted are numbers from 0"),
        (["--buckets-from", "none.csv"], 1, "none.csv: cannot be read: No such file or directory"),
        (["--buckets-from", "TRACE", "--input-tokens", "512"], 2, "give one of -f, --buckets-from, or --input-tokens"),
        (["--buckets-from", "TRACE", "-f", "profile.yaml"], 2, "give one of -f, --buckets-from, or --input-tokens"),
        (["--buckets-from", "TRACE", "--gpu-type", "l4"], 2, "--url"),
        (["--buckets-from", "TRACE", "--url", "http://127.0.0.1:1", "--gpu-type", "l4"], 1, "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_used_is_said(
    capfd: pytest.CaptureFixture[str], trace: Path, options: list[str], code: int, message: str
) -> None:
    assert run(["profile", *(str(trace) if option == "TRACE" else option for option in options)]) == code
    assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())
