"""The same promises on a GPU, and with target and draft on two devices. Skipped where there is none."""

import pytest
import tiny
import torch

from specvlm import SpecVLM
from specvlm.model import VideoLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPT = "What happens in the video?"
LENGTH = 24


def load_pair(family, device, draft_device, dtype="float32"):
    target = VideoLM.from_pretrained(tiny.checkpoint(family, "target"), device=device, dtype=dtype)
    return SpecVLM(target, VideoLM.from_pretrained(tiny.checkpoint(family, "near"), device=draft_device, dtype=dtype))


def draft_devices():
    return ["cuda", "cpu"] + ["cuda:1"] * (torch.cuda.device_count() > 1)


@pytest.mark.parametrize("draft_device", draft_devices())
def test_fp32_is_lossless_wherever_the_draft_sits(family, draft_device):
    model = load_pair(family, "cuda", draft_device)
    ask = {"source": tiny.video(6), "prompt": PROMPT, "max_new_tokens": LENGTH}
    plain = model.generate(**ask, drafter="none")
    inputs = model.prefill(model.request(tiny.video(6), PROMPT)).inputs
    with model.target.stock_attention():
        out = model.target.hf.generate(
            input_ids=inputs.input_ids[None], **inputs.model_kwargs, max_new_tokens=LENGTH, do_sample=False
        )
    assert plain.token_ids == tuple(out[0, inputs.input_ids.shape[0] :].tolist())
    accepted = 0
    for tree in ("paper", "chain:4"):
        for keep_ratio in (1.0, 0.1):
            answer = model.generate(**ask, tree=tree, keep_ratio=keep_ratio)
            assert answer.token_ids == plain.token_ids
            accepted += answer.speculation.accepted_tokens
    assert accepted > 0
    sampled = [model.generate(**ask, temperature=1.0, top_k=20, seed=1).token_ids for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_bfloat16_is_the_default_and_runs(family):
    model = load_pair(family, "auto", "auto", "auto")
    assert model.target.hf.dtype == torch.bfloat16
    answer = model.generate(tiny.video(6), PROMPT, max_new_tokens=LENGTH)
    assert len(answer.token_ids) == LENGTH
    assert answer.peak_memory_bytes > 0
