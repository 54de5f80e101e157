"""`python -m llmfleet.engine args`: the arguments to add to `vllm serve`.

    vllm serve MODEL $(python -m llmfleet.engine args --listen 0.0.0.0:7070 --peer-key-file /etc/llmfleet/peer-key)

Printed on one line and without quotes, which a shell does not take away again inside `$(...)`: no word has white space.
The platform is the one that vLLM itself would choose here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmfleet.migration.engine_arguments import EngineSettings, Platform, engine_arguments
from llmfleet.migration.handshake import PeerKeyError, read_peer_key


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmfleet.engine", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    args = commands.add_parser("args", help="print the arguments to add to `vllm serve`")
    args.add_argument("--listen", required=True, metavar="HOST:PORT", help="control port")
    args.add_argument("--peer-key-file", required=True, type=Path, metavar="F", help="key that all peers share")
    args.add_argument("--platform", choices=["cpu", "cuda"], help="default: as vLLM finds it")
    chosen = parser.parse_args(arguments)
    try:
        read_peer_key(chosen.peer_key_file)
        settings = EngineSettings(listen=chosen.listen, peer_key_file=str(chosen.peer_key_file))
    except (PeerKeyError, ValueError) as error:
        print(f"llmfleet.engine: {error}", file=sys.stderr)
        return 2
    platform = chosen.platform or found_platform()
    words = engine_arguments(settings, platform=platform, async_scheduling=platform == "cuda")
    if any(character.isspace() for word in words for character in word):
        print("llmfleet.engine: white space in an argument; accepted are paths and addresses without", file=sys.stderr)
        return 2
    print(" ".join(words))
    return 0


def found_platform() -> Platform:
    """What vLLM runs on here."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"


if __name__ == "__main__":
    sys.exit(main())
