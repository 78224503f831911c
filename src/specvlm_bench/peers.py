"""Peers: transformers' own generate() on the models that this engine runs (vLLM's own process is in vllm_plain.py)."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from specvlm.check import reference
from specvlm.engine.account import measure_peak, reset_peak
from specvlm.engine.api import SpecVLM
from specvlm.engine.request import Prefilled
from specvlm.runtime.model import VideoLM
from specvlm_bench.passes import Pass

ASSISTED = "transformers-assisted"
PEERS: dict[str, dict[str, Any]] = {
    "transformers-eager": {},
    "transformers-static": {"cache_implementation": "static"},  # generate() compiles the step on a GPU
    ASSISTED: {},
}


def generate(model: SpecVLM, start: Prefilled, method: str, num_tokens: int) -> Pass:
    """Answer with transformers' generate() on the same in-memory models, with its own attention, prefill included.

    Tokens are clocked as they reach the CPU, which generate() waits for anyway; so the prefill is left out of the
    decoding time. It runs beside this engine's own session: its peak memory holds both.
    """
    devices = model.devices
    is_assisted = method == ASSISTED
    reset_peak(*devices)
    answer = reference.generate(
        model.target,
        start.inputs,
        max_new_tokens=num_tokens,
        repetition_penalty=1.0,
        assistant=model.draft if is_assisted else None,
        **PEERS[method],
    )
    (begin, first), *later = answer.arrivals
    accepted = [count - 1 for _, count in later]
    return Pass(
        list(answer.token_ids),
        first,
        answer.arrivals[-1][0] - begin,
        {"encode_prefill": begin},
        statistics.fmean(accepted) if accepted and is_assisted else None,
        num_rounds=len(later),
        peak_bytes=measure_peak(*devices),
    )


def forget(target: VideoLM) -> None:
    """Drop what generate() compiled, with its CUDA graphs and their memory."""
    hf = target.hf
    if "_compiled_call" in vars(hf):  # where PreTrainedModel.get_compiled_call keeps it
        del hf._compiled_call
        torch.compiler.reset()
