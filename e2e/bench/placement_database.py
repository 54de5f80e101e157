"""The prior against the same measured rows, in an environment of its own: `aiconfigurator-core` is half a gigabyte.

    predicted() -> (TTFT, TPOT) in ms of every row, NaN where the database does not have the configuration

The environment is built once, in the cache. Inside it this module is run as a program: it reads the rows, asks
`placement/performance/prior.py`, and prints what it was told as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from e2e.bench.placement_silicon import VERSION, Silicon, download, silicon
from e2e.cluster.state import cache_directory
from llmfleet.placement.performance.model import FloatArray
from llmfleet.placement.performance.prior import kernel_prior

_CHECKOUT = Path(__file__).parents[2]
_PACKAGES = ("pydantic", "numpy", "pulp", "highspy")


def predicted() -> tuple[FloatArray, FloatArray]:
    """(TTFT, TPOT) of every row of `silicon`."""
    paths = [str(_CHECKOUT / part) for part in ("", "api", "placement")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [str(_environment()), "-m", "e2e.bench.placement_database"]
    done = subprocess.run(command, env=environment, cwd=_CHECKOUT, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return np.array(found["ttft_ms"], dtype=float), np.array(found["tpot_ms"], dtype=float)


def _environment() -> Path:
    folder = cache_directory() / f"aiconfigurator-core-{VERSION}" / "venv"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", str(download()), *_PACKAGES], check=True)
        ready.touch()
    return python


def _asked(rows: Silicon) -> dict[str, list[float | None]]:
    ttft_ms, tpot_ms = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for index, (line, model) in enumerate(zip(rows.rooflines, rows.models, strict=True)):
        prior = kernel_prior(model, line)
        if prior is None:
            continue
        here = rows.configuration == index
        found = prior.predict(rows.input_tokens[here], rows.output_tokens[here], rows.concurrency[here])
        ttft_ms[here], tpot_ms[here] = found.ttft_ms, found.tpot_ms
    return {
        name: [value if np.isfinite(value) else None for value in values.tolist()]
        for name, values in (("ttft_ms", ttft_ms), ("tpot_ms", tpot_ms))
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(_asked(silicon(download()))))
