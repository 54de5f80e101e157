"""`python -m llmfleet.engine.launch`: starts vLLM with the plug-in where it can have it, and as it is where it cannot.

    llmfleet.engine.launch --peer-key-file F --arguments JSON -- vllm serve MODEL ...
        │  which vLLM, on what, is there a key?
        ├── all as needed ──► exec vllm serve MODEL ... and the words of JSON
        └── anything not ──►  one line on stderr why, exec vllm serve MODEL ...

An operator knows an image by its name only. Whether the vLLM in it is one that the plug-in was written for is seen
here, before it is given arguments that it would not start with. So nothing is imported but the standard library: what
is not there is a reason, no exception, and the engine loses no time. The process becomes vLLM's, signals and all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VLLM_SERIES = "0.32"
"""Of vLLM, the one that `vllm_internals` was written against."""
_LEAST_KEY_BYTES = 32
"""As `handshake.LEAST_KEY_BYTES`, which costs an import of Pydantic."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Becomes the engine. Raises SystemExit(2) for arguments that are wrong, OSError where there is no such command."""
    parser = argparse.ArgumentParser(prog="python -m llmfleet.engine.launch", description=__doc__.partition("\n")[0])
    parser.add_argument("--peer-key-file", required=True, type=Path, metavar="F", help="key that all peers share")
    parser.add_argument("--arguments", required=True, type=json.loads, metavar="JSON", help="list of words to add")
    parser.add_argument("command", nargs="+", help="the engine's own command, after --")
    chosen = parser.parse_args(arguments)
    command = [*chosen.command]
    missing = why_not(chosen.peer_key_file)
    if missing is None:
        command += chosen.arguments
    else:
        print(f"llmfleet: requests cannot move from or to this engine: {missing}", file=sys.stderr, flush=True)
    os.execvp(command[0], command)


def why_not(peer_key_file: Path) -> str | None:
    """What keeps this machine's vLLM from taking part in migrations; None where nothing is known to."""
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        return f"{sys.executable} has no vLLM"
    release, _, build = installed.partition("+")
    if not f"{release}.".startswith(f"{VLLM_SERIES}."):
        return f"vLLM is {installed}; the plug-in is for {VLLM_SERIES}"
    if "cpu" not in build:
        return f"vLLM is {installed}, which is not for CPUs; the KV cache of other devices cannot be copied yet"
    try:
        size = len(peer_key_file.read_bytes().strip())
    except OSError as error:
        return f"peer key file {peer_key_file}: {error.strerror or error}"
    if size < _LEAST_KEY_BYTES:
        return f"peer key file {peer_key_file} has {size} bytes where at least {_LEAST_KEY_BYTES} are accepted"
    return None


if __name__ == "__main__":
    main()
