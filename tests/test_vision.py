"""The vision towers in batches of frames: results as in one pass, in bounded memory and few launches."""

from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from specvlm.families import family_for, pixels
from specvlm.families import qwen_tower as vision

QWEN = [name for name in tiny.FAMILIES if name != "llava_onevision"]
LAYERS = 2  # of the tiny towers
MIXED = (
    tiny.messages("image", "and", "video", "and", "image", "and", "video", "What?"),
    [tiny.image(50, 99), tiny.video(5, 60, 90), tiny.image(120, 61, 1), tiny.video(8, 56, 84, seed=1)],
)
PROMPTS = {
    "video": (tiny.messages("video", "What?"), [tiny.video(8)]),
    "alike": (tiny.messages("video", "video", "What?"), [tiny.video(4), tiny.video(4, seed=1)]),
    "image": (tiny.messages("image", "What?"), [tiny.image(97, 60)]),
    "images": (tiny.messages(*["image"] * 4), [tiny.image(97, 60, seed) for seed in range(4)]),
    "mixed": MIXED,
}


@cache
def prepared(family):
    """A copy of the shared model whose tower is replaced, and its family."""
    model, tools = tiny.load(family)
    model = deepcopy(model)
    tools.prepare(model)
    return model, tools


def recorded(model, monkeypatch):
    """How many patches each call of the tower embeds, as they come."""
    sizes = []
    is_qwen = hasattr(model.model, "visual")
    convolution = model.model.visual.patch_embed if is_qwen else model.model.vision_tower.embeddings
    inner = convolution.forward

    def embed(pixels, **kwargs):
        out = inner(pixels, **kwargs)
        sizes.append(out.shape[:-1].numel())
        return out

    monkeypatch.setattr(convolution, "forward", embed, raising=False)
    return sizes


# ---------------------------------------------------------------- equal to one pass of Hugging Face's tower


@pytest.mark.parametrize("most", [1, 60, 1 << 20])
@pytest.mark.parametrize("name", PROMPTS)
def test_batches_equal_the_one_pass(family, name, most, monkeypatch):
    monkeypatch.setattr(vision, "MAX_PATCHES", 1 << 20)
    model, tools = tiny.load(family)
    inputs = tools.inputs(*PROMPTS[name])
    expected = tiny.encode(tools, model, inputs)
    monkeypatch.setattr(vision, "MAX_PATCHES", most)
    prompt = tiny.encode(tools, prepared(family)[0], inputs)
    assert torch.allclose(prompt.embeds, expected.embeds, atol=1e-5, rtol=1e-5)
    assert torch.equal(prompt.positions, expected.positions)
    assert torch.equal(prompt.visual_index, expected.visual_index)
    assert len(prompt.deepstack) == len(expected.deepstack) == (2 if family == "qwen3_vl" else 0)
    for found, wanted in zip(prompt.deepstack, expected.deepstack, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)


def test_generate_reads_the_same_tower(family):
    model, tools = tiny.load(family)
    inputs = tools.inputs(*PROMPTS["alike"])
    expected, found = (
        each.generate(inputs.input_ids[None], **inputs.model_kwargs, max_new_tokens=8, do_sample=False)
        for each in (model, prepared(family)[0])
    )
    assert torch.equal(found, expected)


def test_a_second_installation_changes_nothing(family):
    model, tools = prepared(family)
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    tools.prepare(model)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == before


# ---------------------------------------------------------------- bounded memory


@pytest.mark.parametrize(
    ("grids", "most", "expected"),
    [
        ([(8, 4, 6)], 72, [[(3, 4, 6)], [(3, 4, 6)], [(2, 4, 6)]]),
        ([(2, 4, 6), (1, 2, 2), (3, 4, 4)], 72, [[(2, 4, 6), (1, 2, 2), (1, 4, 4)], [(2, 4, 4)]]),
        ([(2, 4, 6)], 1, [[(1, 4, 6)], [(1, 4, 6)]]),
        ([(1, 2, 2), (1, 8, 8), (2, 2, 2)], 16, [[(1, 2, 2)], [(1, 8, 8)], [(2, 2, 2)]]),
        ([(3, 2, 2)], 12, [[(3, 2, 2)]]),
    ],
)
def test_batches_are_whole_steps_in_order(grids, most, expected):
    assert vision.batches(grids, most) == expected


