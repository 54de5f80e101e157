"""From fractions to a sequence: which variant gets the next request of a bucket.

Drawing a variant at random gives the right split only in the long run; after n requests it is off by about
sqrt(n f (1-f)). A plan that sizes replicas to their load cannot use that. Here the split is deterministic: it is the
chairman assignment of Tijdeman (Discrete Mathematics 32, 1980), which keeps every variant's count within one of its
due at *every* prefix. In each step every variant is credited with its share. Those whose credit has reached
1/(2k-2) may be chosen, and among them the one whose credit would first reach 1 - 1/(2k-2) is.

The weights may change from one call to the next (readiness, a new plan). Credits of variants that are not offered
are frozen, and every credit is clamped, so that a variant that returns after an outage is not flooded with what it
missed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

CREDIT_LIMIT = 2.0
"""Requests that an option can be ahead or behind before the difference is forgotten."""
_ROUNDING = 1e-9


class Split(Generic[T]):
    """A low-variance sequence over weighted options."""

    __slots__ = ("_credit",)

    def __init__(self) -> None:
        self._credit: dict[T, float] = {}

    def pick(self, weights: Mapping[T, float]) -> T:
        """The option that gets the next request. `weights` are positive and need not sum to one.

        Raises ValueError if there is no option.
        """
        if not weights:
            raise ValueError("weights must name at least one option")
        if len(weights) == 1:
            return next(iter(weights))
        total = sum(weights.values())
        credit = self._credit
        for option, weight in weights.items():
            credit[option] = credit.get(option, 0.0) + weight / total
        chosen = self._due(weights, total)
        credit[chosen] -= 1.0
        for option in weights:
            if not -CREDIT_LIMIT <= credit[option] <= CREDIT_LIMIT:
                credit[option] = math.copysign(CREDIT_LIMIT, credit[option])
        return chosen

    def _due(self, weights: Mapping[T, float], total: float) -> T:
        margin = 1.0 / (2 * len(weights) - 2)
        best: T | None = None
        earliest = float("inf")
        for option, weight in weights.items():
            credit = self._credit[option]
            if credit < margin - _ROUNDING:
                continue
            steps_left = (1.0 - margin - credit) * total / weight
            if steps_left < earliest:
                best, earliest = option, steps_left
        # With changing weights the credits on offer need not sum to one, so that nobody may have reached the margin.
        return max(weights, key=self._credit.__getitem__) if best is None else best

    def instead(self, picked: T, taken: T) -> None:
        """What was picked last was not taken, `taken` was: it is charged for it, so that the sequence comes back."""
        credit = self._credit
        if picked in credit and taken in credit:
            credit[picked] = min(CREDIT_LIMIT, credit[picked] + 1.0)
            credit[taken] = max(-CREDIT_LIMIT, credit[taken] - 1.0)

    def credit(self, option: T) -> float:
        """Requests that an option is behind its share (ahead of it: negative)."""
        return self._credit.get(option, 0.0)

    def forget(self, keep: Collection[T]) -> None:
        """Drops the credit of options that are no longer among `keep`."""
        self._credit = {option: credit for option, credit in self._credit.items() if option in keep}
