"""Measured latency of real GPUs, to judge predictions by: `silicon_sample.csv` of `aiconfigurator-core` 0.12.0.

    download() -> Path            the wheel, by version and hash, into the cache
    silicon(wheel) -> Silicon     its aggregated rows, one array per column, and the roofline of each configuration

The file (Apache-2.0, 5,221 rows: 3,619 of one replica, 1,602 of disaggregated pairs) is InferenceX and NVIDIA's own
runs. A row is a closed loop at a fixed size: concurrency, mean TTFT, mean TPOT. The model configurations come out of
the same wheel. What is left out, and why, is in `placement_silicon_rows.py`; besides, what cannot have run as recorded:
weights that are larger than the memory of all the devices.

An empty precision is 16 bits. KV numbers have 8 bits where weights have 8 or fewer (both sources' own recipes), else
16.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from e2e.bench.placement_silicon_rows import DEVICES, Row, concurrency, counted, model_name
from e2e.cluster.state import cache_directory
from llmfleet.placement.performance.architecture import architecture_of
from llmfleet.placement.performance.hardware import CATALOGUE
from llmfleet.placement.performance.model import BoolArray, FloatArray
from llmfleet.placement.performance.roofline import Constants, Roofline

VERSION = "0.12.0"
_HASH = "sha256:aadc4aad0a00bf8a61c477c62bef43de479849c3aa0b1c3078068e08309eccc4"
_CSV = "aiconfigurator_core/systems/silicon_sample.csv"
# Names of the file that have no configuration of their own in the wheel.
_SAME_MODEL = {
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Meta-Llama-3.1-8B",
    "nvidia/Qwen3-32B-NVFP4": "Qwen/Qwen3-32B",
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-ai/DeepSeek-R1",
    "zhipuai/GLM-5": "zai-org/GLM-5",
}
# Bits of a weight as served, scales included: nvfp4 has one 8-bit scale for 16 weights, int4 one of 16 bits for 32.
_BITS = {"bf16": 16.0, "fp8": 8.0, "fp4": 4.5, "int4": 4.5}


def download() -> Path:
    """The wheel; fetched by pip on the first call, by hash."""
    folder = cache_directory() / f"aiconfigurator-core-{VERSION}"
    found = sorted(folder.glob("*.whl"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = folder / "requirement.txt"
        wanted.write_text(f"aiconfigurator-core=={VERSION} --hash={_HASH}\n")
        platform = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", *platform]
        subprocess.run([*command, "-d", str(folder), "-r", str(wanted)], check=True)
        found = sorted(folder.glob("*.whl"))
    return found[0]


Names = np.ndarray[tuple[int], np.dtype[np.str_]]


@dataclass(frozen=True)
class Silicon:
    """The rows, as arrays of one length; `configuration[i]` indexes `rooflines`."""

    input_tokens: FloatArray
    output_tokens: FloatArray
    concurrency: FloatArray
    ttft_ms: FloatArray
    tpot_ms: FloatArray
    model: Names
    """Without maker and precision."""
    group: Names
    """`<model> on <GPU>`: what constants are fitted to or held out as a whole."""
    load_series: Names
    """Rows that differ in concurrency only share this: one size on one deployment."""
    configuration: np.ndarray[tuple[int], np.dtype[np.int64]]
    rooflines: list[Roofline]
    models: list[str]
    """Name of each configuration's model in the wheel."""

    def __len__(self) -> int:
        return len(self.tpot_ms)

    @property
    def sparse(self) -> BoolArray:
        """Rows of mixtures of experts."""
        return np.array([line.architecture.experts > 0 for line in self.rooflines])[self.configuration]

    def predict(self, constants: Constants) -> tuple[FloatArray, FloatArray]:
        """(TTFT, TPOT) in ms of every row by the roofline with these constants."""
        ttft_ms, tpot_ms = np.empty(len(self)), np.empty(len(self))
        for index, line in enumerate(self.rooflines):
            rows = self.configuration == index
            sizes = (self.input_tokens[rows], self.output_tokens[rows], self.concurrency[rows])
            found = replace(line, constants=constants).predict(*sizes)
            ttft_ms[rows], tpot_ms[rows] = found.ttft_ms, found.tpot_ms
        return ttft_ms, tpot_ms

    def only(self, rows: BoolArray) -> Silicon:
        """Some of the rows."""
        used = np.unique(self.configuration[rows])
        return Silicon(
            self.input_tokens[rows],
            self.output_tokens[rows],
            self.concurrency[rows],
            self.ttft_ms[rows],
            self.tpot_ms[rows],
            self.model[rows],
            self.group[rows],
            self.load_series[rows],
            np.searchsorted(used, self.configuration[rows]),
            [self.rooflines[index] for index in used],
            [self.models[index] for index in used],
        )


