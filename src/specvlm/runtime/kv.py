"""The KV cache: fixed storage, one tensor for all layers, whose length is its whole state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from specvlm.core.errors import CapacityError
from specvlm.core.upload import upload


class KVCache:
    """Keys and values of one sequence.

    Rows behind `length` are free space, so going back is setting a number. The Hugging Face modules call `update`;
    the fused decoder writes into `storage` itself; everything else belongs to the session that owns the cache.

    Args:
        storage: [layers, 2, heads, capacity, head_dim], keys first.
    """

    def __init__(self, storage: Tensor) -> None:
        self.storage = storage
        self.length = 0

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.storage.shape[3]

    def reserve(self, count: int) -> None:
        """Refuse rows that do not fit behind `length`.

        Raises:
            CapacityError: they do not.
        """
        if self.length + count > self.capacity:
            raise CapacityError(f"{self.length + count} rows do not fit in a KV cache of {self.capacity}")

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new rows [1, heads, T, head_dim] behind `length`; return all rows up to and with them.

        The length moves only with `advance`, once every layer has stored its rows.
        """
        self.reserve(keys.shape[2])
        end = self.length + keys.shape[2]
        stored = self.storage[layer_idx]
        stored[0, :, self.length : end] = keys[0]
        stored[1, :, self.length : end] = values[0]
        return stored[:1, :, :end], stored[1:, :, :end]

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
            source = upload([base + row for row in rows], self.storage.device)
            self.storage[:, :, :, base : base + count] = self.storage.index_select(3, source)
        self.length = base + count
