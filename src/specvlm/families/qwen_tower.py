"""The vision tower of the Qwen models in batches of frames, its attention in one launch for all windows of a length.

Hugging Face's tower takes all frames at once and, without flash-attn, launches one attention per window or frame and
layer; its norms, rotation and activation cost many passes over the rows. `install` replaces the forward functions of
one loaded tower; classes and module names stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specvlm.core.plain import FLOATS, is_linear, is_plain, is_untouched, joined
from specvlm.kernels.activation import silu_mul
from specvlm.kernels.norm import add_rms_norm
from specvlm.kernels.rope import rope_and_store

MAX_PATCHES = 16384  # of one batch: enough rows for full speed, few enough for their activations (0.5 GiB in bf16)

_MLP_MULTIPLE = 64
_ALIGNED_BYTES = 16  # a row of a matrix must start at a multiple of this for a GPU's fast matrix products

Grid = Sequence[int]  # time steps, rows and columns of one video or image, in patches


def install(tower: Any) -> None:
    """Make a loaded Qwen tower (`model.model.visual`) run as described above; a second call changes nothing.

    A tower of other modules or weights than transformers' own runs as it is.

    Args:
        tower: Qwen2-VL's, Qwen2.5-VL's or Qwen3-VL's vision model, on its device.
    """
    if isinstance(tower.forward, FrameBatches) or not is_supported(tower):
        return
    tower.patch_embed.forward = partial(_embed, tower.patch_embed.proj)
    for block in tower.blocks:
        _align(block.mlp)
        block.forward = Block(block)
    tower.forward = FrameBatches(tower)


def is_supported(tower: Any) -> bool:
    """Whether a tower's modules are what `install` replaces: transformers' own, untouched, with plain weights."""
    origin, conv = type(tower).__module__, tower.patch_embed.proj
    like = conv.weight
    if not (origin.startswith("transformers.models.") and like.dtype in FLOATS and is_plain(conv, like)):
        return False
    blocks = [part for block in tower.blocks for part in (block, block.attn, block.mlp)]
    known = (tower, tower.patch_embed, *blocks)
    if not all(type(module).__module__ == origin and is_untouched(module) for module in known):
        return False
    return type(conv) is nn.Conv3d and all(_is_plain_block(block, like) for block in tower.blocks)


def _is_plain_block(block: Any, like: Tensor) -> bool:
    """Whether all weights of a block are plain."""
    linears = [block.attn.qkv, block.attn.proj, *(part for part in block.mlp.children() if hasattr(part, "weight"))]
    are_linear = all(is_linear(part, like, has_bias=part.bias is not None) for part in linears if hasattr(part, "bias"))
    return are_linear and all(is_plain(norm, like) for norm in (block.norm1, block.norm2))


def batches(grids: Sequence[Grid], most: int) -> list[list[tuple[int, int, int]]]:
    """Cut grids into batches of whole time steps with at most `most` patches each, in order.

    A time step of more patches is a batch by itself: attention spans it.
    """
    cut: list[list[tuple[int, int, int]]] = []
    room = 0
    for steps, rows, columns in grids:
        size = rows * columns
        while steps:
            if not cut or room < size:
                cut.append([])
                room = most
            taken = max(1, min(steps, room // size))
            cut[-1].append((taken, rows, columns))
            steps, room = steps - taken, room - taken * size
    return cut


class FrameBatches:
    """A tower's forward function in batches of at most MAX_PATCHES patches.

    Attention never leaves a time step, so the results are those of one pass. Only what the language model reads is
    returned, without gradients: the features [tokens, D] and Qwen3-VL's deepstack features; the tower's last hidden
    states are four times as many rows.
    """

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self._forward = tower.forward

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """Encode patches [patches, values] of videos or images with the grids [n, 3]; see class."""
        parts = batches(grid_thw.tolist(), MAX_PATCHES)
        sizes = [sum(steps * rows * columns for steps, rows, columns in part) for part in parts]
        total, start = hidden_states.shape[0] // self._tower.spatial_merge_size**2, 0
        features: list[Tensor] = []
        for pixels, part in zip(torch.split(hidden_states, sizes), parts, strict=True):
            out = self._forward(pixels, grid_thw=grid_thw.new_tensor(part), known_segments=KnownSegments(), **kwargs)
            found = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
            if len(parts) == 1:
                features = found
                break
            features = features or [each.new_empty(total, each.shape[1]) for each in found]
            end = start + found[0].shape[0]
            for whole, each in zip(features, found, strict=True):
                whole[start:end] = each
            start = end
        deepstack = {"deepstack_features": features[1:]} if hasattr(out, "deepstack_features") else {}
        return type(out)(pooler_output=features[0], **deepstack)


@dataclass(frozen=True)
class Segments:
    """Runs of rows that attend among themselves, sorted into groups of equal length."""

    groups: tuple[tuple[int, int], ...]  # number of runs and their length
    order: Tensor | None  # [T] int64: the rows group by group; None where they are already
    inverse: Tensor | None  # [T] int64: back to the order of the rows

    @classmethod
    def of(cls, bounds: Tensor) -> Segments:
        """Sort runs by their bounds [n + 1], ascending from 0 to T; this waits for the device."""
        lengths = bounds.diff().tolist()
        kinds = {length: kind for kind, length in enumerate(dict.fromkeys(lengths))}
        groups = tuple((lengths.count(length), length) for length in kinds)
        of_run = torch.tensor([kinds[length] for length in lengths])
        if bool((of_run.diff() >= 0).all()):
            return cls(groups, None, None)
        order = of_run.repeat_interleave(torch.tensor(lengths)).argsort(stable=True)
        return cls(groups, order.to(bounds.device), order.argsort().to(bounds.device))


class KnownSegments:
    """The segments of one batch: all layers share the tensors of bounds of its windows and frames.

    It travels with the batch through the keyword arguments that Hugging Face's tower hands to every block.
    """

    def __init__(self) -> None:
        self._last: list[tuple[Tensor, Segments]] = []

    def of(self, bounds: Tensor) -> Segments:
        """Return the segments of these very bounds, made once."""
        for tensor, segments in self._last:
            if tensor is bounds:
                return segments
        segments = Segments.of(bounds)
        self._last = [*self._last[-1:], (bounds, segments)]
        return segments


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """Attend within segments: query, key, value [T, H, d]; return [T, H * d]. One launch a length of segments."""
    if segments.order is not None:
        query, key, value = (rows[segments.order] for rows in (query, key, value))
    sizes = [count * length for count, length in segments.groups]
    split = (torch.split(rows, sizes) for rows in (query, key, value))
    parts = []
    for (count, length), *rows in zip(segments.groups, *split, strict=True):
        q, k, v = (each.unflatten(0, (count, length)).transpose(1, 2) for each in rows)
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        parts.append(out.transpose(1, 2).reshape(count * length, -1))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined if segments.inverse is None else joined[segments.inverse]


class Block:
    """A block's forward function.

    The residual stream is updated in place, so the rows given to a block are those that it returns.
    """

    def __init__(self, block: Any) -> None:
        self._block = block
        self._gate_up = joined(block.mlp.gate_proj, block.mlp.up_proj) if hasattr(block.mlp, "gate_proj") else None

    def __call__(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        known_segments: KnownSegments,
        **_: Any,
    ) -> Tensor:
        """Run rows [T, D]; the arguments are those of Hugging Face's block, and what FrameBatches adds to them."""
        block, segments = self._block, known_segments.of(cu_seqlens)
        qkv = block.attn.qkv(_normed(block.norm1, hidden_states))
        rotated = _rotated(qkv, block.attn.num_heads, position_embeddings, cu_seqlens[:1])
        attended = block.attn.proj(attend(*rotated, segments, block.attn.scaling))
        normed = _added_and_normed(block.norm2, attended, hidden_states)
        return hidden_states.add_(self._mlp(normed))

    def _mlp(self, rows: Tensor) -> Tensor:
        mlp = self._block.mlp
        out: Tensor = mlp(rows) if self._gate_up is None else mlp.down_proj(silu_mul(F.linear(rows, *self._gate_up)))
        return out


