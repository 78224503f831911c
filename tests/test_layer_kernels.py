"""Kernel = reference = transformers' own modules: norm, rotary embedding with its store, gated activation.

Without CUDA the kernels run in Triton's interpreter.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Qwen2Config, Qwen3VLTextConfig
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm, Qwen3VLTextRotaryEmbedding

from specvlm.kernels import activation, norm, rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (1, 7, 33)
EXACT = {"rtol": 1e-6, "atol": 1e-6}
# The interpreter cuts float32 off to bfloat16 instead of rounding it.
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
HALVES = (torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU))
NORMS = (norm.add_rms_norm_reference, norm.add_rms_norm_triton)
ROPES = (rope.rope_and_store_reference, rope.rope_and_store_triton)
ACTIVATIONS = (activation.silu_mul_reference, activation.silu_mul_triton)


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def filled(module, seed=9):
    """The module with weights that differ in every place, so that a misplaced one shows."""
    for parameter in module.to(DEVICE).parameters():
        parameter.data = draw(*parameter.shape, seed=seed)
    return module


def rounding_error(result, truth):
    return (result.double() - truth).abs().mean()


# ---- norm


@pytest.mark.parametrize("run", NORMS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [64, 896, 1283])
def test_norm_is_qwen2s(run, rows, width):
    module = filled(Qwen2RMSNorm(width, eps=1e-3))
    x, residual = draw(rows, width), draw(rows, width, seed=1)
    total = x + residual
    normed, stream = run(x, residual, module.weight.data, 1e-3)
    assert stream is residual
    assert torch.equal(stream, total)
    assert_close(normed, module(total).detach(), **EXACT)


@pytest.mark.parametrize("run", NORMS)
def test_norm_without_a_residual_starts_the_stream(run):
    module = filled(Qwen3VLTextRMSNorm(96, eps=1e-6))
    x = draw(7, 96) * 1e-3  # so small that eps counts
    before = x.clone()
    normed, stream = run(x, None, module.weight.data, 1e-6)
    assert stream is x
    assert torch.equal(x, before)
    assert_close(normed, module(x).detach(), **EXACT)


@pytest.mark.parametrize("run", NORMS)
def test_norm_reads_and_updates_rows_of_a_wider_tensor(run):
    x, wide = draw(7, 200)[:, 40:140], draw(7, 300, seed=1)
    before = wide.clone()
    total = x + wide[:, 20:120]
    weight = draw(100, seed=2)
    normed, _ = run(x, wide[:, 20:120], weight, 1e-6)
    assert_close(normed, norm.add_rms_norm_reference(total, None, weight, 1e-6)[0], **EXACT)
    before[:, 20:120] = total
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", HALVES)
def test_norm_rounds_as_qwen2_does(dtype):
    x, residual = draw(7, 896, dtype=dtype), draw(7, 896, dtype=dtype, seed=1)
    weight = draw(896, dtype=dtype, seed=2)
    module = Qwen2RMSNorm(896).to(DEVICE)
    module.weight.data = weight
    expected = module(x + residual).detach()
    assert torch.equal(norm.add_rms_norm_reference(x, residual.clone(), weight, 1e-6)[0], expected)
    stream = x + residual
    normed, residual = norm.add_rms_norm_triton(x, residual, weight, 1e-6)
    assert torch.equal(residual, stream)
    assert_close(normed, expected, rtol=torch.finfo(dtype).eps, atol=0)  # the mean's order may move a tie
    assert (normed != expected).float().mean() < 0.01


# ---- rotary embedding and store


class Storage:
    """KV storage of one layer cut out of larger tensors, keys and values with strides of their own."""

    def __init__(self, kv_heads, head_dim, dtype=torch.float32, capacity=50):
        whole_keys = draw(2, kv_heads, capacity, head_dim + 16, dtype=dtype, seed=5)
        whole_values = draw(2, capacity, kv_heads, head_dim + 32, dtype=dtype, seed=6)
        self.whole = (whole_keys, whole_values)
        self.before = tuple(x.clone() for x in self.whole)
        self.keys, self.values = self.views(self.whole, head_dim)

    @staticmethod
    def views(whole, head_dim):
        return whole[0][1, ..., :head_dim], whole[1][1, ..., :head_dim].transpose(0, 1)

    def expect(self, keys, values, first, **tolerance):
        """Rows from `first` on hold keys and values [T, H_kv, d], and every other number is what it was."""
        before_keys, before_values = self.views(self.before, keys.shape[2])
        before_keys[:, first : first + keys.shape[0]] = keys.transpose(0, 1)
        before_values[:, first : first + keys.shape[0]] = values.transpose(0, 1)
        assert_close(self.whole, self.before, **tolerance)


def run_rope(run, qkv, cos, sin, storage, **norms):
    start = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    return run(qkv, cos, sin, storage.keys, storage.values, start, 6, **norms)


def split_heads(qkv, heads, kv_heads):
    return qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads), dim=1)


def hf_rotate(query, key, cos, sin):
    """[T, h, d] through transformers' [1, h, T, d]."""
    turned = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None])
    return tuple(x[0].transpose(0, 1) for x in turned)


