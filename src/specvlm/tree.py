"""Draft topologies. A chain is a tree; a tree is its nodes' parents, the root (the last known token) left out.

Nodes stand in breadth-first order, so a parent always stands before its children. `parents` holds indices of nodes, -1
for children of the root; `ranks` says which of its parent's candidates a node is (0 = the draft's first choice).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specvlm.errors import ConfigError

# SpecVLM (arXiv 2508.16201), section 4: 25 nodes, level widths 4/8/8/3/2, as child-rank paths.
PAPER_PATHS = (
    "0", "1", "2", "3",
    "00", "01", "02", "10", "11", "20", "21", "30",
    "000", "001", "002", "010", "011", "020", "021", "100",
    "0000", "0001", "0002",
    "00000", "00001",
)  # fmt: skip
MAX_NODES = 127  # a verification pass has one row more: 128


@dataclass(frozen=True)
class Tree:
    """A static topology of N nodes."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node; a child of the root has depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Depth of the deepest node, 0 for the empty tree."""
        return max(self.depths, default=0)


def from_paths(paths: Iterable[str]) -> Tree:
    """Build a tree from child-rank paths: "02" is the third choice after the first choice.

    Raises:
        ConfigError: a path is not made of digits, stands twice, or lacks its parent, or there are too many.
    """
    ordered = sorted(paths, key=lambda path: (len(path), path))
    if len(ordered) > MAX_NODES:
        raise ConfigError(f"tree has {len(ordered)} nodes: at most {MAX_NODES} are allowed")
    index: dict[str, int] = {"": -1}
    parents = []
    for node, path in enumerate(ordered):
        if not (path.isascii() and path.isdigit()) or path in index:
            raise ConfigError(f"tree path {path!r} is not allowed: a path is a row of digits and stands once")
        if path[:-1] not in index:
            raise ConfigError(f"tree path {path!r} has no parent: add {path[:-1]!r}")
        elder = f"{path[:-1]}{int(path[-1]) - 1}"
        if path[-1] != "0" and elder not in index:  # sampling draws siblings one after another and skips none
            raise ConfigError(f"tree path {path!r} has no elder sibling: add {elder!r}")
        index[path] = node
        parents.append(index[path[:-1]])
    return Tree(tuple(parents), tuple(int(path[-1]) for path in ordered))


def chain(length: int) -> Tree:
    """Return a chain of `length` first choices."""
    if not 1 <= length <= MAX_NODES:
        raise ConfigError(f"tree='chain:{length}' is not allowed: a chain has 1 to {MAX_NODES} nodes")
    return Tree(tuple(range(-1, length - 1)), (0,) * length)


def parse(spec: str | Iterable[str]) -> Tree:
    """Build a tree from its setting: "paper", "chain:5", "0,1,00" or a sequence of paths.

    Raises:
        ConfigError: the setting is none of these.
    """
    if not isinstance(spec, str):
        return from_paths(spec)
    if spec == "paper":
        return from_paths(PAPER_PATHS)
    name, _, length = spec.partition(":")
    if name == "chain":
        if not (length.isascii() and length.isdigit()):
            raise ConfigError(f"tree={spec!r} is not allowed: write chain:N with a number N, such as chain:5")
        return chain(int(length))
    if spec[:1].isalpha() or not spec:
        raise ConfigError(f"tree={spec!r} is not allowed: paper, chain:N, or paths such as 0,1,00,01")
    return from_paths(path.strip() for path in spec.split(","))


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


@dataclass(frozen=True)
class Rows:
    """N new rows of a pass over a tree of M rows, of which they are the last."""

    sees: Tensor  # [N, M] bool: what each new row sees of the tree
    depths: Tensor  # [N] int32, 1 for children of the known text
    is_chain: bool  # the new rows are all of the tree, each below the one before

    @staticmethod
    def of(parents: Sequence[int], count: int, device: torch.device) -> Rows:
        """Return the last `count` rows of the tree with these parents."""
        sees = ancestors(parents)[len(parents) - count :]
        is_chain = list(parents) == list(range(-1, count - 1))
        return Rows(sees.to(device), sees.sum(1, dtype=torch.int32).to(device), is_chain)
