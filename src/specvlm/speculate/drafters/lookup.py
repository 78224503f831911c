"""Prompt lookup: a draft without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from specvlm.core import tree
from specvlm.core.config import DraftConfig
from specvlm.core.tree import Shape, Tree
from specvlm.core.upload import upload
from specvlm.runtime.model import VideoLM
from specvlm.speculate.accept import Accepted, Draft
from specvlm.speculate.drafters.base import Context, Drafter, drafter
from specvlm.speculate.ngrams import words_of
from specvlm.speculate.policy import Observation


@drafter("lookup")
class LookupDrafter(Drafter):
    """Proposes what followed the newest tokens when prompt or text held them before: no model, no memory."""

    def __init__(self, model: VideoLM | None, config: DraftConfig, context: Context) -> None:
        self.device = context.target.device
        self._lookup = words_of(context.prompt, context.text)
        self._proposed: list[int] = []
        self._chains: dict[int, Draft] = {}  # by length, on the target's device

    @classmethod
    def options(cls, config: DraftConfig, sizes: Sequence[int]) -> Sequence[Shape | Tree]:
        """Return chains of any prepared length, none longer than the tree that was asked for is deep."""
        most = 31 if config.tree == "dynamic" else tree.parse(config.tree).depth
        return [tree.chain(length) for length in sorted({min(size - 1, most) for size in sizes} - {0})]

    def propose(self, token: int, topology: Shape | Tree) -> Draft:
        """Propose one chain, as long as the tree is deep."""
        self._lookup.extend([token])
        self._proposed = self._lookup.find(topology.depth)
        if not self._proposed:
            return Draft.empty()
        if topology.depth not in self._chains:
            self._chains[topology.depth] = Draft.of([-1] * topology.depth, range(-1, topology.depth - 1), self.device)
        padding = [-1] * (topology.depth - len(self._proposed))  # one size of pass, whatever was found
        tokens = upload([*self._proposed, *padding], self.device)
        return replace(self._chains[topology.depth], tokens=tokens)

    def commit(self, accepted: Accepted) -> Sequence[Observation]:
        """Add what stands to the index."""
        stood = len(accepted.nodes)
        self._lookup.extend(accepted.token_ids[:stood])
        seen = min(stood + 1, len(self._proposed))
        return [Observation(depth + 1, 0 if depth < stood else None) for depth in range(seen)]
