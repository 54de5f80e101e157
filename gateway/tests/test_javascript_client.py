"""OpenAI's client for JavaScript gets from the gateway what it expects, as the one for Python does.

Runs where Node.js and npm are. The client is installed once per lock file, into the project's cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from gateway_testing.fake_engine import fake_engine
from gateway_testing.harness import PATIENCE_S, eventually, gateway_for

SOURCES = Path(__file__).parent / "javascript"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmfleet"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None, reason="needs Node.js and npm on PATH"
)


@pytest.fixture(scope="module")
def client() -> Path:
    """The script, beside the modules that it imports."""
    lock = (SOURCES / "package-lock.json").read_bytes()
    folder = CACHE / f"javascript-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as fresh:
            made = Path(fresh) / "made"
            made.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(SOURCES / name, made)
            subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=made, check=True)
            # Whole or not at all; where somebody else was faster, theirs is as good.
            try:
                made.rename(folder)
            except OSError:
                assert folder.is_dir()
    # Modules are looked for beside the script, so it is copied there, under a name that only its content has.
    script = SOURCES / "client.mjs"
    copied = folder / f"client-{hashlib.sha256(script.read_bytes()).hexdigest()[:16]}.mjs"
    shutil.copy(script, copied)
    return copied


async def test_the_official_javascript_client_gets_what_it_asks_for(client: Path) -> None:
    async with fake_engine(tokens=3, interval_s=0.01) as engine, gateway_for(engine) as gateway:
        node = await asyncio.create_subprocess_exec(
            "node", client, f"http://127.0.0.1:{gateway.port}", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        async with asyncio.timeout(PATIENCE_S):
            out, said = await node.communicate()
        assert node.returncode == 0, said.decode()
        found = json.loads(out)
        last = engine.requests[-1]
        await eventually(lambda: last.aborted.is_set() or last.finished)
    assert found == {
        "models": ["m"],
        "chat": ["tok tok tok ", 3],
        "stream": {"text": "tok 0tok 1tok 2", "usage": 3, "ids": 1},
        "response": "tok tok tok ",
        "events": [
            "response.created",
            "response.in_progress",
            *["response.output_text.delta"] * 3,
            "response.completed",
        ],
        "embeddings": [[0.5, 0.0], [0.5, 1.0]],
        "unknownModel": ["NotFoundError", 404, "model_not_found", "model"],
        "badParameter": ["BadRequestError", 400, "invalid_request", "stream"],
        "leftEarly": True,
    }
