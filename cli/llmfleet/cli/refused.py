"""The one exception of the command line: an input that cannot be used, said in one line."""

from __future__ import annotations

import json
from typing import Any

_SHOWN = 80


class RefusedError(Exception):
    """Refused input. The message is one line that names where, which field, which value and what is accepted."""


def shown(value: Any) -> str:
    """A value as an error message shows it: JSON, at most a few words of it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
