"""The benchmark of spot capacity: what is said to be survived is, and it is not dearer than what is not lost."""

from __future__ import annotations

from dataclasses import replace

from e2e.bench.placement_promise_engines import gpus
from e2e.bench.placement_promise_fleets import combinations, model_profile
from e2e.bench.placement_spot import tried


def test_pools_that_take_over_are_given_what_they_hold_and_keep_the_objective() -> None:
    family = gpus()
    family = replace(family, devices={"a100": family.devices["a100"]})
    wanted = "poisson_code usual one_type_small"
    combination = next(one for one in combinations([family]) if one.name == wanted)
    outcome = tried(combination, model_profile(family))
    assert outcome is not None
    assert outcome.saved_percent > 0
    assert [one.kept for one in outcome.losses] == [True, True]