def _normed(norm: Any, rows: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        out: Tensor = norm(rows)
        return out
    return add_rms_norm(rows, None, norm.weight, norm.variance_epsilon)[0]


def _added_and_normed(norm: Any, rows: Tensor, stream: Tensor) -> Tensor:
    """Add rows to the residual stream, in place, and return the normed sum."""
    if isinstance(norm, nn.LayerNorm):
        out: Tensor = norm(stream.add_(rows))
        return out
    return add_rms_norm(rows, stream, norm.weight, norm.variance_epsilon)[0]


def _rotated(qkv: Tensor, num_heads: int, angles: tuple[Tensor, Tensor], zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated query and key, and value, [T, H, d] each; `zero` is [1] int32 on the device."""
    key, value = qkv.new_empty(2, qkv.shape[0], num_heads, qkv.shape[1] // (3 * num_heads))
    query = rope_and_store(qkv, *angles, key.transpose(0, 1), value.transpose(0, 1), zero, 0)
    return query, key, value


def _embed(conv: nn.Conv3d, hidden_states: Tensor) -> Tensor:
    """Embed patches [T, values] as a matrix product: the kernel covers a patch, and cuDNN is slow at such a shape."""
    weight = conv.weight.flatten(1)
    return F.linear(hidden_states.to(weight.dtype), weight, conv.bias)


def _align(mlp: Any) -> None:
    """Widen a gated MLP by hidden units of zeros where its rows are not aligned (Qwen2.5-VL 3B and 7B: 3420 units)."""
    if not hasattr(mlp, "gate_proj"):
        return
    width, size = mlp.gate_proj.weight.shape[0], mlp.gate_proj.weight.element_size()
    if width * size % _ALIGNED_BYTES == 0:
        return
    extra = -width % _MLP_MULTIPLE
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = _padded(linear.weight, (0, 0, 0, extra))
        linear.bias = _padded(linear.bias, (0, extra))
        linear.out_features += extra
    mlp.down_proj.weight = _padded(mlp.down_proj.weight, (0, extra))
    mlp.down_proj.in_features += extra


def _padded(weight: Tensor, padding: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(F.pad(weight.detach(), padding), requires_grad=False)
