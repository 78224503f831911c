"""Draft topologies. A chain is a tree; a tree is its nodes' parents, the root (the last known token) left out.

A `Tree` is static: its shape is known beforehand. A `Shape` only bounds a tree that grows anew in every round.

Nodes stand in breadth-first order, so a parent always stands before its children. `parents` holds indices of nodes, -1
for children of the root; `ranks` says which of its parent's candidates a node is (0 = the draft's first choice).

No tensors here (rows.py), so that a command line with a wrong tree is answered without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from specvlm.core.config import shown
from specvlm.core.errors import ConfigError

# SpecVLM (arXiv 2508.16201), section 4: 25 nodes, level widths 4/8/8/3/2, as child-rank paths.
PAPER_PATHS = (
    "0", "1", "2", "3",
    "00", "01", "02", "10", "11", "20", "21", "30",
    "000", "001", "002", "010", "011", "020", "021", "100",
    "0000", "0001", "0002",
    "00000", "00001",
)  # fmt: skip
MAX_NODES = 127  # a verification pass has one row more: 128
MAX_DEPTH = 16  # of a dynamic tree
NUM_RANKS = 4  # candidates that a dynamic tree keeps of every row that the draft runs


@dataclass(frozen=True)
class Shape:
    """The bounds of a dynamic tree, which grows by the draft's own path probabilities (EAGLE-2, arXiv 2406.16858).

    The draft's first pass gives NUM_RANKS candidates; each further one runs the best `width` candidates of the depth
    before. Of all candidates the `nodes` with the likeliest paths are verified.
    """

    depth: int  # passes of the draft; 0 drafts nothing
    width: int  # rows of each pass after the first, at most
    nodes: int  # nodes that the target verifies

    def __len__(self) -> int:
        return self.nodes

    @property
    def passes(self) -> tuple[int, ...]:
        """Rows whose candidates each pass of the draft gives."""
        rows = [1][: self.depth]
        while len(rows) < self.depth:
            rows.append(min(self.width, NUM_RANKS * rows[-1]))
        return tuple(rows)

    @property
    def num_candidates(self) -> int:
        """Candidates among which the nodes are chosen."""
        return NUM_RANKS * sum(self.passes)


PLAIN = Shape(0, 0, 0)


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

    @cached_property
    def passes(self) -> tuple[int, ...]:
        """Rows whose candidates each pass of the draft gives: the root, then the nodes with children of each depth."""
        inner = set(self.parents) - {-1}
        return (1, *(sum(self.depths[node] == depth for node in inner) for depth in range(1, self.depth)))[: self.depth]


def from_paths(paths: Iterable[str]) -> Tree:
    """Build a tree from child-rank paths: "02" is the third choice after the first choice.

    Raises:
        ConfigError: a path is not made of digits, stands twice, or lacks its parent, or there are too many or none.
    """
    ordered = sorted(paths, key=lambda path: (len(path), path))
    if not ordered:
        raise ConfigError("tree=() is not allowed: give paths such as 0,1,00, or drafter='none' to draft nothing")
    if len(ordered) > MAX_NODES:
        raise ConfigError(f"tree has {len(ordered)} nodes: at most {MAX_NODES} are allowed")
    index: dict[str, int] = {"": -1}
    parents = []
    for node, path in enumerate(ordered):
        if not (path.isascii() and path.isdigit()) or path in index:
            raise ConfigError(f"tree path {shown(path)} is not allowed: a path is a row of digits and stands once")
        if path[:-1] not in index:
            raise ConfigError(f"tree path {shown(path)} has no parent: add {shown(path[:-1])}")
        index[path] = node
        parents.append(index[path[:-1]])
    return Tree(tuple(parents), tuple(int(path[-1]) for path in ordered))


def chain(length: int) -> Tree:
    """Return a chain of `length` first choices."""
    if not 1 <= length <= MAX_NODES:
        raise ConfigError(f"tree='chain:{length}' is not allowed: a chain has 1 to {MAX_NODES} nodes")
    return Tree(tuple(range(-1, length - 1)), (0,) * length)


def parse(spec: str | Iterable[str]) -> Tree | Shape:
    """Build a tree from its setting: "dynamic", "dynamic:25:5", "paper", "chain:5", "0,1,00" or a sequence of paths.

    Raises:
        ConfigError: the setting is none of these.
    """
    if not isinstance(spec, str):
        return from_paths(spec)
    if spec == "paper":
        return from_paths(PAPER_PATHS)
    name, _, size = spec.partition(":")
    if name == "chain":
        if not _is_number(size):
            raise ConfigError(f"tree={shown(spec)} is not allowed: write chain:N with a number N, such as chain:5")
        return chain(int(size))
    if name == "dynamic":
        return _dynamic(spec, size or "25:5")
    if spec[:1].isalpha() or not spec:
        raise ConfigError(f"tree={shown(spec)} is not allowed: dynamic, paper, chain:N, or paths such as 0,1,00,01")
    return from_paths(path.strip() for path in spec.split(","))


def _is_number(text: str) -> bool:
    """Whether text is a number of few digits."""
    return text.isascii() and text.isdigit() and len(text) < 10


def _dynamic(spec: str, size: str) -> Shape:
    numbers = size.split(":")
    if len(numbers) != 2 or not all(map(_is_number, numbers)):
        raise ConfigError(f"tree={shown(spec)} is not allowed: write dynamic:NODES:DEPTH, such as dynamic:25:5")
    nodes, depth = map(int, numbers)
    if not (1 <= nodes <= MAX_NODES and 1 <= depth <= min(MAX_DEPTH, nodes)):
        allowed = f"1 to {MAX_NODES} nodes, a depth from 1 to {MAX_DEPTH} and to the nodes"
        raise ConfigError(f"tree={shown(spec)} is not allowed: {allowed}")
    for width in (1, 4, 8, 16):
        shape = Shape(depth, width, nodes)
        if nodes <= max(shape.num_candidates // 2, depth):
            return shape
    raise ConfigError(f"tree={shown(spec)} is not allowed: {nodes} nodes are too many for a depth of {depth}")
