"""The map of sizes as text: read as a user reads it."""

from __future__ import annotations

from llmfleet.cli.size_map import map_in_words
from llmfleet.placement.size_map import SizeCell


def cell(size: tuple[int, int], prices: dict[str, float], share: dict[str, float] | None = None) -> SizeCell:
    return SizeCell(
        input_tokens=size[0],
        output_tokens=size[1],
        demand_rps=1.0,
        cost_per_thousand_requests=prices,
        share=share or {},
    )


def test_a_table_of_sizes_names_the_cheapest_variant_and_marks_what_goes_elsewhere() -> None:
    cells = [
        cell((512, 128), {"l4": 0.75, "h100": 1.0}, {"l4": 0.5, "h100": 0.5}),
        cell((512, 1024), {"h100": 3.0, "l4": 4.0}, {"h100": 1.0}),
        cell((4096, 128), {"h100": 5.0}),
        cell((4096, 1024), {}),
    ]
    assert list(map_in_words(cells)) == [
        "               output <= 128  output <= 1024",
        "input <= 512   l4 -25%*       h100 -25%",
        "input <= 4096  h100 only      -",
        "* the plan sends these, or some of them, to another variant",
        "- no variant serves these within the objective",
    ]


def test_where_there_is_no_choice_there_is_no_map() -> None:
    assert list(map_in_words([])) == []
    assert list(map_in_words([cell((512, 128), {"l4": 1.0, "h100": 2.0})])) == []
    assert list(map_in_words([cell((512, 128), {"l4": 1.0}), cell((512, 256), {"l4": 1.0})])) == []