def silicon(wheel: Path) -> Silicon:
    """The rows that count; see the module's docstring."""
    with zipfile.ZipFile(wheel) as archive:
        found = counted(csv.DictReader(io.TextIOWrapper(archive.open(_CSV), "utf-8")))
        configs = {model: _config(archive, model) for model in {row["model_path"] for row in found}}
    configurations: dict[tuple[str, ...], int] = {}
    rooflines: list[Roofline] = []
    index = []
    kept = []
    for row in found:
        key = (row["model_path"], row["system"], row["backend"], _precision(row), row["tp_size"])
        if key not in configurations:
            line = _roofline(key, configs[row["model_path"]])
            if _weights_gb(line) > line.device.memory_gb * line.tensor_parallel:
                continue
            configurations[key] = len(rooflines)
            rooflines.append(line)
        index.append(configurations[key])
        kept.append(row)
    fixed = ("backend_version", "moe_tp_size", "moe_ep_size", "gemm_quant_mode", "isl", "osl")
    return Silicon(
        input_tokens=np.array([float(row["isl"]) for row in kept]),
        output_tokens=np.array([float(row["osl"]) for row in kept]),
        concurrency=np.array([concurrency(row) for row in kept]),
        ttft_ms=np.array([float(row["silicon_ttft_ms"]) for row in kept]),
        tpot_ms=np.array([float(row["silicon_tpot_ms"]) for row in kept]),
        model=np.array([model_name(row) for row in kept]),
        group=np.array([f"{model_name(row)} on {DEVICES[row['system']]}" for row in kept]),
        load_series=np.array([f"{i} {[row[name] for name in fixed]}" for i, row in zip(index, kept, strict=True)]),
        configuration=np.array(index),
        rooflines=rooflines,
        models=[_SAME_MODEL.get(key[0], key[0]) for key in configurations],
    )


def _precision(row: Row) -> str:
    return row["precision"] or "bf16"


def _config(archive: zipfile.ZipFile, model: str) -> dict[str, object]:
    name = _SAME_MODEL.get(model, model).replace("/", "--")
    found: dict[str, object] = json.loads(archive.read(f"aiconfigurator_core/model_configs/{name}_config.json"))
    return found


def _weights_gb(line: Roofline) -> float:
    shape = line.architecture
    dense, experts = shape.dense_parameters_billion, shape.expert_parameters_billion
    return (dense * shape.dense_bits + experts * shape.expert_bits) / 8


def _roofline(key: tuple[str, ...], config: dict[str, object]) -> Roofline:
    model, system, engine, precision, devices = key
    bits = _BITS[precision]
    dense_bits, expert_bits = bits, bits
    # What the checkpoints really hold: 4 bits are for the experts only.
    if "gpt-oss" in model:
        dense_bits, expert_bits = 16.0, 4.25
    elif precision == "int4":
        dense_bits = 16.0
    shape = architecture_of(
        config, dense_bits=dense_bits, expert_bits=expert_bits, kv_bits=16.0 if precision == "bf16" else 8.0
    )
    if precision == "fp4" and shape.experts and dense_bits < 8:
        shape = shape.model_copy(update={"dense_bits": 8.0})
    return Roofline(shape, CATALOGUE[DEVICES[system]], int(devices), engine)
