"""The model that tests and the demo serve: built once by the engine environment, kept in the cache.

`tiny_model_builder.py` says what it is. Its directory is named after a hash of the builder and of the engine's
packages, because the same seed may draw other weights with another version of torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from e2e.cluster.state import cache_directory
from e2e.engine.environment import LOCK, EngineError, engine_environment, say

MODEL_NAME = "tiny-llama"
"""Name under which it is served and profiled."""
KV_BYTES_PER_TOKEN = 4 * 2 * 2 * 64 * 2
"""Layers, key and value, key-value heads, head size, bytes of a bfloat16."""

_BUILDER = Path(__file__).with_name("tiny_model_builder.py")
_BUILD_DEADLINE_S = 300


def tiny_model(progress: Callable[[str], None] = say) -> Path:
    """The directory with the tiny model, in Hugging Face's layout. Raises EngineError if it cannot be built."""
    version = hashlib.sha256(_BUILDER.read_bytes() + LOCK.read_bytes()).hexdigest()[:16]
    model = cache_directory() / f"{MODEL_NAME}-{version}"
    if model.exists():
        return model
    python = engine_environment(progress) / "bin" / "python"
    progress(f"building the model {MODEL_NAME} into {model}")
    partial = Path(tempfile.mkdtemp(prefix=f"{MODEL_NAME}-", dir=cache_directory()))
    try:
        built = subprocess.run(
            [python, str(_BUILDER), str(partial)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_BUILD_DEADLINE_S,
        )
        if built.returncode != 0:
            raise EngineError(f"building {MODEL_NAME} failed with exit code {built.returncode}:\n{built.stderr}")
        partial.chmod(0o755)
        try:
            partial.rename(model)
        except OSError:
            if not model.exists():  # another process was faster otherwise
                raise
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"building {MODEL_NAME} took longer than {_BUILD_DEADLINE_S} s") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return model
