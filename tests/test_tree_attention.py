"""The tree attention kernel against its reference: in Triton's interpreter, or compiled where there is a GPU."""

import random
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from specvlm import kernels
from specvlm.core import tree
from specvlm.core.errors import ConfigError
from specvlm.core.rows import ancestors
from specvlm.kernels import tree_attention as module
from specvlm.kernels.tree_attention import (
    Config,
    choose_config,
    tree_attention,
    tree_attention_reference,
    workspace_for,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALING = 0.2
SMALL = Config((32, 0))  # the interpreter's time goes by programs, whatever they hold
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def chain(num_rows):
    return torch.ones(num_rows, num_rows, dtype=torch.bool).tril()


def verify_mask(topology):
    """[N + 1, N + 1]: the root and the nodes of a tree, as verification sees them."""
    sees = F.pad(ancestors(topology.parents), (1, 0, 1, 0))
    sees[:, 0] = True
    return sees


def random_tree(num_nodes, seed):
    draw = random.Random(seed)
    parents = [-1, *(draw.randrange(-1, node) for node in range(1, num_nodes))]
    return tree.Tree(tuple(parents), (0,) * num_nodes)


def inputs(sees, prefix_lens, heads=2, kv_heads=1, dim=64, dtype=torch.float32, room=9):
    """Draw inputs whose KV rows behind the stored ones are NaN; head and row are swapped in storage."""
    torch.manual_seed(0)
    batch, tree_len = len(prefix_lens), sees.shape[1]
    store = torch.full((2, batch, max(prefix_lens) + tree_len + room, kv_heads, dim), torch.nan)
    for number, prefix_len in enumerate(prefix_lens):
        rows = prefix_len + tree_len
        store[:, number, :rows] = torch.randn(2, rows, kv_heads, dim)
    keys, values = store.to(DEVICE, dtype).transpose(2, 3)
    query = torch.randn(batch, sees.shape[0], heads, dim).to(DEVICE, dtype)
    return query, keys, values, torch.tensor(prefix_lens, dtype=torch.int32, device=DEVICE), sees.to(DEVICE)


def check(sees, prefix_lens, config=None, **shape):
    args = inputs(sees, prefix_lens, **shape)
    query = args[0]
    dims = (query.shape[0], query.shape[1], query.shape[2], args[1].shape[1], query.shape[3])
    workspace = workspace_for(*dims, DEVICE, query.dtype).fill_(torch.nan) if config is None else None
    out = tree_attention(*args, scaling=SCALING, workspace=workspace, config=config)
    expected = tree_attention_reference(*args, scaling=SCALING)
    assert (out.shape, out.dtype, out.is_contiguous()) == (query.shape, query.dtype, True)
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(out.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_reference_is_masked_attention():
    query, keys, values, prefix_len, sees = inputs(random_mask(5, 8), [11], heads=6, kv_heads=2)
    out = tree_attention_reference(query, keys, values, prefix_len, sees, scaling=SCALING)
    mask = F.pad(sees, (11, 0), value=True)
    keys, values = keys[:, :, :19], values[:, :, :19]
    expected = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, mask, scale=SCALING, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=2e-6, atol=2e-6)


def random_mask(num_rows, tree_len):
    """Rows that see half of what is stored, and themselves."""
    sees = torch.rand(num_rows, tree_len, generator=torch.Generator().manual_seed(1)) < 0.5
    sees[:, tree_len - num_rows :] |= torch.eye(num_rows, dtype=torch.bool)
    return sees


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "dtype"),
    [
        (8, 3, 1, torch.float16),
        (16, 4, 2, torch.float32),
        (32, 4, 2, torch.float16),
        (64, 14, 2, torch.float32),
        (64, 4, 4, torch.bfloat16),
        (80, 10, 2, torch.float32),
        (80, 4, 1, torch.float16),
        (96, 8, 1, torch.float32),
        (96, 3, 3, torch.bfloat16),
        (128, 10, 2, torch.float32),
        (128, 7, 1, torch.float16),
        (128, 5, 1, torch.bfloat16),
    ],
)
def test_every_head_dim_group_and_dtype(dim, heads, kv_heads, dtype):
    check(random_mask(3, 5), [70], dim=dim, heads=heads, kv_heads=kv_heads, dtype=dtype)


@pytest.mark.parametrize("prefix_len", [0, 1, 37, 38, 39, 63, 64, 65, 127, 128, 500])
def test_prefix_lengths_around_blocks(prefix_len):
    check(verify_mask(tree.parse("paper")), [prefix_len], heads=1, config=SMALL)


@pytest.mark.parametrize(
    ("num_rows", "heads"),
    [(1, 1), (20, 1), (50, 1), (128, 1), (70, 2), (73, 2)],
)
def test_every_number_of_rows(num_rows, heads):
    check(chain(num_rows), [66], heads=heads, dtype=torch.float16)


