"""Whatever a user holds can be pickled, copied and compared."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import tiny
import torch
from conftest import load

from specvlm import CapacityError, ConfigError, MediaError, SpecVLM, UnsupportedModel
from specvlm.core.errors import Advice


@pytest.fixture(scope="module")
def held():
    """Objects of all kinds around one answer."""
    model = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))
    settings = {"max_new_tokens": 8, "tree": "paper", "stop": "never"}
    fresh, run = (model.request(tiny.video(4), "What happens?", **settings) for _ in range(2))
    run.seconds.on_stage = lambda name: None
    rounds = list(model.rounds(run))
    chunks = []
    request = model.request(tiny.video(4), "What happens?", **settings)
    answer = model.generate_request(request, on_chunk=chunks.append)
    assert math.isnan(answer.decisions[-1].choice.ms)  # a fixed tree is not timed, and NaN is not itself
    objects = [
        fresh,
        run,
        rounds[0],
        rounds[-1],
        chunks[-1],
        answer,
        answer.decisions[-1],
        answer.config,
        tiny.video(4),
    ]
    return {f"{place} {type(item).__name__}": item for place, item in enumerate(objects)}


def test_everything_is_pickled_copied_and_compared(held):
    for name, item in held.items():
        for other in (
            pickle.loads(pickle.dumps(item)),
            copy.deepcopy(item),
            copy.copy(item),
            dataclasses.replace(item),
        ):
            assert other == item, name


def test_what_differs_is_not_equal(held):
    items = list(held.values())
    assert all(one != other for place, one in enumerate(items) for other in items[:place])
    frames = tiny.video(4)
    assert frames != tiny.video(4, seed=1)
    assert frames != dataclasses.replace(frames, pixels=frames.pixels.float())
    assert frames != dataclasses.replace(frames, pixels=frames.pixels[:, :, :-1])
    assert hash(frames) == hash(tiny.video(4))
    assert frames != frames.pixels.shape


def test_an_answer_that_was_pickled_is_whole(held):
    answer = next(item for name, item in held.items() if name.endswith("Generation"))
    other = pickle.loads(pickle.dumps(answer))
    assert json.dumps(other.to_dict()) == json.dumps(answer.to_dict())
    assert other.seconds["prefill"] == answer.seconds["prefill"]
    with other.seconds.stage("decode", torch.device("cpu")):
        pass


@pytest.mark.parametrize("kind", [ConfigError, MediaError, UnsupportedModel, CapacityError])
def test_errors_are_pickled(kind):
    error = kind("what is wrong: its remedy")
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is kind
    assert str(other) == str(error)
    assert other.args == error.args
    if issubclass(kind, Advice):
        assert str(copy.deepcopy(error)) == str(error)
