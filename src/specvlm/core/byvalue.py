"""Equality of dataclasses that hold tensors, which Python's own compares element by element."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ByValue:
    """A dataclass, made with eq=False, that equals another of its type whose fields hold equal values."""

    def __eq__(self, other: object) -> bool:
        return self is other or _same(self, other)

    def __hash__(self) -> int:
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return hash((type(self), *(value.shape for value in values if isinstance(value, Tensor))))


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal: tensors and arrays by shape, type and content, NaN to itself."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if type(one) is not type(other):
        return False
    if dataclasses.is_dataclass(one):
        fields = [field.name for field in dataclasses.fields(one) if field.compare]
        return all(_same(getattr(one, name), getattr(other, name)) for name in fields)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other) or (isinstance(one, float) and one != one and other != other)