def angles(head_dim, rows, dtype=torch.float32):
    config = Qwen2Config(hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=4096)
    cos, sin = Qwen2RotaryEmbedding(config).to(DEVICE)(
        torch.empty(0, dtype=dtype, device=DEVICE), torch.arange(1000, 1000 + rows, device=DEVICE)[None]
    )
    return cos[0], sin[0]


@pytest.mark.parametrize("run", ROPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(7, 1, 64), (6, 2, 80), (5, 5, 96), (14, 2, 128)])
def test_rope_is_qwen2s_and_stores_where_told(run, rows, heads, kv_heads, head_dim):
    cos, sin = angles(head_dim, rows)
    qkv = draw(rows, (heads + 2 * kv_heads) * head_dim)
    storage = Storage(kv_heads, head_dim)
    query = run_rope(run, qkv, cos, sin, storage)
    q, k, v = split_heads(qkv, heads, kv_heads)
    expected_query, expected_key = hf_rotate(q, k, cos, sin)
    assert query.is_contiguous()
    assert_close(query, expected_query, **EXACT)
    storage.expect(expected_key, v, 11, **EXACT)


@pytest.mark.parametrize("run", ROPES)
@pytest.mark.parametrize("head_dim", [80, 128])
def test_rope_norms_heads_first_as_qwen3_does(run, head_dim):
    heads, kv_heads, rows = 6, 2, 7
    cos, sin = angles(head_dim, rows)
    qkv = draw(rows, (heads + 2 * kv_heads) * head_dim)
    q_norm, k_norm = (filled(Qwen3VLTextRMSNorm(head_dim, eps=1e-3), seed) for seed in (7, 8))
    storage = Storage(kv_heads, head_dim)
    norms = {"q_norm": q_norm.weight.data, "k_norm": k_norm.weight.data, "eps": 1e-3}
    query = run_rope(run, qkv, cos, sin, storage, **norms)
    q, k, v = split_heads(qkv, heads, kv_heads)
    expected_query, expected_key = hf_rotate(q_norm(q).detach(), k_norm(k).detach(), cos, sin)
    assert_close(query, expected_query, rtol=1e-6, atol=2e-6)  # numbers up to 10
    storage.expect(expected_key, v, 11, rtol=1e-6, atol=2e-6)


