"""The paper's pruner: what the verifier looks at, and the rest thinned evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from specvlm.prune.selection import pruner
from specvlm.prune.spread import evenly


@pruner("verifier")
def verifier(
    scores: Tensor, grid: Tensor, count: int, *, mass: float = 0.4, focus: float = 0.5, spacing: str = "grid"
) -> Tensor:
    """Both stages of SpecVLM (section 3.2): top-P by the target's attention, then the rest thinned evenly.

    Stage I takes at most `focus` of the budget (1 in the paper). Where attention is flat, as in small models, `mass` is
    never reached and stage I would leave nothing to stage II.
    """
    top = scores.topk(round(focus * count))  # so no full sort is needed
    covered = top.values.cumsum(0) - top.values  # the mass before each token
    chosen = top.indices[covered < mass * scores.sum()]
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[chosen] = False
    return torch.cat([chosen, evenly(rest.nonzero().squeeze(1), grid, count - chosen.shape[0], spacing)])
