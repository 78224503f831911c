"""Modules that are not what their class says are never taken over: the words are transformers'."""

import copy

import pytest
import tiny
import torch
from conftest import load
from torch import nn
from torch.nn.utils import parametrize

from specvlm import SpecVLM, UnsupportedModel
from specvlm.core.plain import is_plain
from specvlm.families.qwen_tower import FrameBatches
from specvlm.runtime.model import VideoLM
from specvlm.runtime.session import HFSession

PROMPT = "What happens in the video?"


def doubled(module, _, output):
    return 2 * output


def halved(module, args):
    return (args[0] / 2, *args[1:])


class Adapted(nn.Linear):
    """A linear layer with an adapter, as peft's."""

    def forward(self, rows):
        return super().forward(rows) + rows.sum(-1, keepdim=True)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Coded(torch.Tensor):
    """A weight of another kind, as torchao's: half of what it stores is meant."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, Coded) else arg for arg in args]
        if function is torch.nn.functional.linear:
            plain[1] = plain[1] / 2
        out = function(*plain, **(kwargs or {}))
        return out.as_subclass(Coded) if function.__name__ in ("detach", "requires_grad_") else out


def patch(module, name="forward"):
    own = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: 2 * own(*args, **kwargs))


def replace(parent, name, kind):
    old = getattr(parent, name)
    new = kind(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    setattr(parent, name, new.eval())


def widen_head(hf):
    hf.lm_head.bias = nn.Parameter(torch.linspace(-9, 9, hf.lm_head.out_features))


def code(module):
    module.weight = nn.Parameter(module.weight.data.as_subclass(Coded), requires_grad=False)


def scale(module):
    module.register_parameter("weight_scale", nn.Parameter(torch.tensor(2.0)))
    module.forward = lambda rows: nn.functional.linear(rows, module.weight * module.weight_scale, module.bias)


TEXT = {
    "a hook of a product": lambda text, _: text.layers[1].self_attn.q_proj.register_forward_hook(doubled),
    "a hook before a norm": lambda text, _: text.layers[0].input_layernorm.register_forward_pre_hook(halved),
    "a hook of a layer": lambda text, _: text.layers[1].register_forward_hook(doubled),
    "a hook of an activation": lambda text, _: text.layers[2].mlp.act_fn.register_forward_hook(doubled),
    "a hook of the model": lambda text, _: text.norm.register_forward_hook(doubled),
    "a hook of the head": lambda _, head: head.register_forward_hook(doubled),
    "a patched MLP": lambda text, _: patch(text.layers[0].mlp),
    "a patched norm": lambda text, _: patch(text.norm),
    "a patched head": lambda _, head: patch(head),
    "an adapter": lambda text, _: replace(text.layers[1].mlp, "down_proj", Adapted),
    "a parametrised product": lambda text, _: parametrize.register_parametrization(
        text.layers[1].self_attn.o_proj, "weight", Twice()
    ),
    "weights of another kind": lambda text, _: code(text.layers[0].mlp.up_proj),
    "a scale beside the weight": lambda text, _: scale(text.layers[0].self_attn.v_proj),
    "scaling of one layer": lambda text, _: setattr(text.layers[1].self_attn, "scaling", 0.9),
}
TOWER = {
    "a hook of a product": lambda tower: tower.blocks[0].mlp.gate_proj.register_forward_hook(doubled),
    "a patched norm": lambda tower: patch(tower.blocks[1].norm1),
    "a hook of a block": lambda tower: tower.blocks[0].register_forward_hook(doubled),
    "a patched embedding": lambda tower: patch(tower.patch_embed),
    "a hook of the embedding": lambda tower: tower.patch_embed.proj.register_forward_hook(doubled),
    "an adapter": lambda tower: replace(tower.blocks[0].mlp, "up_proj", Adapted),
    "weights of another kind": lambda tower: code(tower.blocks[0].mlp.up_proj),
}  # fmt: skip


def ours(hf, family):
    """Return the model, its session and its logits for a video."""
    model = SpecVLM(VideoLM(hf, family))
    start = model.prefill(model.request(tiny.video(4), PROMPT))
    return model, start.session, start.logits


def theirs(hf, family):
    inputs = family.inputs(tiny.messages("video", PROMPT), [tiny.video(4)])
    with torch.no_grad():
        return hf(input_ids=inputs.input_ids[None], **inputs.model_kwargs).logits[0, -1].float()


@pytest.mark.parametrize("kind", TEXT)
def test_changed_language_layers_run_as_they_are(kind):
    raw, family = tiny.load("qwen2_5_vl")
    hf = copy.deepcopy(raw)
    TEXT[kind](hf.model.language_model, hf.lm_head)
    wanted = theirs(hf, family)
    assert not torch.allclose(wanted, theirs(raw, family), rtol=0, atol=1e-2)
    model, session, logits = ours(hf, family)
    assert isinstance(session, HFSession)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    answer = model.generate(tiny.video(4), PROMPT, max_new_tokens=6, drafter="none")
    assert len(answer.token_ids) == 6
    with pytest.raises(UnsupportedModel, match="leave draft_quant out"):
        model.target.quantised("int8")


@pytest.mark.parametrize("kind", TOWER)
def test_a_changed_vision_tower_runs_as_it_is(kind):
    raw, family = tiny.load("qwen2_5_vl")
    hf = copy.deepcopy(raw)
    TOWER[kind](hf.model.visual)
    wanted = theirs(hf, family)
    assert not torch.allclose(wanted, theirs(raw, family), rtol=0, atol=1e-3)
    torch.testing.assert_close(ours(hf, family)[2], wanted, rtol=0, atol=1e-4)


def test_a_head_with_a_bias_and_a_hook_for_all_modules():
    raw, family = tiny.load("qwen2_5_vl")
    hf = copy.deepcopy(raw)
    widen_head(hf)
    torch.testing.assert_close(ours(hf, family)[2], theirs(hf, family), rtol=0, atol=1e-4)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert not is_plain(hf.lm_head, hf.lm_head.weight)
        assert VideoLM(copy.deepcopy(raw), family).decoder is None
    finally:
        handle.remove()


def test_what_waits_for_the_first_call_happens_and_what_wants_every_call_is_refused():
    """compressed-tensors unpacks its weights in a hook of the whole model, which takes itself off."""
    raw, family = tiny.load("qwen2_5_vl")
    hf, other = copy.deepcopy(raw), copy.deepcopy(raw)
    other.lm_head.weight.data *= 2

    def unpack(module, args):
        module.lm_head.weight.data *= 2
        handle.remove()

    handle = hf.register_forward_pre_hook(unpack)
    model, _, logits = ours(hf, family)
    assert model.target.decoder is not None
    torch.testing.assert_close(logits, theirs(other, family), rtol=0, atol=1e-4)
    for part in (other, other.model):
        handle = part.register_forward_hook(lambda module, args, output: None)
        with pytest.raises(UnsupportedModel, match="wrapped: hooks"):
            VideoLM(other, family, name="wrapped")
        handle.remove()


def test_what_transformers_loads_is_taken_over(family):
    model = load(family, "target")
    assert model.decoder is not None
    if family != "llava_onevision":
        assert isinstance(model.hf.model.visual.forward, FrameBatches)


def test_weights_on_several_devices():
    raw, family = tiny.load("qwen2_5_vl")
    hf = copy.deepcopy(raw)
    hf.lm_head.to("meta")
    with pytest.raises(UnsupportedModel, match="cpu, meta: load it on one device"):
        VideoLM(hf, family, name="offloaded")
