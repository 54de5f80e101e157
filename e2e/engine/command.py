"""How a CPU engine is started: its arguments, its environment variables and what its pod must see of the machine.

Pure: paths in, lists and dictionaries out. `EngineServer` runs them as they are; the demo writes the same ones into
its LLMService (`engine_args`) and into each GPUType's pod overlay (`engine_env`, `host_mounts`).

Where the time to start went, on one core of a 2.6 GHz server CPU: 51 s with the defaults, 20 s with what is set
here. Compiling modules and looking into the model's class are done once (`environment.py`); there are two processes
that import PyTorch instead of three; and nothing warms up or touches a gigabyte of KV cache. What remains is two
processes importing vLLM, one after the other.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from e2e.engine.environment import vllm_cache

MAX_MODEL_LEN_TOKENS = 4096
MAX_NUM_SEQS = 32
KV_CACHE_BYTES = 64 * 2**20
"""32,768 tokens of the tiny model: eight requests of the greatest length."""


@dataclass(frozen=True)
class EngineLayout:
    """Where things are on this machine.

    environment: what `engine_environment()` returned. model: what `tiny_model()` returned.
    """

    environment: Path
    model: Path

    @property
    def executable(self) -> Path:
        """The `vllm` command."""
        return self.environment / "bin" / "vllm"


@dataclass(frozen=True)
class HostMount:
    """A directory of the machine that the engine's pod needs at the same path."""

    path: Path
    read_only: bool


def engine_args() -> list[str]:
    """Arguments beyond those that say what is served and where (model, name, port, key, context length)."""
    return [
        # The CPU backend takes multiples of 32 and defaults to 128: too coarse for short prompts.
        "--block-size=32",
        "--enforce-eager",
        # With it vLLM also skips the warm-up.
        f"--kv-cache-memory-bytes={KV_CACHE_BYTES}",
        f"--max-num-seqs={MAX_NUM_SEQS}",
        # The worker lives in the engine's process instead of a third one (see VLLM_ENABLE_V1_MULTIPROCESSING).
        "--distributed-executor-backend=uni",
        # After SIGTERM, running requests may finish: the pod's grace period is what ends them.
        "--shutdown-timeout=3600",
        "--disable-uvicorn-access-log",
    ]


def engine_env(layout: EngineLayout, core: int | None) -> dict[str, str]:
    """Environment variables of the engine. `core`: bind it to this core; None: let the kernel choose."""
    variables = {
        "PATH": f"{layout.environment / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        # On CPUs vLLM insists on a worker process of its own unless this is off, because it wants to set OpenMP's
        # variables for that process; here they are set from outside.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # One thread waits for nobody, so nothing spins: an idle engine uses 2 % of a core.
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(vllm_cache(layout.environment)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
        "HF_HUB_OFFLINE": "1",
        # A pod's user has no entry in /etc/passwd, and PyTorch asks for its name.
        "USER": "engine",
    }
    if core is not None:
        # OpenMP binds the main thread when it is loaded; threads and processes started later inherit the core.
        variables |= {"OMP_PLACES": f"{{{core}}}", "OMP_PROC_BIND": "true"}
    return variables


def host_mounts(layout: EngineLayout) -> list[HostMount]:
    """What a pod with an empty image needs from the machine to run the engine, each at the path it has there.

    The dynamic linker and libc, the Python installation behind the environment, the environment and the model.
    Everything read-only; besides, the engine needs a writable /tmp and /dev/shm, and HOME pointing to the former.
    """
    system = [Path(directory) for directory in ("/usr", "/lib", "/lib64", "/bin") if os.path.exists(directory)]
    python = Path(sys.base_prefix).resolve()
    own = [layout.environment, layout.model]
    if not any(python.is_relative_to(directory) for directory in system):
        own.insert(0, python)
    return [HostMount(path, read_only=True) for path in system + own]
