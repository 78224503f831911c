"""Trees as the passes see them: which rows see which, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.core.byvalue import ByValue


def ancestors(parents: Sequence[int]) -> Tensor:
    """Return which nodes each node sees of the tree: itself and its ancestors.

    Args:
        parents: N indices, -1 for children of the root; a parent stands before its children.

    Returns:
        [N, N] bool; row i, column j: j is i or an ancestor of i. Its row sums are the depths.
    """
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees


def ancestors_on_device(parents: Tensor, depth: int) -> Tensor:
    """Do what `ancestors` does for parents [N] int64 of a tree at most this deep, without waiting for the device."""
    count = parents.shape[0]
    columns = torch.arange(count, device=parents.device)
    sees = (parents[:, None] == columns).float() + torch.eye(count, device=parents.device)
    for _ in range(depth.bit_length()):  # each squaring doubles how far up a node sees
        sees = (sees @ sees).clamp_max(1)
    return sees > 0


@dataclass(frozen=True, eq=False)
class Rows(ByValue):
    """N new rows of a pass over a tree of M rows, of which they are the last."""

    sees: Tensor  # [N, M] bool: what each new row sees of the tree
    depths: Tensor  # [N] int32, 1 for children of the known text
    is_chain: bool = False  # known to be all of the tree, each row below the one before

    @staticmethod
    def of(parents: Sequence[int], count: int, device: torch.device) -> Rows:
        """Return the last `count` rows of the tree with these parents."""
        sees = ancestors(parents)[len(parents) - count :]
        is_chain = list(parents) == list(range(-1, count - 1))
        return Rows.that_see(sees.to(device), is_chain)

    @staticmethod
    def that_see(sees: Tensor, is_chain: bool = False) -> Rows:
        """Return the rows with this mask [N, M]."""
        return Rows(sees, sees.sum(1, dtype=torch.int32), is_chain)

    def to(self, device: torch.device) -> Rows:
        """Return the rows on a device."""
        return Rows(self.sees.to(device), self.depths.to(device), self.is_chain)
