"""Requests move between two real vLLM engines, and come out as if they had stayed.

The engines live in one process of the engine environment, which steps them by hand (`e2e/migration/stepped`). Float32,
where a token never depends on what else was computed; `make test-full` has bfloat16, more contexts and cuts, and two
tensor-parallel ranks besides.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.engine.command import EngineLayout, engine_env
from e2e.engine.environment import engine_environment
from e2e.engine.tiny_model import tiny_model

ROOT = Path(__file__).parents[2]
_SOURCES = "\n".join(path.read_text() for path in sorted((ROOT / "e2e/migration/stepped").glob("*.py")))
EXACT = [f"exact_{name}" for name in re.findall(r'^exact\(\s*"(\w+)"', _SOURCES, re.MULTILINE)]
OTHER = re.findall(r"^@scenario\ndef (\w+)", _SOURCES, re.MULTILINE)
DEADLINE_S = 280


class Engines:
    """The process with both engines, and what it said of the scenarios so far."""

    def __init__(self, dtype: str, *, full: bool = False, tensor_parallel: int = 1) -> None:
        layout = EngineLayout(engine_environment(), tiny_model())
        components = (str(ROOT / component) for component in ("", "api", "migration", "engine"))
        environment = os.environ | engine_env(layout, None) | {"PYTHONPATH": ":".join(components)}
        if full:
            environment["LLMFLEET_TEST_FULL"] = "1"
        if tensor_parallel > 1:
            # Both engines' ranks share the cores: vLLM binds each rank to one NUMA node unless it is told.
            cores = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(tensor_parallel))
            environment |= {"LLMFLEET_TEST_TP": str(tensor_parallel), "VLLM_CPU_OMP_THREADS_BIND": cores}
        self._process = subprocess.Popen(
            [layout.environment / "bin" / "python", "-m", "e2e.migration.stepped", layout.model, dtype],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._log: list[str] = []
        self._said: dict[str, list[str]] = {}

    def wrong(self, scenario: str) -> list[str]:
        """What was not as it should be."""
        assert self._process.stdout is not None
        while scenario not in self._said:
            line = self._process.stdout.readline()
            if not line:
                pytest.fail("the engines ended:\n" + "".join(self._log[-40:]))
            self._log.append(line)
            if line.startswith('{"scenario"'):
                said = json.loads(line)
                self._said[said["scenario"]] = said["wrong"]
        return self._said[scenario]

    def close(self) -> None:
        with self._process:  # closes its pipe, and waits
            self._process.kill()


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    started = Engines("float32")
    yield started
    started.close()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def thorough_engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    started = Engines(request.param, full=True)
    yield started
    started.close()


pytestmark = [pytest.mark.timeout(DEADLINE_S), pytest.mark.xdist_group("two_engines")]


@pytest.mark.long(60)
@pytest.mark.parametrize("scenario", [*EXACT, *OTHER])
def test_moved_requests_end_as_if_they_had_stayed_and_leave_nothing_behind(engines: Engines, scenario: str) -> None:
    assert engines.wrong(scenario) == []


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", [*EXACT, *OTHER])
def test_the_same_at_more_contexts_and_cuts_and_in_bfloat16(thorough_engines: Engines, scenario: str) -> None:
    assert thorough_engines.wrong(scenario) == []


@pytest.fixture(scope="module")
def engines_of_two_ranks() -> Iterator[Engines]:
    started = Engines("float32", tensor_parallel=2)
    yield started
    started.close()


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", [*EXACT, *OTHER])
def test_the_same_with_two_tensor_parallel_ranks_in_processes_of_their_own(
    engines_of_two_ranks: Engines, scenario: str
) -> None:
    assert engines_of_two_ranks.wrong(scenario) == []
