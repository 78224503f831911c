"""Plain decoding."""

from __future__ import annotations

from collections.abc import Sequence

from specvlm.core.config import DraftConfig
from specvlm.core.tree import Shape, Tree
from specvlm.speculate.accept import Draft
from specvlm.speculate.drafters.base import Drafter, drafter


@drafter("none")
class NoDrafter(Drafter):
    """Proposes nothing: plain decoding, in the same engine and counted in the same way."""

    @classmethod
    def options(cls, config: DraftConfig, sizes: Sequence[int]) -> Sequence[Shape | Tree]:
        """There is nothing to choose."""
        return []

    def propose(self, token: int, topology: Shape | Tree) -> Draft:
        """Propose nothing."""
        return Draft.empty()
