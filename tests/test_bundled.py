"""The bundled pair on its 40 held-out mp4 clips: word for word plain decoding and transformers' generate().

A clip takes two methods in turn, so that every pruner, ratio and tree meets several clips; the whole product is
measured by `specvlm bench acceptance` and stands in docs/acceptance.md.
"""

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch

from specvlm import SpecVLM, prune
from specvlm.bench.acceptance import Method, read_clips, run
from specvlm.engine import bundled

CLIPS = Path(bundled("clips"))
SWEEP = [
    Method(pruner, keep_ratio, tree)
    for tree, keep_ratio, pruner in itertools.product(("paper", "chain:5"), (0.1, 1.0), prune.PRUNERS)
]
PER_CLIP = 2


@cache
def model():
    return SpecVLM.from_pretrained(device="cpu")


@pytest.mark.parametrize("number", range(40))
def test_ids_are_those_of_plain_decoding_and_of_transformers(number):
    clips = read_clips(CLIPS)
    assert len(clips) == 40
    mine = [SWEEP[(PER_CLIP * number + i) % len(SWEEP)] for i in range(PER_CLIP)]
    results = list(run(model(), CLIPS, clips[number : number + 1], mine))
    assert len(results) == PER_CLIP
    for result in results:
        assert result.is_plain, result
        assert result.is_generate, result
        assert result.completion_tokens > 20
        assert result.target_passes < result.completion_tokens


def test_the_pair_shares_a_tokenizer_and_is_small():
    parts = model().target, model().draft
    sizes = [sum(weight.numel() for weight in part.hf.parameters()) for part in parts]
    assert 10e6 <= sizes[0] <= 30e6
    assert 1e6 <= sizes[1] <= 4e6
    files = [Path(bundled(name), "model.safetensors") for name in ("target", "draft")]
    assert sum(file.stat().st_size for file in files) < 64e6
    assert all(part.hf.dtype == torch.float32 for part in parts)
