"""The wheel that a user installs has everything of every component."""

from __future__ import annotations

import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
    "sources"
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the built wheel, but for its own metadata."""
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_every_file_of_every_component_is_in_it_and_nothing_else(files: set[str]) -> None:
    ours = {
        str(path.relative_to(ROOT / component))
        for component in COMPONENTS
        for path in (ROOT / component / "llmfleet").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(ours) > 100
    assert files == ours


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_type_checker_believes_the_annotations_of(component: str, files: set[str]) -> None:
    assert f"llmfleet/{component}/py.typed" in files
