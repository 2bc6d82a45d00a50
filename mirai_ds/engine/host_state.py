"""What Python remembers of an engine, put back after a step that the device was only shown.

Capturing a step runs all of DeepSpeed's Python and none of its device work: counters, buckets and lists of gradients
would say that a step was made, and hold events and tensors that belong to the graph alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

from torch import nn


class HostState:
    """The attributes of `objects`, with the lists, dictionaries, sets and dataclasses in them, and the gradients of
    `parameters`."""

    def __init__(self, objects: Iterable[Any], parameters: Iterable[nn.Parameter]) -> None:
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        for one in objects:
            self._keep_object(one)

    def _keep_object(self, one: Any) -> None:
        self._seen.add(id(one))
        self._attributes.append((one, dict(vars(one))))
        for value in vars(one).values():
            self._keep(value)

    def _keep(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, (list, dict, set)):
            self._seen.add(id(value))
            self._containers.append((value, copy.copy(value)))
            for item in value.values() if isinstance(value, dict) else value:
                self._keep(item)
        elif is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
            self._keep_object(value)

    def restore(self) -> None:
        """Put everything back, in place: others hold the same lists."""
        for one, attributes in self._attributes:
            vars(one).clear()
            vars(one).update(attributes)
        for container, content in self._containers:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
