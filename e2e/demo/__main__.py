"""`python -m e2e.demo up | down`: see the package's first lines."""

from __future__ import annotations

import asyncio
import signal
import sys
from types import FrameType

from e2e.cluster.state import ClusterError
from e2e.demo.scenario import Scenario
from e2e.demo.session import RESULT, DemoError, Session, down

USAGE = "usage: python -m e2e.demo up | down"


def main(arguments: list[str]) -> int:
    """Exit code 0 only if every claim of the demo held."""
    if arguments == ["down"]:
        down()
        print("the demo is down")
        return 0
    if arguments != ["up"]:
        print(USAGE, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    session = Session()
    try:
        session.up()
        result = asyncio.run(Scenario(session).run())
    except KeyboardInterrupt:
        session.say("interrupted: ending the demo")
        down()
        return 130
    except (ClusterError, DemoError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    result.write(RESULT)
    print(result.line(), flush=True)
    return 0 if result.ok else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
