"""Attention over a KV cache: causal prefill in chunks, tree steps, and scores as a by-product.

`attend` is what the Hugging Face modules call: registered with transformers under the name `specvlm` and selected for
the text model alone. A `Plan` travels to it through the forward call's keyword arguments. The fused decoder calls
`causal`, `Scores` and the tree kernel itself.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from specvlm.core.rows import Rows

NAME = "specvlm"
_SCORE_ELEMENTS = 1 << 24  # most attention weights that scoring holds at a time, 64 MiB in fp32


class Plan:
    """What the rows of one forward pass see, and whether they score the visual tokens.

    Args:
        rows: tree rows, which stand behind a known text that all of them see; None is causal.
        scores: collects the attention of the new rows (of tree rows, the first one's), None collects nothing.
    """

    def __init__(self, rows: Rows | None = None, scores: Scores | None = None) -> None:
        self.is_tree = rows is not None
        self.rows = None if rows is None or rows.is_chain else rows
        self.scores = scores
        self._mask: Tensor | None = None

    def mask(self, num_keys: int) -> Tensor | None:
        """Return the [q, keys] bool mask of a tree, made once for all layers; None where the rows are causal."""
        if self.rows is not None and self._mask is None:
            sees = self.rows.sees
            self._mask = F.pad(sees, (num_keys - sees.shape[1], 0), value=True)
        return self._mask


class Scores:
    """Sums the attention that text rows pay to the visual tokens (SpecVLM, section 3.2, a_j).

    Args:
        visual_index: [V] int64, places of the visual tokens in the prompt.
        first: the first row of the prompt that scores; all behind it do. The visual tokens stand before it.
        layers: the decoder layers that score; None is all of them.
    """

    def __init__(self, visual_index: Tensor, first: int, layers: Collection[int] | None = None) -> None:
        self.visual_index = visual_index
        self.first = first
        self._layers = layers
        self._total = torch.zeros(visual_index.shape[0], dtype=torch.float32, device=visual_index.device)
        self._count = 0

    @property
    def mean(self) -> Tensor:
        """[V] float32: the attention a visual token gets, averaged over text rows, heads and layers."""
        return self._total / max(self._count, 1)

    def add(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Add one layer of one chunk: query [1, H, q, d] of its rows, key [1, H_kv, keys, d] of all up to them.

        A row's weights are exact: the softmax runs over all keys that the row sees, and the visual share is kept.
        """
        if self._layers is not None and layer not in self._layers:
            return
        heads, num_rows, num_keys = query.shape[1], query.shape[2], key.shape[2]
        before = num_keys - num_rows
        begin = max(self.first - before, 0)
        step = max(1, _SCORE_ELEMENTS // (heads * num_keys))
        columns = torch.arange(num_keys, device=key.device)
        for low in range(begin, num_rows, step):
            rows = query[0, :, low : low + step]
            count = rows.shape[1]
            grouped = rows.reshape(key.shape[1], -1, query.shape[3])  # [H_kv, group * R, d]
            logits = (grouped @ key[0].transpose(1, 2)).float() * scaling
            logits = logits.view(heads, count, num_keys)
            hidden = columns > torch.arange(before + low, before + low + count, device=key.device)[:, None]
            weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
            self._total += weights.sum((0, 1))[self.visual_index]
        self._count += heads * max(num_rows - begin, 0)


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attend with the last q of n rows to all up to themselves.

    Args:
        query: [1, H, q, d].
        key: [1, H_kv, n, d], as `value`.
        scaling: of the logits.

    Returns:
        [1, H, q, d].
    """
    num_rows, num_keys = query.shape[2], key.shape[2]
    is_square = num_rows == num_keys
    mask: Any = None
    if num_rows > 1 and not is_square:
        if query.is_cuda and query.dtype != torch.float32:
            mask = causal_lower_right(num_rows, num_keys)  # keeps the flash kernel
        else:
            mask = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_rows)
    out: Tensor = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_square and num_rows > 1,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attend with query [1, H, q, d] to key, value [1, H_kv, n, d] where mask [q, n] allows it; None is causal."""
    if mask is None:
        return causal(query, key, value, scaling)
    is_grouped = key.shape[1] != query.shape[1]
    out: Tensor = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=is_grouped
    )
    return out


def attend(
    module: Any,
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
    plan = plan or Plan()
    if plan.scores is not None:
        count = query.shape[2] - 1 if plan.is_tree else 0  # of a tree, the root alone scores
        seen = key[:, :, : key.shape[2] - count]
        plan.scores.add(int(module.layer_idx), query[:, :, : query.shape[2] - count], seen, scaling)
    mask = plan.mask(key.shape[2]) if attention_mask is None else attention_mask
    return masked(query, key, value, mask, scaling).transpose(1, 2).contiguous(), None


# No mask function is registered under this name on purpose: transformers then builds no dense mask at all, and the plan
# says what is seen.
AttentionInterface.register(NAME, attend)