@pytest.mark.parametrize("most", [1, 60])
@pytest.mark.parametrize("name", ["video", "alike", "images", "mixed"])
def test_no_batch_exceeds_the_bound(family, name, most, monkeypatch):
    model, tools = prepared(family)
    inputs = tools.inputs(*PROMPTS[name])
    sizes = recorded(model, monkeypatch)
    tiny.encode(tools, model, inputs)
    total = sum(sizes)
    del sizes[:]
    monkeypatch.setattr(vision, "MAX_PATCHES", most)
    tiny.encode(tools, model, inputs)
    assert max(sizes) <= max(most, one_step(family, inputs))
    assert sum(sizes) == total
    assert len(sizes) > 1


def one_step(family, inputs):
    """Patches of the largest time step, which no batch can cut."""
    if family == "llava_onevision":
        return 25
    grids = [inputs.model_kwargs[key] for key in ("image_grid_thw", "video_grid_thw") if key in inputs.model_kwargs]
    return int(torch.cat(grids)[:, 1:].prod(1).max())


def test_batches_are_as_full_as_can_be(monkeypatch):
    """8 time steps of 24 patches, 60 at most: two steps a batch."""
    model, tools = prepared("qwen2_5_vl")
    sizes = recorded(model, monkeypatch)
    monkeypatch.setattr(vision, "MAX_PATCHES", 60)
    tiny.encode(tools, model, tools.inputs(tiny.messages("video"), [tiny.video(16, 56, 84)]))
    assert sizes == [48] * 4


def test_pixels_come_in_the_dtype_of_the_model(family, monkeypatch):
    """Rounded part by part, to what the model rounds float32 pixels to."""
    directory = tiny.checkpoint(family)
    config = tiny.load(family)[0].config
    tools = family_for(config.model_type)(directory, config, AutoTokenizer.from_pretrained(directory))
    wanted = tools.inputs(*MIXED).model_kwargs
    tools.prepare(deepcopy(tiny.load(family)[0]).to(torch.bfloat16))
    monkeypatch.setattr(pixels, "_PART", 1000)
    found = tools.inputs(*MIXED).model_kwargs
    for key in ("pixel_values", "pixel_values_videos"):
        for ours, theirs in zip(found[key], wanted[key], strict=True):
            assert theirs.dtype == torch.float32
            assert torch.equal(ours, theirs.to(torch.bfloat16))


@pytest.mark.parametrize("family", QWEN)
def test_only_features_come_out(family):
    model, tools = prepared(family)
    inputs = tools.inputs(*PROMPTS["video"])
    out = model.model.visual(inputs.model_kwargs["pixel_values_videos"], inputs.model_kwargs["video_grid_thw"])
    assert set(out.keys()) == {"pooler_output"} | ({"deepstack_features"} if family == "qwen3_vl" else set())


# ---------------------------------------------------------------- few launches, few waits


