"""A round's tree, grown level by level on the draft's device without waiting for it.

Every row that the draft runs offers its best few tokens as candidates. The best candidates of a depth are run next; of
all candidates, those with the likeliest paths become the drafted nodes (dynamic trees, EAGLE-2, arXiv 2406.16858). A
static tree says beforehand which candidates these are. Everything lives in tensors of fixed place, so that each level
is one CUDA graph, whatever tree grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from specvlm.core.rows import Rows, ancestors_on_device
from specvlm.core.tree import NUM_RANKS, Shape, Tree
from specvlm.core.upload import upload
from specvlm.speculate.accept import Accepted, Draft
from specvlm.speculate.policy import BIN_EDGES, Observation

# Every round begins with the last two known tokens. The older one was often run before (it is not where a leaf was
# accepted), but running it again costs nothing beside reading the weights, and the round keeps one shape.
OVERLAP = (-1, 0)
# Candidates of one rank and confidence are worth the same; among them the draft's own probability decides.
TIE_BREAK, LEAST_LOG_PROB = 1e-3, -20.0


_PARTS = 32  # of a vocabulary: a GPU ranks many short rows in less time than few long ones


def best(scores: Tensor, count: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Return the largest `count` scores of each row [N, vocab] and their places, both [N, count], largest first.

    Args:
        scores: [N, vocab].
        count: how many.
        parts: pieces of a row that are ranked by themselves first; a vocabulary that it does not divide stays whole.
    """
    rows, size = scores.shape
    if parts == 1 or size % parts or size // parts < count:
        top = scores.topk(count)
        return top.values, top.indices
    first = scores.reshape(rows, parts, size // parts).topk(count)
    begins = torch.arange(0, size, size // parts, device=scores.device)
    places = (first.indices + begins[:, None]).flatten(1)
    last = first.values.flatten(1).topk(count)
    return last.values, places.gather(1, last.indices)


def round_passes(topology: Tree | Shape) -> list[int]:
    """Return the rows that each pass of a round runs, the overlap's first."""
    return [len(OVERLAP), *topology.passes[1:]]


class Growth:
    """The tensors of one round.

    Args:
        topology: a static tree; or a shape, whose deepest form this growth can reach (`nodes` is not read).
        worth: [NUM_RANKS, bins] float32, of fixed place: log of the chance that the target chooses a candidate, by its
            rank and the draft's confidence.
        device: the draft's.
    """

    def __init__(self, topology: Tree | Shape, worth: Tensor, device: torch.device) -> None:
        self._tree = topology if isinstance(topology, Tree) else None
        self._worth = worth
        self._passes = topology.passes
        self._ranks = NUM_RANKS if self._tree is None else max(NUM_RANKS, 1 + max(self._tree.ranks))
        self.num_rows = len(OVERLAP) + sum(self._passes[1:])
        count = self._ranks * sum(self._passes)
        numbers = partial(torch.zeros, dtype=torch.int64, device=device)
        self._tokens, self._parents, self._bins, self._row_of = (numbers(count) for _ in range(4))
        self._scores = torch.zeros(count, dtype=torch.float32, device=device)
        self._edges = torch.tensor(BIN_EDGES, dtype=torch.float32, device=device)
        self._rank = torch.arange(self._ranks, device=device).clamp_max(NUM_RANKS - 1)
        self.sees = torch.zeros(self.num_rows, self.num_rows, dtype=torch.bool, device=device)
        self.sees[: len(OVERLAP), : len(OVERLAP)] = torch.ones(len(OVERLAP), len(OVERLAP)).tril().bool()
        self.row_tokens = numbers(self.num_rows)
        # candidates that each pass runs; -1: the root
        self._running = [numbers(1) - 1, *map(numbers, self._passes[1:])]
        self._eyes = [torch.eye(rows, dtype=torch.bool, device=device) for rows in self._passes]
        self._chosen: Tensor | None = None  # of a static tree: the candidate of each node
        if self._tree is not None:
            self._fix(self._tree, device)

    def _fix(self, static: Tree, device: torch.device) -> None:
        """Say which candidates a static tree runs and takes."""
        place_of: dict[int, int] = {}  # candidate of each node
        inner, slots = set(static.parents) - {-1}, {-1: 0}
        for depth in range(1, static.depth + 1):
            nodes = [node for node in range(len(static)) if static.depths[node] == depth]
            for node in nodes:
                slot = slots[static.parents[node]]
                place_of[node] = self._offset(depth - 1) + slot * self._ranks + static.ranks[node]
            running = [node for node in nodes if node in inner]
            slots = {node: slot for slot, node in enumerate(running)}
            if running:
                self._running[depth].copy_(upload([place_of[node] for node in running], device))
        self._chosen = upload([place_of[node] for node in range(len(static))], device)

    def _offset(self, level: int) -> int:
        """Return the first candidate of a level."""
        return self._ranks * sum(self._passes[:level])

    def _first_row(self, level: int) -> int:
        """Return the row of the first node that pass `level` runs; the overlap's last row is the root's."""
        return len(OVERLAP) - 1 if level == 0 else len(OVERLAP) + sum(self._passes[1:level])

    def start(self, tokens: Tensor) -> Rows:
        """Begin with the overlap's tokens [2]; return its rows."""
        self._row_of.fill_(-1)
        self.row_tokens[: len(OVERLAP)] = tokens
        return Rows.that_see(self.sees[: len(OVERLAP), : len(OVERLAP)])

    def offer(self, level: int, scores: Tensor) -> None:
        """Take the candidates of the rows that pass `level` ran, given scores [rows, vocab] of their next tokens."""
        values, tokens = best(scores, self._ranks, _PARTS if scores.is_cuda else 1)
        here = slice(self._offset(level), self._offset(level + 1))
        self._tokens[here] = tokens.flatten()
        running = self._running[level]
        self._parents[here] = running.repeat_interleave(self._ranks)
        log_probs = values - scores.logsumexp(-1, keepdim=True)
        bins = (log_probs.exp()[..., None] <= self._edges).sum(-1)
        self._bins[here] = bins.flatten()
        before = self._scores[running][:, None] if level else 0.0
        worth = self._worth[self._rank, bins] + TIE_BREAK * log_probs.clamp_min(LEAST_LOG_PROB)
        self._scores[here] = (before + worth).flatten()

    def run_next(self, level: int) -> tuple[Tensor, Rows]:
        """Return tokens [n] and rows of pass `level`: the best candidates of the level before, below their parents."""
        running, base = self._running[level], self._first_row(level)
        if self._tree is None:
            first, end = self._offset(level - 1), self._offset(level)
            running.copy_(self._scores[first:end].topk(running.shape[0]).indices + first)
        end = base + running.shape[0]
        if level == 1:
            above = self.sees[len(OVERLAP) - 1].expand(running.shape[0], -1)
        else:
            above = self.sees[self._row_of[self._parents[running]]]
        self._row_of[running] = torch.arange(base, end, device=running.device)
        self.sees[base:end] = above
        self.sees[base:end, base:end] = self._eyes[level]
        tokens = self._tokens[running]
        self.row_tokens[base:end] = tokens
        return tokens, Rows.that_see(self.sees[base:end, :end].contiguous())

    def nodes(self, topology: Tree | Shape) -> Draft:
        """Return the drafted tree out of all candidates."""
        count = self._ranks * sum(self._passes[: topology.depth])
        chosen = self._chosen
        if chosen is None:  # a path is less likely than its parent's, so parents are chosen with their children
            chosen = self._scores[:count].topk(len(topology)).indices.sort().values
        node_of = torch.full((count + 1,), -1, dtype=torch.int64, device=chosen.device)  # the last one is the root's
        node_of[chosen] = torch.arange(len(topology), device=chosen.device)
        parents = node_of[self._parents[chosen]]
        below_root = torch.cat([parents.new_full((1,), -1), parents + 1])
        rows = Rows.that_see(ancestors_on_device(below_root, topology.depth + 1))
        notes = torch.cat([chosen, self._tokens[:count], self._row_of[:count], self._bins[:count]])
        return Draft(self._tokens[chosen], parents, rows, notes)

    def read(self, num_nodes: int, accepted: Accepted) -> tuple[list[int], list[Observation]]:
        """Return what a verdict says about this round.

        Args:
            num_nodes: of the draft that `nodes` returned.
            accepted: the verdict, with that draft's notes.

        Returns:
            Of each accepted node, from the root down, the row at which it was run, -1 if it was not; and what each row
            that was run on the accepted path says about its candidates.
        """
        count = (len(accepted.notes) - num_nodes) // 3
        notes, at = accepted.notes, num_nodes
        chosen, tokens = notes[:at], notes[at : at + count]
        row_of, bins = notes[at + count : at + 2 * count], notes[at + 2 * count :]
        rows = [row_of[chosen[node]] if node < num_nodes else -1 for node in accepted.nodes]
        observations = []
        for level, row in enumerate([len(OVERLAP) - 1, *rows]):
            if row < 0 or level >= len(self._passes):
                break
            first = self._offset(level) + (row - self._first_row(level)) * self._ranks
            if first >= count:
                break
            offered = tokens[first : first + NUM_RANKS]
            found = accepted.token_ids[level]
            hit = offered.index(found) if found in offered else None
            observations.append(Observation(level + 1, hit, tuple(bins[first : first + NUM_RANKS])))
        return rows, observations


def append_chain(draft: Draft, extra: Sequence[int], device: torch.device) -> Draft:
    """Return a draft with a chain of further tokens below the root, behind its own nodes; -1 leaves a place empty."""
    count, more = len(draft), len(extra)
    parents = torch.cat([draft.parents, upload([-1, *range(count, count + more - 1)], device)])
    sees = torch.zeros(count + more + 1, count + more + 1, dtype=torch.bool, device=device)
    sees[: count + 1, : count + 1] = draft.rows.sees
    sees[count + 1 :, count + 1 :] = torch.ones(more, more, dtype=torch.bool, device=device).tril()
    sees[:, 0].fill_(True)
    tokens = torch.cat([draft.tokens, upload(extra, device)])
    return Draft(tokens, parents, Rows.that_see(sees), draft.notes)
