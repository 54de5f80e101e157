"""Which rows of the measured file count, and why the others do not. No rule looks at a prediction.

    counted(rows) -> list[Row]        rows of the CSV as dicts of strings, in file order

Out are:

* what no replica of ours is: disaggregated pairs (their TTFT is a pair's), attention data parallelism, more than eight
  devices (RFC 3, non-goals; most of the latter are disaggregated rows that lost their mode), and GB200, whose precision
  is not recorded;
* runs with **speculative decoding**, which the file does not mark: several tokens per step, so TPOT is no step's time.
  Which they are is public: InferenceX (github.com/SemiAnalysisAI/InferenceX, `.github/configs/nvidia-master.yaml` and
  `perf-changelog.yaml`) gives every sweep its image and range of loads, and its `-mtp` sweeps had images, or degrees of
  parallelism and loads, that no other sweep of the model had (`_SPECULATIVE`). Where one image served both sweeps at
  the same degree, only the rows of InferenceX's database dump are known to be without;
* rows whose recorded **batch is not their concurrency**: what one replica saw of the load is then not known;
* gpt-oss on H100 **at 512 in flight**: InferenceX's sweep of it is 4 to 64, these nine are of no recipe (a TPOT as at 8
  in flight, and a TTFT of four whole answers);
* **repetitions**: the sources overlap, so the same measurement (TTFT and TPOT within rounding) comes up to four times.
  It counts once, under one name: runs of DeepSeek-R1 are called DeepSeek-V3 by one source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Row = dict[str, str]

DEVICES = {"h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm", "b200_sxm": "b200", "b300_sxm": "b300"}
"""Systems of the file that count, and their names in our catalogue."""

_ROUNDING = 2e-3
"""One source gives two decimals: 0.2 % of the shortest TPOT."""


@dataclass(frozen=True)
class _Sweep:
    """Runs that were or may have been speculative; an empty field leaves it open."""

    model: str
    image: str
    since: str = ""
    precision: str = ""
    system: str = ""
    devices: str = ""

    def has(self, row: Row) -> bool:
        source = row["silicon_data_source"].replace("#", "/")
        measured = re.search(r"measured=([\d-]+)", source)
        return (
            self.model in row["model_path"]
            and source.endswith(self.image)
            and (measured.group(1) if measured else "") >= self.since
            and self.precision in ("", row["precision"])
            and self.system in ("", row["system"])
            and self.devices in ("", row["tp_size"])
        )


_SPECULATIVE = (
    # dsr1-*-trt-mtp: added on 2026-01-07 (pull request 392) with the first image, then moved to the second (632, 642).
    _Sweep("DeepSeek-R1", "tensorrt-llm/release:1.1.0rc2.post2", since="2026-01-07"),
    _Sweep("DeepSeek-R1", "tensorrt-llm/release:1.2.0rc6.post3"),
    # dsr1-fp8-b200-sglang-mtp: eight devices, 4 to 512 in flight; without it 4 to 64, by the same image (943).
    _Sweep("DeepSeek-R1", "sglang:v0.5.9-cu130", precision="fp8", system="b200_sxm", devices="8"),
    # qwen3.5-fp8-*-sglang-mtp: four devices, experts not parallel (897); without it by v0.5.9-cu130-amd64.
    _Sweep("Qwen3.5", "sglang:v0.5.9-cu130", precision="fp8"),
)


def counted(rows: Iterable[Row]) -> list[Row]:
    """The rows to judge predictions by, each measurement once."""
    ours = [row for row in rows if _is_ours(row) and _load_is_known(row)]
    return [found[0] for found in _measurements(ours) if not _may_be_speculative(found)]


def concurrency(row: Row) -> float:
    """Requests in flight."""
    said = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
    return float(said.group(1) if said else row["batch_size"])


def model_name(row: Row) -> str:
    """The model's name without maker and precision, one for all sources."""
    name = re.sub(r"-(Instruct|NVFP4|FP8)", "", row["model_path"].split("/")[-1])
    return "DeepSeek-R1" if name == "DeepSeek-V3" else name


def _is_ours(row: Row) -> bool:
    return (
        row["mode"] == "agg"
        and row["system"] in DEVICES
        and row["attention_dp_size"] in ("", "0", "1")
        and 1 <= int(row["tp_size"]) <= 8
    )


def _load_is_known(row: Row) -> bool:
    beyond_the_sweep = "gpt-oss" in row["model_path"] and row["system"] == "h100_sxm" and concurrency(row) == 512
    return concurrency(row) == float(row["batch_size"]) and not beyond_the_sweep


def _measurements(rows: list[Row]) -> list[list[Row]]:
    """Rows that repeat each other, together; in the order of the first of each."""
    found: list[list[Row]] = []
    alike: dict[tuple[str, ...], list[list[Row]]] = {}
    for row in rows:
        same = (row[name] for name in ("system", "backend", "precision", "tp_size", "isl", "osl"))
        known = alike.setdefault((model_name(row), *same, str(concurrency(row))), [])
        for measurement in known:
            if all(_close(row[name], measurement[0][name]) for name in ("silicon_ttft_ms", "silicon_tpot_ms")):
                measurement.append(row)
                break
        else:
            known.append([row])
            found.append(known[-1])
    return found


def _close(one: str, other: str) -> bool:
    return abs(float(one) / float(other) - 1) < _ROUNDING


def _may_be_speculative(measurement: list[Row]) -> bool:
    """The database dump holds sweeps without speculation only: `config_id` is InferenceX's name of a configuration."""
    if any("config_id=" in row["silicon_data_source"] for row in measurement):
        return False
    return any(sweep.has(row) for row in measurement for sweep in _SPECULATIVE)