def launches(family, media, monkeypatch):
    """Attention calls of the tower for one prompt."""
    model, tools = prepared(family)
    calls = []
    inner = vision.F.scaled_dot_product_attention
    spy = SimpleNamespace(**{name: getattr(vision.F, name) for name in ("linear", "pad")})
    spy.scaled_dot_product_attention = lambda *args, **kwargs: calls.append(args[0].shape) or inner(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(vision, "F", spy)
        tiny.encode(tools, model, tools.inputs(tiny.messages(*[frames.kind for frames in media]), media))
    return calls


@pytest.mark.parametrize("family", QWEN)
def test_launches_do_not_grow_with_windows(family, monkeypatch):
    few, many = (launches(family, [tiny.video(frames, 56, 56)], monkeypatch) for frames in (2, 16))
    assert len(few) == len(many) == LAYERS
    assert [shape[0] for shape in few] == [1, 1]
    assert [shape[0] for shape in many] == [8, 8]  # time steps, each of one window here


def test_one_launch_for_each_length_of_windows(monkeypatch):
    """Frames of 84 x 84 pixels have 3 x 3 cells of 4 patches: windows of 2 x 2, 2 x 1, 1 x 2 and 1 x 1 cells."""
    calls = launches("qwen2_5_vl", [tiny.video(16, 84, 84)], monkeypatch)
    assert [(shape[0], shape[2]) for shape in calls] == [(8, 16), (16, 8), (8, 4), (8, 36)]  # the last: whole frames


@pytest.mark.parametrize("family", QWEN)
def test_bounds_are_read_once_a_batch(family, monkeypatch):
    made = []
    inner = vision.Segments.of
    monkeypatch.setattr(vision.Segments, "of", lambda bounds: made.append(bounds) or inner(bounds))
    model, tools = prepared(family)
    inputs = tools.inputs(*PROMPTS["video"])
    monkeypatch.setattr(vision, "MAX_PATCHES", 60)
    sizes = recorded(model, monkeypatch)
    tiny.encode(tools, model, inputs)
    assert len(made) == len(sizes) * (2 if family == "qwen2_5_vl" else 1)


def test_windows_and_frames_are_known_side_by_side():
    known = vision.KnownSegments()
    windows, frames = torch.tensor([0, 2, 4]), torch.tensor([0, 4])
    first, second = known.of(windows), known.of(frames)
    assert first.groups == ((2, 2),)
    assert second.groups == ((1, 4),)
    assert known.of(windows) is first
    assert known.of(frames) is second


def test_segments_attend_among_themselves():
    lengths = [3, 5, 3, 1, 5]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    rows = torch.randn(3, sum(lengths), 2, 8, generator=torch.Generator().manual_seed(0))
    found = vision.attend(*rows, vision.Segments.of(bounds), scaling=0.3)
    expected = []
    for query, key, value in (part.transpose(1, 2) for part in rows.split(lengths, dim=1)):
        weights = (query @ key.transpose(1, 2) * 0.3).softmax(-1)
        expected.append((weights @ value).transpose(0, 1).flatten(1))
    assert torch.allclose(found, torch.cat(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "is_sorted"), [([4, 4, 4], True), ([6, 6, 2, 2], True), ([4, 2, 4], False), ([2], True)]
)
def test_rows_move_only_where_lengths_alternate(lengths, is_sorted):
    segments = vision.Segments.of(torch.tensor([0, *lengths]).cumsum(0))
    assert (segments.order is None) == is_sorted
    assert sum(count for count, _ in segments.groups) == len(lengths)


# ---------------------------------------------------------------- what surrounds the attention


@pytest.mark.parametrize(("width", "aligned"), [(66, 128), (64, 64), (68, 68)])
def test_an_odd_mlp_is_widened_by_zeros(width, aligned):
    """66 float32 numbers are 264 bytes, no multiple of 16; 68 are 272."""
    mlp = Qwen2_5_VLMLP(SimpleNamespace(hidden_size=32, intermediate_size=width, hidden_act="silu"), bias=True)
    rows = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mlp(rows)
        vision._align(mlp)
        assert torch.allclose(mlp(rows), expected, atol=1e-6)
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (aligned, 32)
    assert mlp.down_proj.weight.shape == (32, aligned)
    assert (mlp.gate_proj.out_features, mlp.down_proj.in_features) == (aligned, aligned)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_equal_the_one_pass_on_a_gpu(family, monkeypatch):
    plain = deepcopy(tiny.load(family)[0]).cuda()
    tools = tiny.load(family)[1]
    model = deepcopy(plain)
    tools.prepare(model)
    inputs = tools.inputs(*MIXED, device="cuda")
    expected = tiny.encode(tools, plain, inputs)
    monkeypatch.setattr(vision, "MAX_PATCHES", 60)
    prompt = tiny.encode(tools, model, inputs)
    assert torch.allclose(prompt.embeds, expected.embeds, atol=1e-4, rtol=1e-4)
    for found, wanted in zip(prompt.deepstack, expected.deepstack, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)
