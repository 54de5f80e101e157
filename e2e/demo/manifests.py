"""`examples/demo` with this machine's paths filled in.

Only paths differ from machine to machine; they are written `$ENGINE` and the like in the examples, and everything
else in those files is what a user would apply. A placeholder without a value is an error, not an empty string.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples" / "demo"
CRDS = REPOSITORY / "crds"
SYSTEM = tuple(REPOSITORY / path for path in ("operator/namespace.yaml", "operator/rbac.yaml", "gateway/rbac.yaml"))


def load(path: Path, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """The objects of one example file. Raises KeyError for a placeholder that has no value."""
    text = Template(path.read_text()).substitute(values)
    return [document for document in yaml.safe_load_all(text) if document]
