"""transformers' own generate() on the same weights and inputs: what plain decoding must equal."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from specvlm.families import Inputs
from specvlm.graphs import on, wait
from specvlm.model import VideoLM


@dataclass(frozen=True)
class Reference:
    """A greedy answer of generate(), and when its tokens came."""

    token_ids: tuple[int, ...]
    arrivals: tuple[tuple[float, int], ...]  # seconds from the call on and number of tokens, each time some came
    logits: tuple[Tensor, ...]  # [vocab] before any penalty, one a token; empty unless they were asked for


class _Clock(BaseStreamer):
    """Notes when generate() hands over tokens, and how many."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int]] = []

    def put(self, value: Tensor) -> None:
        """Note an arrival; the tokens are on the CPU by then."""
        self.arrivals.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Do nothing."""


def generate(
    target: VideoLM,
    inputs: Inputs,
    *,
    max_new_tokens: int,
    repetition_penalty: float | None = None,
    assistant: VideoLM | None = None,
    has_logits: bool = False,
    **options: Any,
) -> Reference:
    """Answer greedily with transformers' generate(), prefill included, with its own attention.

    What a checkpoint's generation_config.json asks for and is not obeyed here (`Rules`) is taken out of it.

    Args:
        target: the model.
        inputs: of the prompt.
        max_new_tokens: upper bound on the new tokens.
        repetition_penalty: None is the checkpoint's own.
        assistant: for transformers' assisted generation.
        has_logits: whether to keep the logits of every token.
        **options: further options of generate().
    """
    device, ids, clock = target.device, inputs.input_ids.to(target.device), _Clock()
    options = {**target.rules.overrides, **options}
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    with ExitStack() as contexts:
        contexts.enter_context(on(device))  # the vision tower's kernels are Triton's
        contexts.enter_context(target.stock_attention())
        if assistant is not None:
            contexts.enter_context(assistant.stock_attention())
            options["assistant_model"] = assistant.hf
        wait(device)
        begin = time.perf_counter()
        out = target.hf.generate(
            input_ids=ids[None],
            **inputs.to(device).model_kwargs,
            **options,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=has_logits,
            streamer=clock,
        )
    _prompt, *later = clock.arrivals
    arrivals = tuple((when - begin, count) for when, count in later)
    logits = tuple(row[0] for row in out.logits or ())
    return Reference(tuple(out.sequences[0, ids.shape[0] :].tolist()), arrivals, logits)
