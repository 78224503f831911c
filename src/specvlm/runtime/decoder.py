"""The decoder layers of a language model as few fused kernels, over the Hugging Face model's own weights.

It serves every Llama-like decoder (RMSNorm, rotary embedding, optional bias of q/k/v, optional norm of q and k, gated
SiLU MLP), which all families here have. q/k/v and gate/up become one product each: their weights are joined once, and
the Hugging Face parameters become views of the joined ones, so both paths share the memory. The Hugging Face modules
stay the reference (`eager`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specvlm.core.plain import FLOATS, is_linear, is_plain, is_untouched, joined
from specvlm.kernels import has_pdl
from specvlm.kernels.activation import silu_mul
from specvlm.kernels.linear import linear
from specvlm.kernels.norm import add_rms_norm
from specvlm.kernels.quant import MAX_ROWS, Around, QuantWeight, quant_linear_around, quantize, squares_of
from specvlm.kernels.rope import rope_and_store
from specvlm.kernels.tree_attention import is_served

Weight = Tensor | QuantWeight
# layer, query [T, H, d], keys, values [H_kv, capacity, d] -> [T, H, d]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """The weights of one decoder layer."""

    input_norm: Tensor  # [D]
    qkv: Weight  # [(H + 2 H_kv) * d, D]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [d]
    k_norm: Tensor | None
    out: Weight  # [D, H * d]
    out_bias: Tensor | None
    mlp_norm: Tensor  # [D]
    gate_up: Weight  # [2 * I, D]; quantised: gate and up in turn
    down: Weight  # [D, I]


class Decoder:
    """The decoder layers and the final norm.

    Args:
        text: a Hugging Face language model for which `is_supported` holds. Its parameters are joined.
    """

    def __init__(self, text: Any) -> None:
        self._rotary = text.rotary_emb
        self._layers = [_layer(layer) for layer in text.layers]
        self._final_norm: Tensor = text.norm.weight
        self._is_quantised = False
        self._eps = float(text.norm.variance_epsilon)
        self.scaling = float(text.layers[0].self_attn.scaling)

    def quantised(self, format: str) -> Decoder:
        """Return a decoder with weight-only quantised products and the other weights shared.

        Args:
            format: one of `specvlm.core.names.QUANTS`.
        """
        other = copy.copy(self)
        other._layers = [_quantised(layer, format) for layer in self._layers]
        other._is_quantised = True
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all weights that a step reads."""
        weights = [getattr(layer, part.name) for layer in self._layers for part in fields(layer)]
        return sum(weight.nbytes for weight in (*weights, self._final_norm) if weight is not None)

    def rotary(self, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, d] of the positions ([3, 1, T] for M-RoPE, else [1, T]), in the dtype of `embeds`."""
        cos, sin = self._rotary(embeds, positions)
        return cos[0], sin[0]

    def __call__(
        self,
        embeds: Tensor,
        rotary: tuple[Tensor, Tensor],
        storage: Tensor,
        start: Tensor,
        offset: int,
        attend: Attend,
        deepstack: Sequence[Tensor] = (),
        visual_rows: Tensor | None = None,
    ) -> Tensor:
        """Run T rows through all layers and store their keys and values.

        Args:
            embeds: [T, D], overwritten.
            rotary: cos and sin [T, d].
            storage: [layers, 2, H_kv, capacity, d].
            start: [1] int32 on the device; the rows are stored from start + offset on.
            offset: see start.
            attend: attention of one layer.
            deepstack: features [n, D] added to the rows `visual_rows` after the first layers, one a layer.
            visual_rows: [n] int64.

        Returns:
            [T, D], normed.
        """
        eps, pdl = self._eps, has_pdl(embeds.device)

        def attention(index: int, projected: Tensor) -> Tensor:
            layer, (keys, values) = self._layers[index], storage[index].unbind(0)
            query = rope_and_store(
                projected,
                *rotary,
                keys,
                values,
                start,
                offset,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=eps,
                pdl=pdl,
            )
            return attend(index, query, keys, values).flatten(1)

        if self._is_quantised and embeds.shape[0] <= MAX_ROWS:
            return self._short(embeds, attention)
        normed, residual = add_rms_norm(embeds, None, self._layers[0].input_norm, eps, pdl=pdl)
        for index, layer in enumerate(self._layers):
            attended = attention(index, linear(normed, layer.qkv, layer.qkv_bias, pdl=pdl))
            attended = linear(attended, layer.out, layer.out_bias, pdl=pdl)
            normed, residual = add_rms_norm(attended, residual, layer.mlp_norm, eps, pdl=pdl)
            gate_up = linear(normed, layer.gate_up, pdl=pdl)
            gated = F.silu(gate_up[:, 0::2]) * gate_up[:, 1::2] if self._is_quantised else silu_mul(gate_up, pdl=pdl)
            added = linear(gated, layer.down, pdl=pdl)
            if index < len(deepstack) and visual_rows is not None:
                added.index_add_(0, visual_rows, deepstack[index].to(added.dtype))
            is_last = index + 1 == len(self._layers)
            norm = self._final_norm if is_last else self._layers[index + 1].input_norm
            normed, residual = add_rms_norm(added, residual, norm, eps, pdl=pdl)
        return normed

    def _short(self, stream: Tensor, attention: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Run few rows [T, D] through quantised layers: norms, sums and activations are parts of the products.

        Each product of four begins when the one before has ended, and reads its weights in a few microseconds: what
        runs between them counts.
        """
        eps, pdl, squares = self._eps, has_pdl(stream.device), squares_of(stream)
        for index, layer in enumerate(self._layers):
            qkv, out, gate_up, down = layer.qkv, layer.out, layer.gate_up, layer.down
            assert isinstance(qkv, QuantWeight)
            assert isinstance(out, QuantWeight)
            assert isinstance(gate_up, QuantWeight)
            assert isinstance(down, QuantWeight)
            projected, _ = quant_linear_around(stream, qkv, layer.qkv_bias, Around(squares, eps), pdl=pdl)
            attended = attention(index, projected)
            stream, squares = quant_linear_around(attended, out, layer.out_bias, Around(residual=stream), pdl=pdl)
            gated, _ = quant_linear_around(stream, gate_up, None, Around(squares, eps, is_gated=True), pdl=pdl)
            stream, squares = quant_linear_around(gated, down, None, Around(residual=stream), pdl=pdl)
        return add_rms_norm(stream, None, self._final_norm, eps, pdl=pdl)[0]


