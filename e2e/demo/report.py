"""The demo's result: one line for a person, the same as JSON for a machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoResult:
    """What the demo saw. Costs are in the currency of the example's price book."""

    services: int
    variants: int
    cost_per_hour: float
    streamed_tokens: int
    failed_requests: int
    background_requests: int
    moved_streams: int
    """Streams that went on at another engine in the middle of their answer."""
    changed_answers: int
    """Answers during the change that are not what the same question gets undisturbed."""
    first_plan: dict[str, int]
    second_plan: dict[str, int]
    apply_to_first_token_s: float
    engine_start_s: float
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether every claim held."""
        return not self.problems

    def line(self) -> str:
        """The demo's last line."""
        verdict = "demo ok" if self.ok else "demo failed"
        return (
            f"{verdict}: services={self.services} variants={self.variants} cost_per_hour={self.cost_per_hour:g}"
            f" streamed_tokens={self.streamed_tokens} failed_requests={self.failed_requests}"
            f" moved_streams={self.moved_streams} changed_answers={self.changed_answers}"
        )

    def write(self, path: Path) -> None:
        """Writes the result as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"ok": self.ok, **asdict(self)}, indent=2) + "\n")
