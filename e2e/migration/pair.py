"""Two real vLLMs between which requests can move, each on a core of its own.

    with start_pair("float32") as pair:
        pair.a.url, pair.a.control, pair.key

Nothing of vLLM is changed: what makes requests migratable are the arguments that `engine_arguments` prints and a path
on which Python finds our packages. Both engines start at the same time, which takes half a minute on two cores. On one
machine only one pair runs at a time: others wait for the lock.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from e2e.cluster.state import cache_directory, exclusive
from e2e.engine import EngineOptions, EngineServer
from e2e.engine.server import free_port
from llmfleet.migration.engine_arguments import EngineSettings, engine_arguments

CHECKOUT = Path(__file__).resolve().parents[2]
OUR_PACKAGES = ("api", "migration", "engine")
"""Folders with the parts of our namespace package that the plug-in imports."""
MAX_MODEL_LEN_TOKENS = 9216
KV_CACHE_BYTES = 128 * 2**20
"""32,768 tokens of the tiny model in float32, twice as many in bfloat16."""
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Member:
    """One of the engines. control: `host:port` of its control port."""

    name: str
    server: EngineServer
    control: str

    @property
    def url(self) -> str:
        return self.server.url


@dataclass(frozen=True)
class Pair:
    """Both. key: what peers share."""

    a: Member
    b: Member
    key: bytes

    @property
    def members(self) -> tuple[Member, Member]:
        return self.a, self.b


def engine_options(core: int, dtype: DType, settings: EngineSettings | None, more: Sequence[str] = ()) -> EngineOptions:
    """An engine on a core, with the plug-in or (settings None) the same one without it. `more`: further arguments."""
    arguments = [
        f"--dtype={dtype}",
        f"--max-model-len={MAX_MODEL_LEN_TOKENS}",
        f"--kv-cache-memory-bytes={KV_CACHE_BYTES}",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
    ]
    if settings is not None:
        arguments += engine_arguments(settings, platform="cpu", async_scheduling=False)
    arguments += more
    path = os.pathsep.join(str(CHECKOUT / folder) for folder in OUR_PACKAGES)
    return EngineOptions(core=core, arguments=arguments, environment={"PYTHONPATH": path})


@contextlib.contextmanager
def peer_key() -> Iterator[Path]:
    """A fresh key in a file."""
    with tempfile.TemporaryDirectory(prefix="llmfleet-peers-") as directory:
        file = Path(directory) / "key"
        file.write_bytes(secrets.token_hex(32).encode())
        file.chmod(0o600)
        yield file


@contextlib.contextmanager
def start_pair(dtype: DType, more: Sequence[str] = ()) -> Iterator[Pair]:
    """Start both, wait until both are healthy, end both with the block. Raises EngineError with an engine's log."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(_lock_directory()))
        file = stack.enter_context(peer_key())
        controls = [f"127.0.0.1:{free_port()}" for _ in "ab"]
        options = [
            engine_options(
                core,
                dtype,
                EngineSettings(listen=control, peer_key_file=str(file), incoming=128, outgoing=128),
                more,
            )
            for core, control in zip((cores[0], cores[-1]), controls, strict=True)
        ]
        servers = stack.enter_context(EngineServer.start_together(*options))
        a, b = (Member(*each) for each in zip("ab", servers, controls, strict=True))
        yield Pair(a, b, file.read_bytes())


def _lock_directory() -> Path:
    directory = cache_directory() / "engine-pair"
    directory.mkdir(exist_ok=True)
    return directory
