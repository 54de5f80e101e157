"""What a fleet of a thousand services takes: to be applied, and to be kept.

    four clients apply --> all planned, all have Deployments --> all engines Ready --> nothing changes for half a minute

Six buckets and one allowed type per service; the engines are kwok's pods, which are Ready at once. The event loop's
longest lag is read from the operator's own metrics by a scraper that comes around as Prometheus does, so what a scrape
costs is in it.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from e2e.bench.report import Report
from e2e.operator.objects import Json, service
from e2e.operator.rig import Operator, Rig

NAMESPACE = "default"
TYPES = ("a", "b", "c", "d")
FLEET = 1000
CLIENTS = 4
SETTLE_S = 30.0
"""Pause before each measurement of lags: as long as the operator remembers its longest."""
IDLE_S = 30.0
SCRAPE_INTERVAL_S = 10.0
LAG = "llmfleet_operator_event_loop_lag"
SEEN_STALL_S = 0.05
_MIB = 2**20


class LagScraper:
    """Scrapes an operator's metrics every `SCRAPE_INTERVAL_S` as long as the context lasts."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest_s = 0.0
        self.longest_own_s = 0.0
        """Less the time for which the process waited for a core."""
        self.longest_cpu_s = {"loop": 0.0, "all": 0.0}
        """Most CPU time within one lag, by threads: the loop's own, or all of the process."""
        self.late_before = 0.0
        """Samples beyond `SEEN_STALL_S` before the context began."""
        self.late = 0.0
        """The same at the last scrape."""

    def __enter__(self) -> LagScraper:
        self.late_before = _late(self._operator.metrics())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            ending = self._ended.wait(SCRAPE_INTERVAL_S)
            metrics = self._operator.metrics()
            self.longest_s = max(self.longest_s, metrics[f"{LAG}_max_seconds"])
            self.longest_own_s = max(self.longest_own_s, metrics[f"{LAG}_own_max_seconds"])
            for threads, before_s in self.longest_cpu_s.items():
                lag_cpu_s = metrics[f'{LAG}_cpu_max_seconds{{threads="{threads}"}}']
                self.longest_cpu_s[threads] = max(before_s, lag_cpu_s)
            self.late = _late(metrics) - self.late_before
            if ending:
                return


def _late(metrics: dict[str, float]) -> float:
    return metrics[f"{LAG}_seconds_count"] - metrics[f'{LAG}_seconds_bucket{{le="{SEEN_STALL_S}"}}']


def measure(report: Report, rig: Rig, operator: Operator) -> None:
    """Adds the rows of the fleet, which stays."""
    # The leader has just started or taken over, which its longest lag still remembers.
    time.sleep(SETTLE_S)
    with LagScraper(operator) as scraper:
        _apply(report, rig, operator)
        print("waiting until every engine is Ready and nothing changes ...", flush=True)
        rig.wait("all are Ready", lambda: _ready(rig) == FLEET, 900)
    _add_stalls(report, "loop_stall_max", scraper)
    time.sleep(SETTLE_S)
    with LagScraper(operator) as scraper:
        _idle(report, operator)
    _add_stalls(report, "loop_stall_max_idle", scraper)


def _add_stalls(report: Report, name: str, scraper: LagScraper) -> None:
    note = f"{scraper.late:.0f} stalls of more than {SEEN_STALL_S * 1e3:.0f} ms"
    report.add(name, "ms", [scraper.longest_s * 1e3], target=50.0, note=note)
    note = "less the time for which the process wanted a core and had none"
    report.add(f"{name}_own", "ms", [scraper.longest_own_s * 1e3], target=50.0, note=note)
    cpu_ms = {threads: longest_s * 1e3 for threads, longest_s in scraper.longest_cpu_s.items()}
    note = f"of the loop's thread; of all threads of the process {cpu_ms['all']:.0f} ms"
    report.add(f"{name}_cpu", "ms", [cpu_ms["loop"]], target=50.0, note=note)


def _apply(report: Report, rig: Rig, operator: Operator) -> None:
    services = [
        service(NAMESPACE, f"fleet-{number:04}", 3.0 + number % 5, gpu_types=(TYPES[number % len(TYPES)],))
        for number in range(FLEET)
    ]
    cpu_before_s = operator.cpu_s()
    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(rig.apply, services))
    applied_s = time.monotonic() - began
    print(f"{FLEET} services are applied after {applied_s:.1f} s", flush=True)
    rig.wait("all are planned and have Deployments", lambda: _all_there(rig, operator, began), 600)
    took_s = time.monotonic() - began
    cpu_s = operator.cpu_s() - cpu_before_s
    note = (
        f"from the first apply; the last came after {applied_s:.1f} s; operator and planner used {cpu_s:.1f} s of CPU"
    )
    report.add("fleet_1000_applied", "s", [took_s], target=60.0, note=note)


def _idle(report: Report, operator: Operator) -> None:
    cpu_before_s = operator.cpu_s()
    print(f"leaving it alone for {IDLE_S:.0f} s ...", flush=True)
    time.sleep(IDLE_S)
    idle_percent = (operator.cpu_s() - cpu_before_s) / IDLE_S * 100
    report.add("fleet_1000_idle_cpu", "% of a core", [idle_percent], target=5.0, note="operator and planner")
    peak = f"peak {operator.peak_rss_bytes() / _MIB:.0f} MiB"
    report.add("fleet_1000_operator_rss", "MiB", [operator.rss_bytes() / _MIB], target=250.0, note=peak)
    planner = operator.metrics()["llmfleet_operator_planner_resident_bytes"]
    report.add("fleet_1000_planner_rss", "MiB", [planner / _MIB])


def _all_there(rig: Rig, operator: Operator, began: float) -> bool:
    # Progress is read from the operator's log: to list a thousand objects takes the API server's time from it.
    written = {line["object"] for line in operator.lines() if line.get("kind") == "Deployment"}
    written = {name for name in written if name.startswith(f"{NAMESPACE}/fleet-")}
    print(f"{time.monotonic() - began:.0f} s: {len(written)} Deployments", flush=True)
    if len(written) < FLEET:
        time.sleep(0.5)
        return False
    planned = sum(_is(obj, "Planned") for obj in rig.list("LLMService", NAMESPACE))
    print(f"{time.monotonic() - began:.0f} s: {planned} planned", flush=True)
    return planned == FLEET and len(rig.list("Deployment", NAMESPACE)) == FLEET


def _ready(rig: Rig) -> int:
    ready = sum(_is(obj, "Ready") for obj in rig.list("LLMService", NAMESPACE))
    print(f"{ready} of {FLEET} services are Ready", flush=True)
    if ready < FLEET:
        time.sleep(5)
    return ready


def _is(obj: Json, condition: str) -> bool:
    conditions = obj.get("status", {}).get("conditions", [])
    return any(c["type"] == condition and c["status"] == "True" for c in conditions)
