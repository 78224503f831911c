"""Rotary embeddings whose angles depend on how long a pass is are refused; those that do not are served."""

import json
import shutil

import pytest
import tiny
from transformers import AutoConfig

from specvlm import SpecVLM, UnsupportedModel
from specvlm.runtime.model import check_text

HALF = 8  # numbers of a head's half in the tiny models
SERVED = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}
REFUSED = {
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 128, "short_factor": [1.0] * HALF,
                 "long_factor": [4.0] * HALF},
    "dynamic": {"factor": 4.0},
}  # fmt: skip


def rewritten(family, part, kind, folder):
    """A checkpoint with another rotary embedding."""
    directory = folder / part
    shutil.copytree(tiny.checkpoint(family, part), directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"] |= {"rope_type": kind, **REFUSED.get(kind, SERVED.get(kind, {}))}
    path.write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize("part", ["target", "near"])
@pytest.mark.parametrize("kind", REFUSED)
def test_angles_that_follow_the_length_are_refused(family, kind, part, tmp_path):
    loaded = {"target": tiny.checkpoint(family), "near": tiny.checkpoint(family, "near")}
    loaded[part] = rewritten(family, part, kind, tmp_path)
    (tmp_path / part / "model.safetensors").unlink()  # refused before weights are looked for
    with pytest.raises(UnsupportedModel, match=rf"rope_type '{kind}' is not supported: .* length of a pass"):
        SpecVLM.from_pretrained(loaded["target"], draft=loaded["near"], device="cpu")


@pytest.mark.parametrize("kind", SERVED)
def test_fixed_angles_are_served(family, kind, tmp_path):
    directory = rewritten(family, "target", kind, tmp_path)
    model = SpecVLM.from_pretrained(directory, draft=directory, device="cpu")
    ask = {"source": tiny.video(4), "prompt": "What?", "max_new_tokens": 8}
    assert model.generate(**ask, tree="paper").token_ids == model.generate(**ask, drafter="none").token_ids


def test_a_type_for_each_kind_of_layer_is_looked_at(tmp_path):
    text = AutoConfig.from_pretrained(tiny.checkpoint("qwen2_vl")).get_text_config()
    text.rope_parameters = {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(UnsupportedModel, match="rope_type 'dynamic'"):
        check_text(text, "here")
