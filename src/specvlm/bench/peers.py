"""Peers: transformers' own generate() on the models that this engine runs (vLLM's own process is in vllm_plain.py)."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from specvlm.account import measure_peak, reset_peak
from specvlm.bench.passes import Pass, synchronize
from specvlm.engine import Prefilled, SpecVLM
from specvlm.graphs import on
from specvlm.model import VideoLM

PEERS: dict[str, dict[str, Any]] = {
    "transformers-eager": {},
    "transformers-static": {"cache_implementation": "static"},  # generate() compiles the step on a GPU
    "transformers-assisted": {},
}


class _Clock(BaseStreamer):
    """Notes when generate() hands over tokens, and how many."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int]] = []

    def put(self, value: Tensor) -> None:
        """Note an arrival; the tokens are on the CPU by then."""
        self.arrivals.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Do nothing."""


def generate(model: SpecVLM, start: Prefilled, method: str, num_tokens: int) -> Pass:
    """Answer with transformers' generate() on the same in-memory models, with its own attention, prefill included.

    Tokens are clocked as they reach the CPU, which generate() waits for anyway; so the prefill is left out of the
    decoding time. It runs beside this engine's own session: its peak memory holds both.
    """
    target, devices = model.target, {model.target.device, (model.draft or model.target).device}
    ids, clock = start.inputs.input_ids, _Clock()
    options: dict[str, Any] = dict(PEERS[method])
    reset_peak(*devices)
    with ExitStack() as contexts:
        contexts.enter_context(on(target.device))  # the vision tower's kernels are Triton's
        contexts.enter_context(target.stock_attention())
        if method == "transformers-assisted":
            assert model.draft is not None
            contexts.enter_context(model.draft.stock_attention())
            options["assistant_model"] = model.draft.hf
        synchronize(*devices)
        begin = time.perf_counter()
        out = target.hf.generate(
            input_ids=ids[None],
            **start.inputs.model_kwargs,
            **options,
            max_new_tokens=num_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            streamer=clock,
        )
    _prompt, first, *later = clock.arrivals
    accepted = [count - 1 for _, count in later]
    return Pass(
        out[0, ids.shape[0] :].tolist(),
        first[1],
        (later[-1] if later else first)[0] - first[0],
        {"encode_prefill": first[0] - begin},
        statistics.fmean(accepted) if accepted and method == "transformers-assisted" else None,
        num_rounds=len(later),
        peak_bytes=measure_peak(*devices),
    )


def forget(target: VideoLM) -> None:
    """Drop what generate() compiled, with its CUDA graphs and their memory."""
    hf = target.hf
    if "_compiled_call" in vars(hf):  # where PreTrainedModel.get_compiled_call keeps it
        del hf._compiled_call
        torch.compiler.reset()
