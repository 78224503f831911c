"""Quantised linear layers: how much quantisation loses, what is exact, and kernel = reference.

Without CUDA the kernel runs in Triton's interpreter, which must be chosen before Triton is imported and knows no
inline assembly: the sequences that turn codes into numbers are evaluated here, instruction by instruction.
"""

import importlib
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
from specvlm.core.names import QUANTS
from specvlm.kernels import quant as module
from specvlm.kernels import stream
from specvlm.kernels.linear import linear
from specvlm.kernels.quant import (
    Around,
    QuantPlan,
    dequantize,
    is_served,
    plan_quant,
    quant_linear,
    quant_linear_around,
    quant_linear_around_reference,
    quant_linear_reference,
    quantize,
    squares_of,
    stream_quant,
)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SINGLE = torch.float16 if torch.cuda.is_available() else torch.float32
CLOSE = {"rtol": 2e-3, "atol": 2e-3} if torch.cuda.is_available() else {"rtol": 1e-5, "atol": 1e-5}
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")]
HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE)[0] == 9
PLAN = QuantPlan(block_t=8, block_n=64, block_k=64, stages=3, warps=4, programs=1, tma=HOPPER or DEVICE.type == "cpu")
# outputs, inputs: whole tiles; ragged outputs and inputs over groups; less than a group; odd
SHAPES = [(128, 512), (200, 328), (40, 24), (130, 67)]


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def packed(weight, format):
    """Quantise into the kernel's layout, on the CPU too."""
    return module._quantize(weight, format, panels=True)


def run(x, weight, bias=None, *, plan):
    """Launch with outputs and workspace poisoned, and check that the arrivals are zero afterwards."""
    space = stream.workspace(DEVICE)
    space.partial.fill_(float("nan"))
    out = x.new_full((x.shape[0], weight.shape[0]), float("nan"))
    plan = replace(plan, block_t=max(16 if plan.x_left else 8, 1 << (x.shape[0] - 1).bit_length()))
    assert stream_quant(x, weight, bias, plan=plan, out=out) is out
    assert not space.arrivals.any()
    return out


# --- what quantisation loses ---


# int8: half a step of the largest over 127 at most; the largest of 1024 is below 4.5 in each of 256 rows but for one
# case in 600, so that the loss is below 4.5 / 127 / sqrt(12) = .0102.
# fp8: a step is 1/8 of a binade's lower end, 1/8 / sqrt(12) = .036 of it, and weights are larger: below .03.
# int4: the best 16 equal steps for a normal distribution lose .1074 (Max 1960); steps chosen for each group lose less.
@pytest.mark.parametrize(("format", "low", "high"), [("int8", 0.006, 0.0102), ("fp8", 0.02, 0.03), ("int4", 0.09, 0.1)])
def test_the_loss_on_normal_weights_is_that_of_the_steps(format, low, high):
    weight = draw(256, 1024) * 0.02
    loss = (dequantize(quantize(weight, format), torch.float32) - weight).norm() / weight.norm()
    assert low < loss < high


def test_fp8_errs_by_half_a_step_of_each_weight_and_int8_of_the_largest():
    weight = draw(64, 328)
    largest = weight.abs().amax(1, keepdim=True)
    error = {format: (dequantize(quantize(weight, format), torch.float32) - weight).abs() for format in QUANTS}
    smallest = largest / 448 * 2**-10  # half of the step of numbers below e4m3's least normal one
    assert (error["fp8"] <= torch.maximum(weight.abs() * 2**-4, smallest) * 1.001).all()
    assert (error["int8"] <= largest / 127 / 2 * 1.001).all()


@pytest.mark.parametrize("format", QUANTS)
def test_representable_weights_come_back_exactly(format):
    if format == "fp8":
        codes = torch.arange(256, dtype=torch.uint8)
        row = codes[codes & 127 != 127].view(torch.float8_e4m3fn).float()
    elif format == "int8":
        row = torch.arange(-127, 128).float() / 32
    else:
        row = (torch.arange(150) % 16 - 8) / 32
    weight = torch.stack([row, row.flip(0), row * 4]).to(DEVICE)
    assert torch.equal(dequantize(quantize(weight, format), torch.float32), weight)
    assert torch.equal(dequantize(packed(weight, format), torch.float32), weight)


