"""transformers' own generate() on the same weights and inputs: what plain decoding must equal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from specvlm.core.ambient import neutral
from specvlm.core.clock import wait
from specvlm.families.base import Inputs, counting
from specvlm.runtime.graphs import on
from specvlm.runtime.model import VideoLM


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


@neutral()
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
    device, clock = target.device, _Clock()
    options = {**target.rules.overrides, **options}
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    if assistant is not None:
        options["assistant_model"] = assistant.stock()
    model, inputs = target.stock(), inputs.to(device)
    options |= positions(target, inputs)
    with on(device):  # the vision tower's kernels are Triton's
        wait(device)
        begin = time.perf_counter()
        out = model.generate(
            input_ids=inputs.input_ids[None],
            **inputs.model_kwargs,
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
    return Reference(tuple(out.sequences[0, inputs.input_ids.shape[0] :].tolist()), arrivals, logits)


def positions(target: VideoLM, inputs: Inputs) -> dict[str, Tensor]:
    """Return what tells generate() where the tokens of an M-RoPE prompt stand: it counts on from the last of them.

    It takes 4 rows: the places in the sequence, by which it masks, and the three axes.
    """
    if counting(target.family, inputs) == "transformers":  # its own
        return {}
    found = target.family.positions(target.hf, inputs)
    if found.dim() == 2:
        return {}
    places = torch.arange(found.shape[-1], device=found.device).expand(1, 1, -1)
    return {"position_ids": torch.cat([places, found])}
