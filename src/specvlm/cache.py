"""The KV cache: fixed storage sized to the request, whose length is its whole state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specvlm.errors import CapacityError


class KVCache:
    """Keys and values of one sequence, one pair of [1, heads, capacity, head_dim] tensors a layer.

    transformers' attention modules call `update`; everything else belongs to the session that owns the cache. Rows
    behind `length` are free space, so going back is setting a number.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new rows [1, heads, T, head_dim] behind `length`; return all rows up to and with them.

        The length moves only with `advance`, once every layer has stored its rows.
        """
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise CapacityError(f"{end} rows do not fit in a KV cache of {self.capacity}")
        if layer_idx == len(self._keys):
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._keys.append(torch.empty(shape, dtype=keys.dtype, device=keys.device))
            self._values.append(torch.empty(shape, dtype=values.dtype, device=values.device))
        self._keys[layer_idx][:, :, self.length : end] = keys
        self._values[layer_idx][:, :, self.length : end] = values
        return self._keys[layer_idx][:, :, :end], self._values[layer_idx][:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of stored rows (transformers asks for it under this name)."""
        return self.length

    def advance(self, count: int) -> None:
        """Count `count` rows as stored, after a pass through all layers."""
        self.length += count

    def rollback(self, length: int) -> None:
        """Forget all rows from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back from {self.length} rows to {length}")
        self.length = length

    def keep(self, base: int, rows: Sequence[int]) -> None:
        """Keep of the rows behind `base` only `rows` (ascending, counted from base), moved together."""
        count = len(rows)
        if list(rows) != list(range(count)):  # else they already stand where they belong
            source = torch.tensor(rows, device=self._keys[0].device) + base
            for stored in (*self._keys, *self._values):
                stored[:, :, base : base + count] = stored[:, :, source]
        self.length = base + count
