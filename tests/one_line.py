"""An error that a user may see is one line that holds what it must."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mirai_ds.config import UserError


def one_line(call: Callable[[], object], *parts: str) -> None:
    """`call` raises a UserError of one line with all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
