"""How well latency is predicted: the `prediction_*` rows of `make bench-placement`.

    add_rows(report)                                          measures
    python -m e2e.bench.placement_prediction                  only these rows
    python -m e2e.bench.placement_prediction --fit            what the roofline's shipped constants are fitted to be

The roofline against measured GPUs (`placement_silicon.py`), its error as the mean absolute percentage error (MAPE):

* **unseen**: every (model, GPU) group is predicted by constants fitted to all *other* groups. Nothing that is reported
  was fitted to. (The prior's values were written after a first look at the same file.)
* **unseen_model**: the same, but every model is predicted by constants fitted to all other models, on any GPU.
* **split**: constants fitted to the groups of `TRAINED_ON` only, error on all others.
* **calibrated**: within each series of loads (one size on one deployment, four loads or more) the online correction is
  given every other load as one observation of 200 requests, and the loads between are predicted.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace

import numpy as np

from e2e.bench.placement_database import predicted
from e2e.bench.placement_fit import DENSE, EXPERT, fit
from e2e.bench.placement_silicon import Names, Silicon, download, silicon
from e2e.bench.report import Report
from llmfleet.api import DEFAULT_CONFIGURATION, Correction
from llmfleet.placement.performance.correction import Corrected, Observation, observe
from llmfleet.placement.performance.model import FloatArray
from llmfleet.placement.performance.roofline import FITTED, PRIOR, Constants

TRAINED_ON = ("Llama-3.1-70B on b200", "Qwen3-32B on h100-sxm")
"""Groups of the split: two models, two GPUs, three engines, 16, 8 and 4 bits; about half of the dense rows."""

_LEAST_LOADS = 4
_REQUESTS = 200.0


def add_rows(report: Report) -> None:
    """Add the rows; the wheel is downloaded on the first run."""
    rows = silicon(download())
    dense, sparse = rows.only(~rows.sparse), rows.only(rows.sparse)
    for suffix, part, names, start in (("", dense, DENSE, PRIOR), ("_experts", sparse, EXPERT, FITTED)):
        others = _fitted_to_others(part, part.group, names, start)
        ttft, tpot = _unseen(part, part.group, others)
        note = f"{len(others)} groups, {len(part)} rows, median {np.median(tpot):.1f} %"
        report.add(f"prediction_tpot_mape_unseen{suffix}", "%", [float(tpot.mean())], target=15, note=note)
        report.add(f"prediction_ttft_mape_unseen{suffix}", "%", [_finite_mean(ttft)], note=_ttft_note(ttft))
        _, tpot = _unseen(part, part.model, _fitted_to_others(part, part.model, names, start))
        note = f"median {np.median(tpot):.1f} %"
        report.add(f"prediction_tpot_mape_unseen_model{suffix}", "%", [float(tpot.mean())], note=note)
        ttft, tpot = calibrated(part, others)
        note = f"{len(tpot)} rows, median {np.median(tpot):.1f} %"
        report.add(f"prediction_tpot_mape_calibrated{suffix}", "%", [float(tpot.mean())], target=7, note=note)
        name = f"prediction_ttft_mape_calibrated{suffix}"
        report.add(name, "%", [_finite_mean(ttft)], target=20, note=_ttft_note(ttft))
    database = [_percent(found, seen) for found, seen in zip(predicted(), (rows.ttft_ms, rows.tpot_ms), strict=True)]
    for suffix, counted in (("", ~rows.sparse), ("_experts", rows.sparse)):
        for metric, errors in zip(("ttft", "tpot"), database, strict=True):
            known = errors[counted & np.isfinite(errors)]
            note = f"the prior; {len(known)} rows of {counted.sum()} that it has, median {np.median(known):.1f} %"
            report.add(f"prediction_{metric}_mape_database{suffix}", "%", [float(known.mean())], note=note)
    trained = np.isin(dense.group, TRAINED_ON)
    _, tpot = _errors(dense.only(~trained), fit(dense.only(trained), DENSE))
    report.add("prediction_tpot_mape_split", "%", [float(tpot.mean())], note=f"{len(tpot)} rows of the other groups")
    _, tpot = _errors(dense, PRIOR)
    report.add("prediction_tpot_mape_prior", "%", [float(tpot.mean())], note="nothing fitted at all")


def fitted() -> Constants:
    """The constants that are shipped: fitted to all rows, those of experts after and on top of the others."""
    rows = silicon(download())
    return fit(rows.only(rows.sparse), EXPERT, fit(rows.only(~rows.sparse), DENSE))


def calibrated(rows: Silicon, constants: dict[str, Constants]) -> tuple[FloatArray, FloatArray]:
    """(TTFT, TPOT) errors in percent of every other load of each series, after observing the loads between.

    `constants`: of each group, fitted to the others.
    """
    ttft, tpot = [], []
    for series in sorted(set(rows.load_series)):
        members = np.flatnonzero(rows.load_series == series)
        loads = np.unique(rows.concurrency[members])
        if len(loads) < _LEAST_LOADS:
            continue
        line = rows.rooflines[rows.configuration[members[0]]]
        model = replace(line, constants=constants[rows.group[members[0]]])
        learning = np.isin(rows.concurrency[members], loads[::2])
        correction = Correction(
            gpu_type=line.device.name,
            tensor_parallel=line.tensor_parallel,
            pipeline_parallel=1,
            configuration=DEFAULT_CONFIGURATION,
        )
        for i in members[learning]:
            seen = Observation(
                at=0.0,
                input_tokens=float(rows.input_tokens[i]),
                output_tokens=float(rows.output_tokens[i]),
                concurrency=float(rows.concurrency[i]),
                ttft_ms=float(rows.ttft_ms[i]),
                tpot_ms=float(rows.tpot_ms[i]),
                requests=_REQUESTS,
            )
            predicted = model.predict(seen.input_tokens, seen.output_tokens, seen.concurrency)
            correction = observe(correction, seen, predicted)
        judged = members[~learning]
        found = Corrected(model, correction, now=0.0).predict(
            rows.input_tokens[judged], rows.output_tokens[judged], rows.concurrency[judged]
        )
        ttft.append(_percent(found.ttft_ms, rows.ttft_ms[judged]))
        tpot.append(_percent(found.tpot_ms, rows.tpot_ms[judged]))
    return np.concatenate(ttft), np.concatenate(tpot)


def _fitted_to_others(rows: Silicon, group: Names, names: list[str], start: Constants) -> dict[str, Constants]:
    return {one: fit(rows.only(group != one), names, start) for one in sorted(set(group.tolist()))}


def _unseen(rows: Silicon, group: Names, constants: dict[str, Constants]) -> tuple[FloatArray, FloatArray]:
    ttft, tpot = np.empty(len(rows)), np.empty(len(rows))
    for one, fitted_to_others in constants.items():
        held_out = group == one
        ttft[held_out], tpot[held_out] = _errors(rows.only(held_out), fitted_to_others)
        print(f"  {one}: {held_out.sum()} rows, TPOT {tpot[held_out].mean():.1f} %", file=sys.stderr, flush=True)
    return ttft, tpot


def _errors(rows: Silicon, constants: Constants) -> tuple[FloatArray, FloatArray]:
    ttft_ms, tpot_ms = rows.predict(constants)
    return _percent(ttft_ms, rows.ttft_ms), _percent(tpot_ms, rows.tpot_ms)


def _finite_mean(errors: FloatArray) -> float:
    return float(errors[np.isfinite(errors)].mean())


def _ttft_note(errors: FloatArray) -> str:
    refused = int((~np.isfinite(errors)).sum())
    without = f"; without {refused} rows said not to fit into memory although they ran" if refused else ""
    return f"median {np.median(errors):.1f} %{without}"


def _percent(predicted: FloatArray, measured: FloatArray) -> FloatArray:
    return np.asarray(100 * np.abs(predicted / measured - 1))


def main() -> None:
    """Print the fitted constants, or measure only the rows of this module."""
    if "--fit" in sys.argv[1:]:
        for name, value in asdict(fitted()).items():
            print(f"    {name}={value:.3g},")
        return
    report = Report("placement_prediction")
    add_rows(report)
    report.write()


if __name__ == "__main__":
    main()