@pytest.mark.parametrize("format", QUANTS)
def test_zero_weights_stay_zero_and_one_large_row_harms_no_other(format):
    weight = draw(6, 300)
    weight[2], weight[3] = 0, weight[3] * 1e4
    found = dequantize(quantize(weight, format), torch.float32)
    assert not found[2].any()
    rest = [0, 1, 4, 5]
    assert torch.equal(found[rest], dequantize(quantize(weight[rest], format), torch.float32))


def test_int4_scales_are_chosen_for_each_group_and_beat_the_largest_weight():
    weight = draw(64, 256)
    weight[:, 128:] *= 100
    error = (dequantize(quantize(weight, "int4"), torch.float32) - weight).view(-1, 128).square().sum(1)
    groups = weight.view(-1, 128)
    step = groups.abs().amax(1, keepdim=True) / 7
    plain = ((groups / step).round() * step - groups).square().sum(1)
    assert (error < plain).float().mean() > 0.95
    assert error.sum() < 0.75 * plain.sum()


def test_quantising_in_chunks_changes_nothing(monkeypatch):
    weight = draw(37, 300)
    whole = {format: quantize(weight, format) for format in QUANTS}
    monkeypatch.setattr(module, "_CHUNK", 5 * 512)
    for format in QUANTS:
        parts = quantize(weight, format)
        assert torch.equal(parts.data, whole[format].data)
        assert torch.equal(parts.scales, whole[format].scales)


@pytest.mark.parametrize(("format", "bits"), [("fp8", 8 + 32 / 4096), ("int8", 8 + 32 / 4096), ("int4", 4 + 16 / 128)])
def test_bytes_are_those_of_codes_and_scales(format, bits):
    assert quantize(torch.zeros(16, 4096, device=DEVICE), format).nbytes * 8 == 16 * 4096 * bits


def test_unknown_formats_are_refused():
    for call in (lambda: quantize(draw(2, 2), "int2"), lambda: is_served("int2", DEVICE)):
        with pytest.raises(ConfigError, match="'int2' is not one of fp8, int8, int4"):
            call()


# --- the product ---


@pytest.mark.parametrize("format", QUANTS)
@pytest.mark.parametrize("shape", SHAPES)
# rows, programs (1000: a tile for each), x as the left factor
@pytest.mark.parametrize(
    ("rows", "programs", "x_left"),
    [
        (13, 1000, True),
        (32, 3, False),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, 7, False), (8, 1, True))),
    ],
)
def test_the_kernel_equals_the_reference(format, shape, rows, programs, x_left):
    outputs, inputs = shape
    weight = packed(draw(outputs, inputs, seed=1) / inputs**0.5, format)
    x, bias = draw(rows, inputs, dtype=SINGLE), draw(outputs, dtype=SINGLE, seed=2)
    for plan in (
        replace(PLAN, programs=programs, x_left=x_left, x_tma=PLAN.tma and inputs % 8 == 0),
        replace(PLAN, programs=programs, x_left=x_left, tma=False),
    ):
        y = run(x, weight, plan=plan)
        expected = x.float() @ dequantize(weight, torch.float32).T
        assert_close(y.float(), expected, **CLOSE)
        assert torch.equal(y, run(x, weight, plan=plan))
        assert_close(run(x, weight, bias, plan=plan).float(), expected + bias.float(), **CLOSE)


@pytest.mark.parametrize("format", QUANTS)
def test_every_code_counts_with_its_own_input(format):
    """One input at a time: the product is a column of the weight."""
    inputs = 300
    weight = packed(draw(64, inputs, seed=1), format)
    dense = dequantize(weight, torch.float32)
    for first in range(0, inputs, 32):
        x = torch.zeros(min(32, inputs - first), inputs, device=DEVICE, dtype=SINGLE)
        x[torch.arange(len(x)), first + torch.arange(len(x))] = 1
        atol = 6e-8 if torch.cuda.is_available() else 0.0  # halves there: the step between the smallest
        assert_close(run(x, weight, plan=PLAN).float(), dense[:, first : first + 32].T, rtol=1e-3, atol=atol)