def is_supported(text: Any, head: Any, device: torch.device) -> bool:
    """Whether a Hugging Face language model and its head are what the fused code computes, on this device.

    Every module must be of transformers' own class and untouched, with plain weights: see `specvlm.core.plain`.
    """
    like = getattr(getattr(text, "norm", None), "weight", None)
    if like is None or like.dtype not in FLOATS or like.device != device:
        return False
    is_known = type(text).__module__.startswith("transformers.models.") and is_untouched(text)
    if not (is_known and is_linear(head, like, has_bias=False) and _is_norm(text.norm, text, like)):
        return False
    if not all(_is_llama_like(layer, text, like) for layer in text.layers):
        return False
    return device.type != "cuda" or is_served(text.layers[0].self_attn.head_dim)


def _is_llama_like(layer: Any, text: Any, like: Tensor) -> bool:
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if {name for name, _ in layer.named_children()} != known:
        return False
    attention, mlp, first = layer.self_attn, layer.mlp, text.layers[0].self_attn
    parts, norms = (layer, attention, mlp), [layer.input_layernorm, layer.post_attention_layernorm]
    if not all(type(part).__module__ == type(text).__module__ and is_untouched(part) for part in parts):
        return False
    heads, gates = dict(attention.named_children()), dict(mlp.named_children())
    norms += [heads.pop(name) for name in ("q_norm", "k_norm") if name in heads]
    if heads.keys() != {f"{name}_proj" for name in "qkvo"} or not gates.keys() >= {"gate_proj", "up_proj", "down_proj"}:
        return False
    act = gates.pop("act_fn", mlp.act_fn)
    bias = getattr(heads["q_proj"], "bias", None) is not None
    return (
        all(is_linear(heads[f"{name}_proj"], like, has_bias=bias) for name in "qkv")
        and is_linear(heads["o_proj"], like, has_bias=getattr(heads["o_proj"], "bias", None) is not None)
        and all(is_linear(module, like, has_bias=False) for module in gates.values())
        and all(_is_norm(norm, text, like) for norm in norms)
        and (isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation")
        and is_untouched(act)
        and (attention.scaling, attention.head_dim) == (first.scaling, first.head_dim)
    )


def _is_norm(norm: Any, text: Any, like: Tensor) -> bool:
    """Whether a norm is the language model's own root mean square norm."""
    return (
        type(norm) is type(text.norm)
        and type(norm).__module__ == type(text).__module__
        and getattr(norm, "variance_epsilon", None) == getattr(text.norm, "variance_epsilon", 0)
        and is_plain(norm, like)
    )


def _quantised(layer: _Layer, format: str) -> _Layer:
    """Return a layer with quantised products. A norm's weight becomes part of the product behind it."""

    def smaller(weight: Weight, norm: Tensor | None = None) -> QuantWeight:
        assert isinstance(weight, Tensor), "quantised twice"
        return quantize(weight, format, norm)

    gate_up = layer.gate_up
    assert isinstance(gate_up, Tensor)
    in_turn = torch.stack(gate_up.chunk(2), 1).flatten(0, 1)
    ones = torch.ones_like(layer.input_norm)
    return replace(
        layer,
        input_norm=ones,
        qkv=smaller(layer.qkv, layer.input_norm),
        out=smaller(layer.out),
        mlp_norm=ones,
        gate_up=smaller(in_turn, layer.mlp_norm),
        down=smaller(layer.down),
    )


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = joined(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, _ = joined(mlp.gate_proj, mlp.up_proj)
    q_norm, k_norm = (getattr(attention, f"{name}_norm", None) for name in "qk")
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        down=mlp.down_proj.weight,
    )
