"""Shared fixtures: one thread a worker, and tiny pairs of every family."""

from functools import cache

import pytest
import tiny
import torch

from specvlm import SpecVLM
from specvlm.model import VideoLM

torch.set_num_threads(1)


@cache
def load(family, part):
    return VideoLM.from_pretrained(tiny.checkpoint(family, part), device="cpu")


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pair(family):
    """A target and a draft that is often right."""
    return SpecVLM(load(family, "target"), load(family, "near"))
