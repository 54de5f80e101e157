"""`python -m e2e.demo up|down [--name NAME]`: see the package's first lines."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from types import FrameType

from e2e.cluster.state import ClusterError
from e2e.demo.scenario import Scenario
from e2e.demo.session import RESULT, DemoError, Session, down
from e2e.engine.environment import EngineError


def main(arguments: list[str]) -> int:
    """Exit code 0 only if every claim of the demo held."""
    parser = argparse.ArgumentParser(prog="python -m e2e.demo", description=__doc__)
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument("--name", default="demo", help="name of the demo and of its cluster (default: demo)")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _down(chosen.name) if chosen.command == "down" else _up(chosen.name)
    except (ClusterError, DemoError, EngineError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1


def _down(name: str) -> int:
    down(name)
    print("the demo is down")
    return 0


def _up(name: str) -> int:
    session = Session(name)
    try:
        session.up()
        result = asyncio.run(Scenario(session).run())
    except KeyboardInterrupt:
        session.say("interrupted: ending the demo")
        down(name)
        return 130
    result.write(RESULT)
    print(result.line(), flush=True)
    return 0 if result.ok else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
