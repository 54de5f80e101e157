"""Measurements that other tools made, as points of a ModelProfile.

    read_benchmark(text, name, objective) -> Imported      whatever the text is: the format is recognised by its fields

Understood are the results of vLLM's `bench serve` (vllm.py), of guidellm (guidellm.py), and AIBrix's profiles
(aibrix.py). Pure: text in, points and notes out. What a file does not say is filled in pessimistically and *said* in a
note, or the file is refused with the path of the field, its value, and what would be accepted (table.py).
"""

from llmfleet.placement.performance.importers.reading import read_benchmark
from llmfleet.placement.performance.importers.table import Imported, ImportRefusedError, at_corners, combined

__all__ = ["ImportRefusedError", "Imported", "at_corners", "combined", "read_benchmark"]
