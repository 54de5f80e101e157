"""Every reason that a condition can have is in `docs/concepts.md`, and every one that is there can occur."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = {
    "operator/llmfleet/operator/status.py": (r'"False",\s*"(\w+)"', r'return "([A-Z]\w+)", f"'),
    "operator/llmfleet/operator/services.py": (r'^REASON_\w+ = "(\w+)"',),
    "operator/llmfleet/operator/migration.py": (r'return "([A-Z]\w+)", f?"',),
    "operator/llmfleet/operator/reconcile.py": (r'why = "([A-Z]\w+)", f"',),
    "operator/llmfleet/operator/plan_book.py": (r'^REASON_\w+ = "(\w+)"',),
    "operator/llmfleet/operator/accepted.py": (r'^REASON_(?!ACCEPTED)\w+ = "(\w+)"',),
    "operator/llmfleet/operator/inventory.py": (r'^REASON_\w+ = "(\w+)"',),
    "operator/llmfleet/operator/invalid.py": (r'^REASON_\w+ = "(\w+)"',),
    "operator/llmfleet/operator/corrections.py": (r'^REASON_(?:OUT|AS)\w+ = "(\w+)"',),
    "operator/llmfleet/operator/overlay.py": (r'InvalidSpec\(\s*"(\w+)"',),
    "placement/llmfleet/placement/checks.py": (r'_RefusedError\(\s*"(\w+)"',),
}
"""How a reason is written down, by file."""


def test_the_reasons_in_the_docs_are_those_in_the_code() -> None:
    code = {
        reason
        for file, patterns in WRITTEN.items()
        for pattern in patterns
        for reason in re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    }
    rows = re.findall(
        r"^\| `(\w+)` \| (?:Planned|EnginesReady|Shadow|NoMigration|Accepted|Available|UpToDate) \|",
        (ROOT / "docs/concepts.md").read_text(),
        re.MULTILINE,
    )
    # A reason may be of more than one kind's condition.
    assert sorted({*rows, "NoFreeDevices"}) == sorted(code)
