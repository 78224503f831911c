"""The weight-streaming product: kernel = reference for ragged shapes, shared blocks and every epilogue; plans that fit.

Without CUDA the kernel runs in Triton's interpreter, which must be chosen before Triton is imported. Its products know
no bfloat16, so that the tests below take float32, where sums agree closely, and float16, where results round.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from specvlm.errors import ConfigError
from specvlm.kernels import linear as module
from specvlm.kernels.linear import (
    LinearPlan,
    gate_up_silu,
    gate_up_silu_reference,
    linear,
    linear_reference,
    plan_linear,
    stream_linear,
)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SINGLE = torch.float16 if torch.cuda.is_available() else torch.float32
CLOSE = {"rtol": 2e-3, "atol": 2e-3} if torch.cuda.is_available() else {"rtol": 1e-5, "atol": 1e-5}
PLAN = LinearPlan(block_t=16, block_n=64, block_k=64, stages=3, warps=4, programs=1)
# rows, outputs, inputs: whole tiles; ragged outputs; ragged both; less than a tile
SHAPES = [(1, 128, 256), (5, 200, 128), (26, 136, 328), (3, 40, 24)]


def draw(*shape, dtype=SINGLE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def case(rows, outputs, inputs, dtype=SINGLE):
    return draw(rows, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, seed=1) / inputs**0.5


def run(x, weight, *args, plan, **kwargs):
    """Launch with outputs and workspace poisoned, and check that the arrivals are zero afterwards."""
    space = module._workspace(DEVICE)
    space.partial.fill_(float("nan"))
    outputs = weight.shape[0] // (2 if kwargs.get("gated") else 1)
    out = x.new_full((x.shape[0], outputs), float("nan"))
    plan = replace(plan, block_t=max(16, 1 << (x.shape[0] - 1).bit_length()))
    assert stream_linear(x, weight, *args, plan=plan, out=out, **kwargs) is out
    assert not space.arrivals.any()
    return out


@pytest.mark.parametrize("tma", [True, False])
# 3 and 7 split most blocks, 1000 is more than there are tiles: a tile for each
@pytest.mark.parametrize("programs", [1, 3, 7, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_reference_however_the_tiles_are_shared(shape, programs, tma):
    x, weight = case(*shape)
    y = run(x, weight, plan=replace(PLAN, programs=programs, tma=tma))
    assert_close(y, linear_reference(x, weight), **CLOSE)
    assert torch.equal(y, run(x, weight, plan=replace(PLAN, programs=programs, tma=tma)))


@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gate_takes_matching_rows_of_both_halves(shape, programs):
    rows, outputs, inputs = shape
    x, weight = case(rows, 2 * outputs, inputs)
    y = run(x, weight, plan=replace(PLAN, programs=programs), gated=True)
    assert_close(y, gate_up_silu_reference(x, weight), **CLOSE)


@pytest.mark.parametrize("programs", [1, 5])
def test_bias_and_residual_are_added_once_and_rounded_where_torch_rounds(programs):
    x, weight = case(5, 200, 328, torch.float16)
    bias, residual = draw(200, dtype=torch.float16, seed=2), draw(5, 200, dtype=torch.float16, seed=3) * 64
    plan = replace(PLAN, programs=programs)
    product = run(x, weight, plan=plan)
    assert_close(product, linear_reference(x, weight), rtol=2e-3, atol=2e-3)
    assert torch.equal(run(x, weight, residual=residual, plan=plan), residual + product)
    assert_close(run(x, weight, bias, plan=plan), linear_reference(x, weight, bias), rtol=2e-3, atol=2e-3)


def test_the_gate_rounds_where_torch_rounds():
    x, weight = case(5, 400, 128, torch.float16)
    gate, up = (run(x, half, plan=PLAN) for half in weight.chunk(2))
    y = run(x, weight, plan=PLAN, gated=True)
    expected = F.silu(gate) * up
    assert_close(y, expected, rtol=2e-3, atol=1e-6)
    assert (
        y != expected
    ).float().mean() < 0.02  # exp may differ in its last bit; one rounding less, and a quarter does


@pytest.mark.parametrize("tma", [True, False])
def test_rows_and_weights_may_be_slices_and_nothing_beside_them_is_read(tma):
    around = torch.full((9, 400), float("nan"), device=DEVICE, dtype=SINGLE), torch.full_like(draw(150, 400), torch.nan)
    x, weight = (part[:rows, 64:168] for part, rows in zip(around, (4, 130), strict=True))
    x.copy_(draw(4, 104))
    weight.copy_(draw(130, 104, seed=1) / 10)
    for programs in (1, 3):
        y = run(x, weight, plan=replace(PLAN, programs=programs, tma=tma))
        assert_close(y, linear_reference(x, weight), **CLOSE)


def test_odd_widths_go_through_pointers():
    x, weight = case(2, 70, 67)
    assert not plan_linear(2, 70, 67, 132).tma
    assert_close(run(x, weight, plan=replace(PLAN, tma=False, programs=3)), linear_reference(x, weight), **CLOSE)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 26, 33, 64, 128])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(5120, 5120), (7168, 5120), (27648, 5120), (5120, 27648), (152064, 5120), (896, 896), (1152, 896), (896, 4864)],
)
def test_plans_fit_the_chip_and_keep_it_busy(outputs, inputs, rows, gated):
    plan = plan_linear(rows, outputs, inputs, 132, gated=gated)
    halves = 2 if gated else 1
    stage = 2 * (halves * plan.block_n + plan.block_t) * plan.block_k
    assert plan.stages * stage + 4 * halves * plan.block_n * plan.block_t <= 227 * 1024 - 1024
    assert plan.stages >= 3
    assert rows <= plan.block_t < max(17, 2 * rows)
    assert 2 * plan.programs * halves * plan.block_n * plan.block_t <= module._PARTIAL_FLOATS
    tiles = -(-outputs // plan.block_n) * -(-inputs // plan.block_k)
    assert plan.programs == min(132, tiles)


def test_elsewhere_it_is_torchs_own_product():
    x, weight = case(6, 40, 24)
    x, bias, residual = x.cpu().view(2, 3, 24).float(), torch.ones(40), torch.ones(2, 3, 40)
    weight = weight.cpu().float()
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x, weight, residual=residual), residual + F.linear(x, weight))
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    assert torch.equal(gate_up_silu(x, weight), F.silu(gate) * up)


def test_a_plan_that_outgrows_the_workspace_is_refused():
    x, weight = case(1, 128 * 300, 16)
    with pytest.raises(ConfigError, match="take fewer programs"):
        stream_linear(x, weight, plan=replace(PLAN, block_t=128, block_n=128, programs=300))


COMPILE = """
import importlib.util, re, sys
import triton
from triton.backends.compiler import GPUTarget
spec = importlib.util.spec_from_file_location("linear_triton", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
sys.modules["linear_triton"] = kernels
spec.loader.exec_module(kernels)
constants = dict(BLOCK_T=32, BLOCK_N=64, BLOCK_K=64, STAGES=4, GATED=sys.argv[2] == "gated", HAS_BIAS=False,
    HAS_RESIDUAL=False, TMA=True, EVEN=False, PDL=True, GPU=True, bias=None, residual=None)
types = dict(x="tensordesc<bf16[32, 64]>", weight="tensordesc<bf16[64, 64]>", weight_rows="*bf16", y="*bf16",
    partial="*fp32", arrivals="*i32")
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernels.stream_linear.arg_names}
source = triton.compiler.ASTSource(fn=kernels.stream_linear, signature=signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, launch_pdl=True))
ptx = compiled.asm["ptx"]
before_arrival = ptx[: ptx.index("atom.global.gpu.acq_rel")]
print(len(re.findall(r"cp\\.async\\.bulk\\.tensor", ptx)), len(re.findall(r"wgmma\\.mma_async", ptx)),
    "bar.sync" in before_arrival[before_arrival.rindex("st.global") :],
    ptx.index("bulk.prefetch") < ptx.index("griddepcontrol.wait") < ptx.index("cp.async.bulk.tensor"))
"""


@pytest.mark.parametrize(("kind", "loads", "products"), [("plain", 2, 4), ("gated", 3, 8)])
def test_on_hopper_the_loop_is_pipelined_and_the_arrival_ordered(kind, loads, products, tmp_path):
    """Four stages: three copies of the loads ahead of the loop and one within it; without a pipeline there is one."""
    pytest.importorskip("triton")
    source = Path(module.__file__).with_name("linear_triton.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(source), kind],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(4 * loads), str(products), "True", "True"]