def mrope_angles(kind, head_dim, rows):
    sections = [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6]
    scaling = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    if kind == "qwen2.5-vl":
        config = Qwen2_5_VLTextConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=scaling)
        module = Qwen2_5_VLRotaryEmbedding(config)
    else:
        module = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=head_dim, rope_parameters=scaling))
    positions = torch.randint(0, 500, (3, 1, rows), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return [x[0] for x in module.to(DEVICE)(torch.empty(0, device=DEVICE), positions)]


@pytest.mark.parametrize("run", ROPES)
@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl"])
def test_rope_takes_the_video_models_angles(run, kind):
    heads, kv_heads, head_dim, rows = 4, 2, 96, 7
    cos, sin = mrope_angles(kind, head_dim, rows)
    qkv = draw(rows, (heads + 2 * kv_heads) * head_dim)
    storage = Storage(kv_heads, head_dim)
    query = run_rope(run, qkv, cos, sin, storage)
    q, k, v = split_heads(qkv, heads, kv_heads)
    expected_query, expected_key = hf_rotate(q, k, cos, sin)
    assert_close(query, expected_query, **EXACT)
    storage.expect(expected_key, v, 11, **EXACT)


@pytest.mark.parametrize("run", ROPES)
def test_rope_reads_rows_of_wider_tensors(run):
    cos, sin = angles(64, 7)
    wide = [torch.cat((draw(x.shape[0], 16, seed=4), x), dim=1) for x in (draw(7, 5 * 64), cos, sin)]
    plain, strided = Storage(1, 64), Storage(1, 64)
    expected = run_rope(run, *(x[:, 16:].contiguous() for x in wide), plain)
    assert torch.equal(run_rope(run, *(x[:, 16:] for x in wide), strided), expected)
    assert_close(strided.whole, plain.whole, rtol=0, atol=0)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_rope_rounds_no_worse_than_transformers(dtype, normed):
    heads, kv_heads, head_dim, rows = 6, 2, 96, 7
    qkv = draw(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos, sin = angles(head_dim, rows, dtype)
    weights = {"q_norm": draw(head_dim, dtype=dtype, seed=1), "k_norm": draw(head_dim, dtype=dtype, seed=2)}
    q, k, _ = split_heads(qkv, heads, kv_heads)
    exact = [x.double() for x in (q, k)]
    if normed:
        q, k = (norm.add_rms_norm_reference(x, None, w, 1e-6)[0] for x, w in zip((q, k), weights.values(), strict=True))
        exact = [
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()
            for x, w in zip(exact, weights.values(), strict=True)
        ]
    hf_query, hf_key = hf_rotate(q, k, cos, sin)
    true_query, true_key = hf_rotate(*exact, cos.double(), sin.double())
    for angle_dtype in (dtype, torch.float32):
        storage = Storage(kv_heads, head_dim, dtype)
        angle = [x.to(angle_dtype) for x in (cos, sin)]
        query = run_rope(rope.rope_and_store_triton, qkv, *angle, storage, **(weights if normed else {}))
        key = storage.keys[:, 11 : 11 + rows].transpose(0, 1)
        assert rounding_error(query, true_query) <= rounding_error(hf_query, true_query) * 1.0001
        assert rounding_error(key, true_key) <= rounding_error(hf_key, true_key) * 1.0001
        if angle_dtype == dtype and not normed:
            assert torch.equal(query, hf_query)
            assert torch.equal(key, hf_key)


# ---- gated activation


@pytest.mark.parametrize("run", ACTIVATIONS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [96, 1000])
def test_activation_is_qwen2s(run, rows, width):
    mlp = Qwen2MLP(Qwen2Config(hidden_size=24, intermediate_size=width)).to(DEVICE)
    mlp.down_proj = nn.Identity()
    x = draw(rows, 24) * 10
    with torch.no_grad():
        gate_up = torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), dim=-1)
        assert_close(run(gate_up), mlp(x), **EXACT)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@pytest.mark.parametrize("run", ACTIVATIONS)
def test_activation_of_large_numbers_and_of_wider_rows(run):
    wide = draw(7, 300) * 100
    gate, up = wide[:, 40:140], wide[:, 140:240]
    assert_close(run(wide[:, 40:240]), gate * torch.sigmoid(gate) * up, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_activation_rounds_as_transformers_does(dtype):
    gate_up = draw(7, 2000, dtype=dtype) * 3
    gate, up = gate_up.chunk(2, dim=-1)
    expected = nn.functional.silu(gate) * up
    assert torch.equal(activation.silu_mul_reference(gate_up), expected)
    out = activation.silu_mul_triton(gate_up)
    assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (out != expected).float().mean() < 0.01


# ---- the choice


def test_public_functions_choose_the_reference_without_cuda(monkeypatch):
    for module, name in ((norm, "add_rms_norm"), (rope, "rope_and_store"), (activation, "silu_mul")):
        for kind in ("triton", "reference"):
            monkeypatch.setattr(module, f"{name}_{kind}", lambda *_, kind=kind, **__: kind)
    x = torch.zeros(1, 2)
    chosen = [
        norm.add_rms_norm(x, None, x[0], 1e-6, pdl=True),
        rope.rope_and_store(x, x, x, x[None], x[None], x, 0, pdl=True),
        activation.silu_mul(x, pdl=True),
    ]
    assert chosen == ["reference"] * 3
