"""Hostile values of every setting: refused in one line, or accepted to the end as plain Python values."""

import copy
import dataclasses
import enum
import json
import pickle
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import get_type_hints

import media
import numpy as np
import pytest
import tiny
import torch
from conftest import load

from specvlm import ConfigError, SpecVLM, SpecVLMError
from specvlm.core.config import EngineConfig, SamplingConfig, VideoConfig, parsed
from specvlm.runtime.model import resolve_device, resolve_dtype


class Name(str):
    """A str of another type."""


class Choice(enum.StrEnum):
    """A str that is a member of an enum."""

    PAPER = "paper"
    VERIFIER = "verifier"


class Number(enum.IntEnum):
    """An int that is a member of an enum."""

    TWO = 2


class Silent:
    """An object that cannot be shown."""

    def __repr__(self):
        raise RuntimeError("no")


HOSTILE = (
    *(None, True, False, np.True_, b"paper", Path("paper"), complex(1, 0), Silent(), object, len, {"a"}, {}, {0: "0"}),
    *(0, 1, -1, 2, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 10**5000, Number.TWO),
    *(3.0, 0.5, -0.0, 1e-300, 1e300, 5e-324, float("nan"), float("inf"), -float("inf")),
    *(Fraction(1, 2), Fraction(10**400), Decimal("0.5"), np.int64(2), np.uint8(3), np.float32(0.5), np.float64("nan")),
    *(np.array(2), np.array([1, 2]), torch.tensor(2), torch.zeros(2, 2)),
    *(Choice.PAPER, Choice.VERIFIER, Name("paper"), Name("none"), np.str_("random"), np.str_("chain:2"), "", "\ud800"),
    *("9" * 5000, "chain:" + "9" * 5000, "dynamic:" + "9" * 5000 + ":2", "dynamic:7:3", "-0", "0,1", "all", "text"),
    *((), [], (1,), ("0", "1"), ["0", "00"], [np.int64(0)], (np.str_("0"),), ("",), ([],), iter("01")),
)
FIELDS = [(name, part) for part, kind in get_type_hints(EngineConfig).items() for name in get_type_hints(kind)]


def is_plain(value):
    return type(value) in (type(None), bool, int, float, str) or (type(value) is tuple and all(map(is_plain, value)))


@pytest.fixture(scope="module")
def pair():
    return SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return media.make_video(tmp_path_factory.mktemp("settings") / "clip.mp4", 6)


def assert_accepted(name, part, value, pair, source):
    """A config with this value is as good as one of plain values, to the JSON of an answer."""
    config = EngineConfig().replace(**{name: value})
    kept = getattr(getattr(config, part), name)
    assert is_plain(kept)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(config) == hash(config.replace())
    assert dataclasses.asdict(config) == dataclasses.asdict(config.replace(**{name: kept}))
    usual = {"max_new_tokens": 2, "timeout": 1}
    if part not in ("prune", "draft"):
        usual["drafter"] = "none"
    answer = pair.generate(source, "a b", **{**usual, name: value})
    json.dumps(answer.to_dict(), allow_nan=False)


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize(("name", "part"), FIELDS)
def test_a_hostile_value_is_refused_in_a_line_or_accepted_to_the_end(name, part, pair, clip):
    source = clip if part == "video" else tiny.video(2)
    problems = []
    for value in (getattr(getattr(EngineConfig(), part), name), *HOSTILE):
        try:
            assert_accepted(name, part, value, pair, source)
        except SpecVLMError as error:
            problems.append(str(error))
    assert len(problems) <= len(HOSTILE)  # the default is accepted
    assert not any("\n" in problem or len(problem) > 600 for problem in problems)


def test_a_value_is_kept_as_pythons_own():
    config = EngineConfig().replace(fps=np.float32(2), max_new_tokens=np.int64(3), stop=[Name("a")], temperature=-0.0)
    assert config == EngineConfig().replace(fps=2.0, max_new_tokens=3, stop=("a",))
    assert type(config.video.fps) is float
    assert str(config.sampling.temperature) == "0.0"
    assert SamplingConfig(stop="end") == SamplingConfig(stop=("end",)) == SamplingConfig(stop=["end"])
    with pytest.raises(ConfigError, match="video=None"):
        EngineConfig(video=None)
    with pytest.raises(ConfigError, match="run="):
        EngineConfig(run=VideoConfig())


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "score_layers", "tree", "keep_ratio"])
def test_text_of_many_digits_is_refused_in_a_line(name):
    with pytest.raises(ConfigError, match=name) as error:
        SpecVLM(load("qwen2_5_vl", "target")).request(None, "a", **{name: parsed(name, "9" * 5000)})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "device", ["meta", "nonsense", "cuda:99", "mps", "", "cpu:x", None, 0, 1.5, b"cpu", ["cpu"], "xla"]
)
def test_a_device_that_is_not_served_is_refused(device):
    with pytest.raises(ConfigError, match="device=") as error:
        resolve_device(device)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["int8", torch.float32, None, [], 16])
def test_a_dtype_that_is_not_served_is_refused(dtype):
    with pytest.raises(ConfigError, match="dtype="):
        resolve_dtype(dtype, torch.device("cpu"))


def test_models_are_named_by_text():
    for names in ({"target": 5}, {"draft": ["a"]}, {"target": tiny.checkpoint("qwen2_5_vl"), "draft": b"self"}):
        with pytest.raises(ConfigError, match="hub id"):
            SpecVLM.from_pretrained(**names)
    with pytest.raises(ConfigError, match="draft_quant="):
        SpecVLM.from_pretrained(draft_quant=[])