def test_rows_may_be_slices_and_nothing_beside_them_is_read():
    around = torch.full((9, 400), float("nan"), device=DEVICE, dtype=SINGLE)
    x = around[:4, 64:168]
    x.copy_(draw(4, 104))
    weight = packed(draw(130, 104, seed=1) / 10, "int4")
    for plan in (replace(PLAN, x_tma=PLAN.tma), replace(PLAN, programs=3)):
        assert_close(
            run(x, weight, plan=plan).float(), x.float() @ dequantize(weight, torch.float32).T, rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("format", QUANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_dequantising_kernel_equals_the_reference(format, shape):
    weight = packed(draw(*shape), format)
    host = replace(weight, data=weight.data.cpu(), scales=weight.scales.cpu())
    expected = dequantize(host, SINGLE)
    assert torch.equal(module._dequantize_triton(weight, SINGLE, 0, shape[0]).cpu(), expected)
    assert torch.equal(module._dequantize_triton(weight, SINGLE, 3, shape[0] - 9).cpu(), expected[3:-9])


@pytest.mark.parametrize("rows", [1, 7, 32, 33, 200])
@pytest.mark.parametrize("format", QUANTS)
def test_linear_takes_a_quantised_weight(format, rows, monkeypatch):
    monkeypatch.setattr(module, "_DENSE_CHUNK", 30 * 48)  # the dequantised product goes in three parts
    weight = quantize(draw(70, 48, seed=1) / 7, format)
    x, bias = draw(rows, 48, dtype=SINGLE), draw(70, dtype=SINGLE, seed=2)
    y = linear(x.view(1, rows, 48), weight, bias)
    expected = F.linear(x.float(), dequantize(weight, torch.float32), bias.float())
    assert y.dtype == SINGLE
    assert y.shape == (1, rows, 70)
    # torch's product of int8 weights on the CPU rounds x and the result to bfloat16, 2^-9 each, of sums of 48 terms
    by_torch = format == "int8" and DEVICE.type == "cpu" and rows <= 32
    assert_close(y[0].float(), expected, **({"rtol": 2**-8, "atol": 0.02} if by_torch else CLOSE))
    assert torch.equal(linear(x, weight), quant_linear(x, weight))
    assert_close(quant_linear_reference(x, weight, bias).float(), expected, **CLOSE)


def test_the_cpu_serves_int8_only():
    cpu = torch.device("cpu")
    assert [is_served(format, cpu) for format in QUANTS] == [False, True, False]
    assert quantize(torch.randn(3, 5), "int8").data.shape == (3, 5)


def test_a_plan_that_outgrows_the_workspace_is_refused():
    weight = packed(torch.zeros(64 * 300, 16, device=DEVICE), "int8")
    with pytest.raises(ConfigError, match="take fewer programs"):
        stream_quant(draw(1, 16), weight, plan=replace(PLAN, block_t=1024, programs=300))


# --- the code for the GPU ---


def look_up(a, b, c, table):
    found = torch.zeros_like(a)
    for case in range(8):
        if table >> case & 1:
            found |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return found


def evaluate(asm, words, shift):
    """Run an assembly sequence on words, int64, and return the two numbers of each; a product must need no rounding."""
    values = {"$1": words, "$2": torch.full_like(words, shift)}

    def value(name):
        return values[name] if name in values else torch.full_like(words, int(name, 0))

    def numbers(name, kind):
        halves = value(name).to(torch.int32).view(torch.int16)
        return halves.view(torch.bfloat16 if kind == "bf16x2" else torch.float16).double()

    for line in asm.strip().strip("{}").split(";"):
        operation, _, rest = line.strip().partition(" ")
        names = [name.strip() for name in rest.split(",")]
        if operation in ("", ".reg"):
            continue
        arguments = [value(name) for name in names[1:]]
        match operation.split("."):
            case ["mov", _]:
                values[names[0]] = arguments[0]
            case ["shr", "u32"]:
                values[names[0]] = arguments[0] >> arguments[1]
            case ["shl", "b32"]:
                values[names[0]] = arguments[0] << arguments[1] & 0xFFFFFFFF
            case ["and", "b32"]:
                values[names[0]] = arguments[0] & arguments[1]
            case ["lop3", "b32"]:
                values[names[0]] = look_up(*arguments[:3], int(names[-1], 0)) & 0xFFFFFFFF
            case ["fma", "rn", kind]:
                a, b, c = (numbers(name, kind) for name in names[1:])
                exact = a * b + c
                assert torch.equal(exact.to(torch.bfloat16 if kind == "bf16x2" else torch.float16).double(), exact)
                assert names[0] == "$0"
                return exact
            case _:
                raise AssertionError(operation)


@pytest.mark.parametrize("dtype", ["BF16", "FP16"])
@pytest.mark.parametrize(("format", "bits"), [("FP8", 8), ("INT8", 8), ("INT4", 4)])
def test_the_assembly_makes_the_number_of_every_code(format, bits, dtype):
    pytest.importorskip("triton")
    kernels = importlib.import_module("specvlm.kernels.quant_triton")
    words = torch.arange(1 << 16) * 0x10001 ^ 0x5A5A0000  # every word in the lower half, another one in the upper
    halves = torch.stack([words & 0xFFFF, words >> 16], 1).flatten()
    for part in range(16 // bits):
        codes = halves >> bits * part & (1 << bits) - 1
        shift = 8 - 8 * part if format == "FP8" else bits * part
        found = evaluate(getattr(kernels, f"{format}_{dtype}").value, words, shift)
        if format == "FP8":
            known = codes & 127 != 127  # the two that are not numbers are never stored
            expected = codes.to(torch.uint8).view(torch.float8_e4m3fn).double()
        else:
            known = codes >= 0
            expected = (codes - (1 << bits - 1)).double()
        assert torch.equal(found[known], expected[known])


@pytest.mark.parametrize("format", QUANTS)
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 26, 32, 33, 64])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(3584, 3584), (37888, 3584), (5120, 27648), (152064, 5120), (896, 896)]
)
def test_plans_fit_the_chip_and_keep_it_busy(format, rows, outputs, inputs):
    plan = plan_quant(format, rows, outputs, inputs, 132)
    parts = 4 if format == "int4" else 2
    tiles = -(-outputs // plan.block_n) * -(-inputs // (64 * parts))
    assert rows <= plan.block_t <= max(8, 2 * rows)
    assert plan.block_t >= 16 or not plan.x_left
    assert plan.stages >= 3
    blocks = -(-outputs // plan.block_n)
    assert plan.programs % blocks == 0 or blocks % plan.programs == 0 or plan.programs in (132, 264, 396)
    assert min(tiles, 132) <= plan.programs <= 6 * 132
    share = -(-plan.programs // 132)
    held = (plan.stages - 1) * 128 * (plan.block_n + parts * plan.block_t) + 4 * plan.block_n * plan.block_t
    assert held <= 227 * 1024 // share


# --- what surrounds a product ---


@pytest.mark.parametrize("format", QUANTS)
@pytest.mark.parametrize(("rows", "left"), [(1, False), (5, False), (8, False), (13, True)])
@pytest.mark.parametrize("programs", [7, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 3))])
def test_norm_sum_and_gate_are_parts_of_the_product(format, rows, left, programs):
    weight = packed(draw(200, 328, seed=1), format)
    x, bias, residual = draw(rows, 328, dtype=SINGLE), draw(200, dtype=SINGLE), draw(rows, 200, dtype=SINGLE, seed=3)
    plan = replace(PLAN, programs=programs, x_left=left, block_t=16 if left else 8)
    squares = torch.cat([squares_of(x[:, :100]), squares_of(x[:, 100:])])  # in two parts
    for around in (
        Around(squares, 1e-3),
        Around(squares, 1e-3, is_gated=True),
        Around(residual=residual),
        Around(squares, 1e-3, residual=residual),
    ):
        mine, theirs = (replace(around, residual=None if around.residual is None else residual.clone()) for _ in "ab")
        found = torch.full((4, rows), float("nan"), device=DEVICE)
        stream.workspace(DEVICE).partial.fill_(float("nan"))
        y = stream_quant(x, weight, bias, plan=plan, around=mine, squares=found)
        expected, expected_squares = quant_linear_around_reference(x, weight, bias, theirs)
        # of products of 18 at typical size, and their products where gated, rounded to fp16 on a GPU
        assert_close(y, expected, rtol=5e-3, atol=5e-2 if DEVICE.type == "cuda" else 1e-4)
        if around.residual is not None:
            assert y is mine.residual
            assert_close(found.sum(0, keepdim=True), expected_squares, rtol=1e-2, atol=1e-2)


def test_a_norms_weight_becomes_part_of_the_products():
    norm, dense, x = draw(64, seed=2), draw(32, 64), draw(3, 64, seed=1)
    weight = quantize(dense, "int8", norm)
    around = Around(squares_of(x), 1e-6)
    y, _ = quant_linear_around(x, weight, None, around)
    expected = F.linear(F.rms_norm(x, (64,), norm, 1e-6), dense)
    assert (y - expected).norm() < 0.02 * expected.norm()


COMPILE = """
import json, re, sys, types
package = types.ModuleType("specvlm")
package.__path__ = [sys.argv[1]]
sys.modules["specvlm"] = package
import triton
from specvlm.kernels import quant_triton as kernels
from triton.backends.compiler import GPUTarget
format, capability, left, tma = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True", sys.argv[5] == "True"
T, N, stages = map(int, sys.argv[6:9])
constants = dict(FORMAT=format, BLOCK_T=T, BLOCK_N=N, STAGES=stages, HAS_BIAS=False, X_LEFT=left, TMA=tma, X_TMA=False,
    EVEN_N=True, EVEN_K=True, PDL=tma, GPU=True, bias=None, squares=None,
    squares_out=None, SQUARES=0, GATED=False, ADDED=False)
types = dict(x="*bf16", codes=f"tensordesc<i16[{N}, 64]>" if tma else "*i16", code_rows="*i16", y="*bf16",
    scales="*i32" if format == "int4" else "*fp32", partial="*fp32", arrivals="*i32", eps="fp32")
function = kernels.stream_quant
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in function.arg_names}
aligned = ("x", "codes", "code_rows", "scales", "y", "partial", "arrivals", "N", "K", "x_stride")
attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(function.arg_names)
    if n in aligned and not signature[n].startswith("tensordesc")}
source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
options = dict(num_warps=int(sys.argv[9]), **({"launch_pdl": True} if tma else {}))
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
words = rf"tensor<{N}x64xi16|tensor<64x{N}xi16"
moved = re.findall(r"convert_layout .*x(?:i16|bf16), #.* -> .*dot_op", ttgir)
print(json.dumps({
    "shared": compiled.metadata.shared,
    "bulk": ttgir.count("async_tma_copy_global_to_local"),
    "copies": ttgir.count("async_copy_global_to_local"),
    "direct": bool(re.search(rf"local_load .*({words}).*dot_op|local_load .*({words}), #linear", ttgir)),
    "moved": len(moved),
    "products": len(re.findall(r"(?:wgmma.mma_async|mma.sync)\\S*", ptx)),
}))
"""


@pytest.mark.parametrize(
    ("format", "rows", "capability"),
    [
        ("int4", 8, 90),
        ("fp8", 26, 90),
        ("int8", 16, 90),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("int4", 64, 90), ("int4", 8, 80), ("fp8", 32, 120))),
    ],
)
def test_for_a_gpu_codes_go_straight_to_the_tensor_cores_registers(format, rows, capability, tmp_path):
    """Nothing but the copies from memory writes shared memory in the loop, and there is one for each further stage."""
    pytest.importorskip("triton")
    plan = plan_quant(format, rows, 37888, 3584, 132)
    tma = capability == 90
    stages = plan.stages if tma else 3
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    arguments = [format, capability, plan.x_left, tma, plan.block_t, plan.block_n, stages, plan.warps]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(Path(module.__file__).parents[1]), *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    compiled = json.loads(done.stdout)
    parts = 4 if format == "int4" else 2
    each = parts + (format == "int4") + (not tma)  # x tiles, scales, codes
    assert compiled["direct"]
    assert compiled["moved"] == 0
    assert compiled["bulk"] == (stages if tma else 0)
    assert compiled["copies"] == each * stages
    assert compiled["products"] >= parts * 4
    share = max(1, plan.programs // 132)
    assert compiled["shared"] <= (227 * 1024 if share == 1 else 113 * 1024 if tma else 99 * 1024)


@pytest.mark.parametrize("format", QUANTS)
@pytest.mark.parametrize("rows", [1, 8, 16, 26, 32])
class TestGPU:
    pytestmark = ON_GPU

    def test_the_kernel_rounds_once(self, format, rows):
        weight = quantize(draw(1000, 904, seed=1) / 30, format)
        dense = dequantize(replace(weight, data=weight.data.cpu(), scales=weight.scales.cpu()), torch.float32).to(
            DEVICE
        )
        for dtype, spacing in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
            x, bias = draw(rows, 904, dtype=dtype), draw(1000, dtype=dtype, seed=2)
            expected = (x.double() @ dense.double().T + bias.double()).float()
            for pdl in (False, HOPPER):
                y = quant_linear(x, weight, bias, pdl=pdl)
                assert ((y.float() - expected).abs() <= spacing * expected.abs() + 1e-5).all()
                assert torch.equal(y, quant_linear(x, weight, bias, pdl=pdl))

    def test_a_graph_replays_it(self, format, rows):
        weights = [quantize(draw(512, 512, seed=seed) / 22, format) for seed in range(1, 5)]
        x = draw(rows, 512, dtype=torch.bfloat16)

        def chain():
            h = x
            for weight in weights:
                h = linear(h, weight, pdl=HOPPER)
            return h

        expected = chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = chain()
        for _ in range(5):
            found.zero_()
            graph.replay()
            assert torch.equal(found, expected)
