"""Every metric of operator and gateway is in `docs/metrics.md`, and every one that is there exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("file", "heading"),
    [
        ("operator/llmfleet/operator/metrics.py", "## Operator"),
        ("gateway/llmfleet/gateway/metrics.py", "## Gateway"),
    ],
)
def test_the_metrics_in_the_docs_are_those_in_the_code(file: str, heading: str) -> None:
    code = re.findall(r'"(llmfleet_\w+)"', (ROOT / file).read_text())
    section = (ROOT / "docs/metrics.md").read_text().partition(f"{heading}\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \| (\w+) \|", section, re.MULTILINE)
    # The client library adds the ending of counters itself.
    names = [name.removesuffix("_total") if kind == "counter" else name for name, kind in documented]
    assert code
    assert sorted(names) == sorted(code)
