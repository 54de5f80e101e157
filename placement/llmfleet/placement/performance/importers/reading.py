"""Recognising a result file by its fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmfleet.placement.performance.importers.aibrix import KnownObjective, is_aibrix, read_aibrix
from llmfleet.placement.performance.importers.guidellm import is_guidellm, read_guidellm
from llmfleet.placement.performance.importers.table import Imported, ImportRefusedError
from llmfleet.placement.performance.importers.vllm import is_vllm, read_vllm


def read_benchmark(text: str, name: str, objective: KnownObjective | None = None) -> Imported:
    """The points of one file. `name`: how messages call it. `objective`: for files that state none (aibrix.py).

    Raises ImportRefusedError, also for a format that is not known.
    """
    documents = _documents(text, name)
    if all(is_vllm(document) for document in documents):
        return read_vllm(documents, name)
    if len(documents) == 1 and is_guidellm(documents[0]):
        return read_guidellm(documents[0], name)
    if len(documents) == 1 and is_aibrix(documents[0]):
        return read_aibrix(documents[0], name, objective)
    fields = ", ".join(sorted(documents[0])[:8])
    raise ImportRefusedError(
        f"{name}: unknown format with fields {fields}; accepted are results of `vllm bench serve --save-result` "
        "(request_throughput, ..._ttft_ms), guidellm (benchmarks) and AIBrix profiles (tputs, indexes)"
    )


def _documents(text: str, name: str) -> list[Mapping[str, Any]]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            parsed = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise ImportRefusedError(f"{name}: neither JSON nor one JSON object per line: {whole}") from whole
    documents = parsed if isinstance(parsed, list) else [parsed]
    if not documents or not all(isinstance(document, Mapping) for document in documents):
        raise ImportRefusedError(f"{name}: accepted is a JSON object, a list of them, or one per line")
    return documents
