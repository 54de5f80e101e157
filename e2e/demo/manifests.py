"""`examples/demo` with this machine's paths filled in.

Only paths differ from machine to machine; they are written `$ENGINE` and the like in the examples, and everything
else in those files is what a user would apply. A placeholder without a value is an error, not an empty string.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml

from e2e.engine.environment import engine_environment
from e2e.engine.tiny_model import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples" / "demo"
CRDS = REPOSITORY / "crds"
NAMESPACE = "demo"
SERVICE, PROFILE, SECRET = "tiny", "tiny-llama", "tiny-api-keys"
SLOW, FAST = GPU_TYPES = ("cpu-slow", "cpu-fast")
SYSTEM = tuple(REPOSITORY / path for path in ("operator/namespace.yaml", "operator/rbac.yaml", "gateway/rbac.yaml"))


def load(path: Path, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """The objects of one example file. Raises KeyError for a placeholder that has no value."""
    text = Template(path.read_text()).substitute(values)
    return [document for document in yaml.safe_load_all(text) if document]


def demo_objects(api_key: str, report: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """All of `examples/demo` in the order in which it is applied: namespace, GPUTypes, ModelProfile, Secret with the
    API key, LLMService. Installs the engine and makes the model where they are not there yet."""
    values = {
        "ENGINE": str(engine_environment(report)),
        "MODEL": str(tiny_model(report)),
        "PYTHON_PREFIX": sys.base_prefix,
        "API_KEY": api_key,
    }
    names = ("namespace", "gputypes", "modelprofile", "llmservice")
    return [manifest for name in names for manifest in load(EXAMPLES / f"{name}.yaml", values)]
