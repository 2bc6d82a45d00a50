"""Short names for marks of single cases."""

from __future__ import annotations

from typing import Any

import pytest


def by_hand(*values: Any) -> Any:
    """A case that others stand for: the rest of a product whose every part has a case in the fast suite."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def rest_by_hand(cases: list[tuple[Any, ...]], kept: set[tuple[Any, ...]]) -> list[Any]:
    """All `cases`; those that are not `kept` by hand (`make test-exhaustive`)."""
    assert kept <= set(cases), kept - set(cases)
    return [case if case in kept else by_hand(*case) for case in cases]
