"""The weight-streaming product: kernel = reference for ragged shapes, shared blocks and a bias; plans that fit.

Without CUDA the kernel runs in Triton's interpreter, which must be chosen before Triton is imported. Its products know
no bfloat16, so that the tests below take float32, where sums agree closely, and float16, where results round.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from specvlm.core.errors import ConfigError
from specvlm.kernels import linear as module
from specvlm.kernels import stream
from specvlm.kernels.linear import linear, linear_reference, plan_linear, stream_linear

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SINGLE = torch.float16 if torch.cuda.is_available() else torch.float32
CLOSE = {"rtol": 2e-3, "atol": 2e-3} if torch.cuda.is_available() else {"rtol": 1e-5, "atol": 1e-5}
PLAN = stream.LinearPlan(block_t=16, block_n=64, block_k=64, stages=3, warps=4, programs=1)
# rows, outputs, inputs: whole tiles; ragged outputs; ragged both; less than a tile
SHAPES = [(1, 128, 256), (5, 200, 128), (26, 136, 328), (3, 40, 24)]


def draw(*shape, dtype=SINGLE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def case(rows, outputs, inputs, dtype=SINGLE):
    return draw(rows, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, seed=1) / inputs**0.5


def run(x, weight, bias=None, *, plan):
    """Launch with outputs and workspace poisoned, and check that the arrivals are zero afterwards."""
    space = stream.workspace(DEVICE)
    space.partial.fill_(float("nan"))
    out = x.new_full((x.shape[0], weight.shape[0]), float("nan"))
    plan = replace(plan, block_t=max(16, 1 << (x.shape[0] - 1).bit_length()))
    assert stream_linear(x, weight, bias, plan=plan, out=out) is out
    assert not space.arrivals.any()
    return out


@pytest.mark.parametrize("tma", [True, False])
# 7 splits most blocks, 1000 is more than there are tiles: a tile for each
@pytest.mark.parametrize("programs", [1, 7, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_reference_however_the_tiles_are_shared(shape, programs, tma):
    x, weight = case(*shape)
    y = run(x, weight, plan=replace(PLAN, programs=programs, tma=tma))
    assert_close(y, linear_reference(x, weight), **CLOSE)
    assert torch.equal(y, run(x, weight, plan=replace(PLAN, programs=programs, tma=tma)))


@pytest.mark.parametrize("programs", [1, 5])
def test_the_bias_is_added_once_and_before_rounding(programs):
    x, weight = case(5, 200, 328, torch.float16)
    bias = draw(200, dtype=torch.float16, seed=2)
    plan = replace(PLAN, programs=programs)
    product = run(x, weight, plan=plan)
    assert_close(product, linear_reference(x, weight), rtol=2e-3, atol=2e-3)
    assert_close(run(x, weight, bias, plan=plan), linear_reference(x, weight, bias), rtol=2e-3, atol=2e-3)
    lost = run(x[:1], weight, -product[0], plan=plan)  # what rounding the product took away
    assert (lost != 0).float().mean() > 0.9
    assert (lost.abs() <= 2**-11 * product[0].abs() + 2**-24).all()  # half of a place behind fp16's eleven bits


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


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 26, 32, 33, 64, 65, 128])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(5120, 5120), (7168, 5120), (27648, 5120), (5120, 27648), (152064, 5120), (896, 896), (1152, 896), (896, 4864)],
)
def test_plans_fit_the_chip_and_keep_it_busy(outputs, inputs, rows):
    plan = plan_linear(rows, outputs, inputs, 132)
    stage = 2 * (plan.block_n + plan.block_t) * plan.block_k
    assert plan.stages * stage + 4 * plan.block_n * plan.block_t <= 227 * 1024 - 1024
    assert plan.stages >= 3
    assert rows <= plan.block_t < max(17, 2 * rows)
    assert 2 * plan.programs * plan.block_n * plan.block_t <= stream._PARTIAL_FLOATS
    tiles = -(-outputs // plan.block_n) * -(-inputs // plan.block_k)
    assert plan.programs == min(132, tiles)


def test_elsewhere_it_is_torchs_own_product():
    x, weight = case(6, 40, 24)
    x, bias, weight = x.cpu().view(2, 3, 24).float(), torch.ones(40), weight.cpu().float()
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_plan_that_outgrows_the_workspace_is_refused():
    x, weight = case(1, 128 * 300, 16)
    with pytest.raises(ConfigError, match="take fewer programs"):
        stream_linear(x, weight, plan=replace(PLAN, block_t=128, block_n=128, programs=300))


COMPILE = """
import importlib.util, json, re, sys
import triton
from triton.backends.compiler import GPUTarget
spec = importlib.util.spec_from_file_location("linear_triton", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
sys.modules["linear_triton"] = kernels
spec.loader.exec_module(kernels)
T, N, K, stages = map(int, sys.argv[2:])
constants = dict(BLOCK_T=T, BLOCK_N=N, BLOCK_K=K, STAGES=stages, HAS_BIAS=False, TMA=True, EVEN=False, PDL=True,
    GPU=True, bias=None)
types = dict(x=f"tensordesc<bf16[{T}, {K}]>", weight=f"tensordesc<bf16[{N}, {K}]>", weight_rows="*bf16", y="*bf16",
    partial="*fp32", arrivals="*i32")
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernels.stream_linear.arg_names}
source = triton.compiler.ASTSource(fn=kernels.stream_linear, signature=signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, launch_pdl=True))
ptx = compiled.asm["ptx"]
before_arrival = ptx[: ptx.index("atom.global.gpu.acq_rel")]
print(json.dumps({
    "loads": compiled.asm["ttgir"].count("async_tma_copy_global_to_local"),
    "products": len(re.findall(r"wgmma\\.mma_async", ptx)),
    "shared": compiled.metadata.shared,
    "ordered": "bar.sync" in before_arrival[before_arrival.rindex("st.global") :],
    "early": ptx.index("bulk.prefetch") < ptx.index("griddepcontrol.wait") < ptx.index("cp.async.bulk.tensor"),
}))
"""


def test_on_hopper_the_loop_is_pipelined_and_the_arrival_ordered(tmp_path):
    """A pipeline loads its two tiles once in the loop and, ahead of it, once for each further stage."""
    pytest.importorskip("triton")
    plan = plan_linear(26, 5120, 5120, 132)
    source = Path(module.__file__).with_name("linear_triton.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    sizes = [str(size) for size in (plan.block_t, plan.block_n, plan.block_k, plan.stages)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(source), *sizes],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    compiled = json.loads(done.stdout)
    assert compiled.pop("shared") <= 227 * 1024
    assert compiled.pop("products") == plan.block_k // 16 * max(1, plan.block_n // 64)
    assert compiled == {"loads": 2 * plan.stages, "ordered": True, "early": True}
