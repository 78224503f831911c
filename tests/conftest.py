"""Shared fixtures: one thread a worker, Triton's interpreter where there is no GPU, and tiny pairs of every family."""

import os
import signal
from functools import cache

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which transformers does

import tiny

from specvlm import SpecVLM
from specvlm.cli import main as cli
from specvlm.runtime.model import VideoLM

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background; what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture
def run(capsys):
    """Run a command line in process; it returns the exit status, stdout and stderr."""

    def run(*argv):
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run
