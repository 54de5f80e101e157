"""The map of sizes as text: a table of size buckets with the variant that answers each most cheaply.

In flow the cells of `llmfleet.placement.size_map`; out flow lines. A `*` is on a size that the plan sends, wholly or in
part, elsewhere: to replicas that are there anyway, or for want of devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmfleet.placement.size_map import SizeCell

_NOBODY = "-"


def map_in_words(cells: Sequence[SizeCell]) -> Iterator[str]:
    """The table, its legend last. Nothing where there is only one variant to choose, or one size."""
    names = {name for cell in cells for name in cell.cost_per_thousand_requests}
    if len(cells) < 2 or len(names) < 2:
        return
    outputs = sorted({cell.output_tokens for cell in cells})
    by_size = {(cell.input_tokens, cell.output_tokens): _word(cell) for cell in cells}
    rows = [["", *(f"output <= {edge}" for edge in outputs)]]
    for edge in sorted({cell.input_tokens for cell in cells}):
        rows.append([f"input <= {edge}", *(by_size[edge, output] for output in outputs)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
    words = {word for row in rows[1:] for word in row[1:]}
    if any("*" in word for word in words):
        yield "* the plan sends these, or some of them, to another variant"
    if _NOBODY in words:
        yield f"{_NOBODY} no variant serves these within the objective"


def _word(cell: SizeCell) -> str:
    if cell.cheapest is None:
        return _NOBODY
    if len(cell.cost_per_thousand_requests) == 1:
        word = f"{cell.cheapest} only"
    else:
        best, second = list(cell.cost_per_thousand_requests.values())[:2]
        word = f"{cell.cheapest} -{1 - best / second:.0%}"
    elsewhere = any(name != cell.cheapest and share > 0 for name, share in cell.share.items())
    return f"{word}*" if elsewhere else word