@pytest.mark.parametrize(
    "config",
    [
        Config((16, 0)),
        Config((32, 16), block=32, programs=1),
        Config((16, 64), block=32, tail_cost=1, merge_warps=1),
        Config((32, 0), block=128, programs=9, tail_cost=5),
        Config((256, 0), warps=16, stages=2, programs=1),
    ],
)
def test_every_layout(config):
    check(random_mask(12, 35), [180], heads=3, config=config)


def test_more_splits_than_the_merge_takes_at_a_time():
    args = inputs(chain(1), [1060], heads=2)
    args[1][:, :, 1040:] *= 4  # the highest logits come last: what was summed before must fade
    settings = {"scaling": SCALING, "config": Config((16, 0), block=16, programs=12)}
    assert module._grid(settings["config"], 2, 1, 1061, 6).splits > module._MERGE_CHUNK
    expected = tree_attention_reference(*args, scaling=SCALING)
    torch.testing.assert_close(tree_attention(*args, **settings), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_random_trees(seed):
    check(verify_mask(random_tree(11 + 10 * seed, seed)), [77 + seed], heads=2, config=SMALL)


def test_level_steps_see_what_the_verification_sees():
    sees = verify_mask(tree.parse("paper"))
    query, keys, values, prefix_len, sees = inputs(sees, [70], heads=1, room=1)
    settings = {"scaling": SCALING, "config": SMALL}
    whole = tree_attention(query, keys, values, prefix_len, sees, **settings)
    start = 1
    for width in (4, 8, 8, 3, 2):
        end = start + width
        level = tree_attention(query[:, start:end], keys, values, prefix_len, sees[start:end, :end], **settings)
        torch.testing.assert_close(level, whole[:, start:end], rtol=2e-6, atol=2e-6)
        start = end


def test_longest_tree():
    check(random_mask(3, 255), [50], heads=1)


def test_batch_with_different_prefixes():
    check(random_mask(3, 5), [0, 200, 64], heads=4, kv_heads=2, dtype=torch.float16)


def test_layout_of_the_kv_cache_and_strided_queries():
    sees = chain(3)
    query, keys, values, prefix_len, sees = inputs(sees, [100], heads=4, kv_heads=2)
    expected = tree_attention_reference(query, keys, values, prefix_len, sees, scaling=SCALING)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    for rows in (keys.contiguous(), keys):
        out = tree_attention(query, rows, values.contiguous(), prefix_len, sees, scaling=SCALING)
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)


def test_rows_that_see_nothing_are_zero():
    sees = chain(4)
    sees[2] = False
    args = inputs(sees, [0])
    for attention in (tree_attention, tree_attention_reference):
        out = attention(*args, scaling=SCALING)
        assert (out[:, 2] == 0).all()
        assert out.isfinite().all()
    check(sees, [0])


def test_the_prefix_may_change_in_place():
    query, keys, values, prefix_len, sees = inputs(chain(3), [300])
    for length in (300, 5, 192, 0):
        prefix_len.fill_(length)
        out = tree_attention(query, keys, values, prefix_len, sees, scaling=SCALING, config=SMALL)
        expected = tree_attention_reference(query, keys, values, prefix_len, sees, scaling=SCALING)
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)


def test_nothing_is_read_on_the_host(monkeypatch):
    """Meta tensors have no values: a read would raise."""
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((grid, kwargs))

    recorder = Recorder()
    recorder.attend_split = recorder.merge_splits = recorder
    monkeypatch.setattr(module, "_load_kernels", lambda device: recorder)
    query, keys, values, prefix_len, sees = (tensor.to("meta") for tensor in inputs(chain(3), [300]))
    tree_attention(query, keys, values, prefix_len, sees, scaling=SCALING)
    assert [grid for grid, _ in launches] == [(1, 10, 1), (6, 1)]  # 10 blocks of 32 hold 312 rows


def test_the_same_bits_every_time():
    args = inputs(random_mask(5, 9), [400], heads=4)
    first = tree_attention(*args, scaling=SCALING, config=SMALL)
    assert torch.equal(first, tree_attention(*args, scaling=SCALING, config=SMALL))


def test_a_workspace_serves_fewer_rows_and_is_checked():
    args = inputs(chain(2), [90], heads=4, kv_heads=2)
    workspace = workspace_for(1, 128, 4, 2, 64, DEVICE, torch.float32).fill_(torch.nan)
    out = tree_attention(*args, scaling=SCALING, workspace=workspace)
    assert torch.equal(out, tree_attention(*args, scaling=SCALING))
    with pytest.raises(ConfigError, match="use workspace_for"):
        tree_attention(*args, scaling=SCALING, workspace=workspace[:99])


def test_splits_fill_the_processors_once():
    grid = module._grid(Config((128, 16), programs=1), 130, 8, 17000, 132)
    assert (grid.row_tiles, grid.splits) == (1, 16)
    assert module._grid(Config((16, 0), programs=2), 5, 8, 17000, 132).splits == 33
    assert module._grid(Config((16, 0), programs=2), 5, 8, 600, 132).splits == 10  # one block each
    assert module._grid(Config((16, 0), programs=1), 17, 400, 17000, 132).splits == 1


