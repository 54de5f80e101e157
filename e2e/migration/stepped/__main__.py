"""Runs scenarios: those named, or all. See the package."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path

from e2e.migration.stepped import ends, exact, journaled, refusals, reports  # noqa: F401, they register their scenarios
from e2e.migration.stepped.engines import SCENARIOS, Pair


def main() -> None:
    model, dtype, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        key_file = Path(directory) / "peer-key"
        key_file.write_text(secrets.token_hex(32))
        key_file.chmod(0o600)
        pair = Pair(model, dtype, str(key_file))
        print(json.dumps({"started": True}), flush=True)
        for name in names or SCENARIOS:
            begun = time.monotonic()
            try:
                wrong = [*SCENARIOS[name](pair)]
                wrong += pair.leaks()
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
            print(json.dumps({"scenario": name, "wrong": wrong, "seconds": time.monotonic() - begun}), flush=True)
    # vLLM's own threads outlive the interpreter's end and crash in it.
    os._exit(0)


if __name__ == "__main__":
    main()
