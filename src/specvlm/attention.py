"""The attention function that the language models run: causal prefill, tree steps, and scores as a by-product.

It is registered with transformers under the name `specvlm` and selected for the text model alone. A `Plan` travels to
it through the forward call's keyword arguments. Without a plan it is plain causal attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "specvlm"
_SCORE_ELEMENTS = 1 << 24  # most attention weights that scoring holds at a time, 64 MiB in fp32


class Plan:
    """What the rows of one forward pass see, and whether they score the visual tokens.

    Args:
        tree: [q, m] bool: what each of the q new rows sees of the last m stored rows, the new ones included; everything
            before those m is seen by all. None is causal.
        scores: collects the attention of the new rows, None collects nothing.
    """

    def __init__(self, tree: Tensor | None = None, scores: Scores | None = None) -> None:
        self.tree = tree
        self.scores = scores
        self._mask: Tensor | None = None

    def mask(self, num_rows: int, num_keys: int, device: torch.device) -> Tensor | None:
        """Return the [q, keys] bool mask, made once for all layers; None where every row sees all keys."""
        if self.tree is None and num_rows == 1:
            return None
        if self._mask is None:
            if self.tree is None:
                mask = torch.ones(num_rows, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_rows)
            else:
                mask = F.pad(self.tree, (num_keys - self.tree.shape[1], 0), value=True)
            self._mask = mask
        return self._mask


class Scores:
    """Sums the attention that text rows pay to the visual tokens (SpecVLM, section 3.2, a_j).

    Args:
        visual_index: [V] int64, places of the visual tokens among the keys.
        rows: [R] int64, which of the new rows score.
    """

    def __init__(self, visual_index: Tensor, rows: Tensor) -> None:
        self.visual_index = visual_index
        self.rows = rows
        self._total = torch.zeros(visual_index.shape[0], dtype=torch.float32, device=visual_index.device)
        self._count = 0

    @property
    def mean(self) -> Tensor:
        """[V] float32: the attention a visual token gets, averaged over text rows, heads and layers."""
        return self._total / max(self._count, 1)

    def add(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Add one layer: query [1, H, q, d] of all new rows, key [1, H_kv, keys, d] of everything up to them.

        A row's weights are exact: the softmax runs over all keys that the row sees, and the visual share is kept.
        """
        heads, num_rows, num_keys = query.shape[1], query.shape[2], key.shape[2]
        step = max(1, _SCORE_ELEMENTS // (heads * num_keys))
        columns = torch.arange(num_keys, device=key.device)
        for rows in torch.split(self.rows, step):
            grouped = query[0, :, rows].reshape(key.shape[1], -1, query.shape[3])  # [H_kv, group * R, d]
            logits = (grouped @ key[0].transpose(1, 2)).float() * scaling
            logits = logits.view(heads, rows.shape[0], num_keys)
            hidden = columns > (num_keys - num_rows + rows)[:, None]
            weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
            self._total += weights.sum((0, 1))[self.visual_index]
        self._count += heads * self.rows.shape[0]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: Plan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with query [1, H, q, d] to key, value [1, H_kv, keys, d]; return [1, q, H, d].

    The signature is transformers' attention interface; `attention_mask` is None in our own calls, and a 4-D mask from
    elsewhere is used as it is.
    """
    num_rows, num_keys = query.shape[2], key.shape[2]
    plan = plan or Plan()
    if plan.scores is not None:
        plan.scores.add(query, key, scaling)
    is_prefill = attention_mask is None and plan.tree is None and num_rows == num_keys > 1
    mask = attention_mask
    if mask is None and not is_prefill:
        mask = plan.mask(num_rows, num_keys, query.device)
    is_grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_prefill, scale=scaling, enable_gqa=is_grouped
    )
    return out.transpose(1, 2).contiguous(), None


# No mask function is registered under this name on purpose: transformers then builds no dense mask at all, and the plan
# says what is seen.
AttentionInterface.register(NAME, attend)
