"""`python -m e2e.engine`: the engine by hand.

python -m e2e.engine install                            vLLM and the tiny model into the cache
python -m e2e.engine serve --core 0 --cpu-fraction 0.45 --port 8000
                                                        one engine, until Ctrl-C
"""

from __future__ import annotations

import argparse
import signal
import sys

from e2e.engine.environment import EngineError, engine_environment, say
from e2e.engine.server import EngineServer
from e2e.engine.tiny_model import tiny_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m e2e.engine", description="A real vLLM on the CPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="install vLLM and build the tiny model; prints both directories")
    serve = commands.add_parser("serve", help="serve the tiny model on loopback until Ctrl-C or SIGTERM")
    serve.add_argument("--core", type=int, help="bind the engine to this core")
    serve.add_argument("--cpu-fraction", type=float, help="let it use at most this share of a core (root only)")
    serve.add_argument("--port", type=int, help="default: a free one")
    chosen = parser.parse_args()
    # Ctrl-C and SIGTERM both unwind the stack, which ends the engine.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if chosen.command == "install":
            print(engine_environment(), tiny_model(), sep="\n")
            return
        with EngineServer.start(core=chosen.core, cpu_fraction=chosen.cpu_fraction, port=chosen.port) as engine:
            say(f"{engine.model} is served at {engine.url} after {engine.start_s:.0f} s")
            signal.pause()
    except EngineError as error:
        sys.exit(f"engine: {error}")
    except KeyboardInterrupt:
        say("ended")


if __name__ == "__main__":
    main()