@pytest.mark.parametrize("kv_heads", [4, 8])
def test_tiles_hold_the_rows_and_waste_little(kv_heads):
    for num_packed in range(1, 897):  # 896: 128 rows of 7 heads that share a key-value head
        config = choose_config(num_packed, kv_heads)
        row_tiles = module._grid(config, num_packed, kv_heads, None, 132).row_tiles
        assert num_packed <= row_tiles * sum(config.rows) <= max(16, 2 * num_packed)
        assert row_tiles == 1 or num_packed > 144  # every further tile reads the keys and values again


@pytest.mark.parametrize("kv_heads", [2, 3, 4, 5, 8, 16, 32])
def test_layouts_fit_the_chip_and_a_step_of_the_merge(kv_heads):
    for num_packed in range(1, 897):
        config = choose_config(num_packed, kv_heads)
        stored = 2 * config.stages * 2 * config.block * module.MAX_HEAD_DIM  # bytes of the keys and values in flight
        queries = 2 * sum(config.rows) * module.MAX_HEAD_DIM
        assert config.programs * (stored + queries) <= 227 * 1024
        assert config.programs * config.warps * 32 * 255 <= 65536  # every thread may use 255 registers
        splits = module._grid(config, num_packed, kv_heads, None, 132).splits
        assert splits <= module._MERGE_CHUNK or kv_heads == 2  # 66: two heads need them to fill the chip


def test_on_a_gpu_of_little_shared_memory_the_pipeline_is_short():
    for num_packed in range(1, 897):
        config = choose_config(num_packed, 8)
        assert module._fitting(config, 164 << 10) == config  # A100
        short = module._fitting(config, 100 << 10)  # 86 KiB is what (128, 16) takes compiled for such a GPU
        assert short == replace(config, stages=2)
    assert module._fitting(choose_config(4, 8, is_half=False), 100 << 10).stages == 1


def broken(**changes):
    names = ("query", "keys", "values", "prefix_len", "sees")
    args = dict(zip(names, inputs(chain(3), [20], heads=4, kv_heads=2), strict=True))
    return {**args, **{name: change(args[name]) for name, change in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": lambda t: t[..., :36], "keys": lambda t: t[..., :36]}, "head dimension 36"),
        ({"query": lambda t: t[:, :0]}, "0 new rows"),
        ({"query": lambda t: t.repeat(1, 43, 1, 1)}, "129 new rows"),
        ({"query": lambda t: t[:, :, :3]}, "do not fit query"),
        ({"keys": lambda t: t[:, :, 1:]}, "do not fit query"),
        ({"sees": lambda t: t[:2]}, "must be bool"),
        ({"sees": lambda t: t[:, :2]}, "must be bool"),
        ({"sees": lambda t: F.pad(t, (253, 0))}, "must be bool"),
        ({"sees": lambda t: t.int()}, "must be bool"),
        ({"prefix_len": lambda t: t.long()}, r"int32 \[1\]"),
        ({"prefix_len": lambda t: t[0]}, r"int32 \[1\]"),
        ({"query": lambda t: t.half()}, "one dtype"),
        ({"values": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)}, "dimension of values"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    for attention in (tree_attention, tree_attention_reference):
        with pytest.raises(ConfigError, match=message):
            attention(**broken(**changes), scaling=SCALING)


def test_without_triton_only_the_reference_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "specvlm.kernels.tree_attention_triton", raising=False)
    monkeypatch.delattr(kernels, "tree_attention_triton", raising=False)
    args = inputs(chain(2), [3])
    assert tree_attention_reference(*args, scaling=SCALING).isfinite().all()
    with pytest.raises(ConfigError, match="pip install triton"):
        tree_attention(*args, scaling=SCALING)


def test_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = [tensor.cpu() for tensor in inputs(chain(2), [3])]
    with pytest.raises(ConfigError, match="use a GPU"):
        tree_attention(*args, scaling=SCALING)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("num_rows", [1, 6, 26])
def test_one_graph_serves_every_prefix_length(num_rows):
    args = inputs(random_mask(num_rows, num_rows), [3000], heads=40, kv_heads=8, dim=128, dtype=torch.bfloat16)
    query, keys, values, prefix_len, sees = args
    keys.nan_to_num_()
    values.nan_to_num_()
    tree_attention(*args, scaling=SCALING)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tree_attention(*args, scaling=SCALING)
    for length in (3000, 0, 1, 64, 2999):
        prefix_len.fill_(length)
        graph.replay()
        expected = tree_attention_reference(query, keys, values, prefix_len, sees, scaling=SCALING)
        torch.testing.assert_close(out.float(), expected.float(), rtol=1e-2, atol=1e-2)
