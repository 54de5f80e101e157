"""The destination knows a parked request by its id, however vLLM has dressed it up."""

from __future__ import annotations

import pytest

from llmfleet.migration.ports import migration_of, request_id

MIGRATION = "0123456789abcdef" * 2


@pytest.mark.parametrize("dress", ["{}", "cmpl-{}", "cmpl-{}-0", "chatcmpl-{}", "resp_{}", "cmpl-{}-0-1a2b3c4d"])
def test_the_migration_is_found_in_the_engines_own_id(dress: str) -> None:
    assert migration_of(dress.format(request_id(MIGRATION))) == MIGRATION


@pytest.mark.parametrize(
    "request_", ["cmpl-1234", "", f"llmfleet-{MIGRATION}0", f"myllmfleet-{MIGRATION}", f"llmfleet-{MIGRATION.upper()}"]
)
def test_other_requests_are_ordinary_ones(request_: str) -> None:
    assert migration_of(request_) is None
