"""What a program sets for its own torch code has no influence on an answer, and an answer sets nothing for it."""

from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from conftest import load

from specvlm import SpecVLM


@contextmanager
def setting(put, value, before):
    put(value)
    try:
        yield
    finally:
        put(before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bfloat16 by default": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64 by default": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "numpy raises": lambda: np.errstate(all="raise"),
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_no_setting_around_us_has_an_influence(name, eager):
    pair = SpecVLM(load(name, "target"), load(name, "near"))
    video = tiny.video(5, 60, 90, 0.7)

    def run():
        request = pair.request(video, "Describe.", max_new_tokens=6, tree="paper", keep_ratio=0.5, eager=eager)
        start = pair.prefill(request)
        rounds = [latest.token_ids for latest in pair.decode(request, start)]
        return rounds, start.inputs.model_kwargs["pixel_values_videos"], start.prompt.embeds, start.logits

    ids, *tensors = run()
    for name, state in STATES.items():
        with state():
            found, *others = run()
        assert found == ids, name
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(others, tensors, strict=True)), name


def test_the_caller_s_settings_hold_between_rounds():
    pair = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))
    video = tiny.video(4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), torch.enable_grad():
        for _ in pair.stream(video, "What?", max_new_tokens=6, tree="paper"):
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_default_device().type == "meta"
            assert torch.is_grad_enabled()
