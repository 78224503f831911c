"""Planted checkpoints: full-size models without trained weights, whose greedy text is known.

A model is built from its published config with random weights, straight on the device. Attention and MLP outputs of
the language layers are scaled by 1e-2, so that a token's embedding, drawn from N(0, 1), dominates the residual stream;
the output head holds, as the row of each token's successor, the token's own embedding over sqrt(width). The argmax
after token i is then successor(i), by a margin of sqrt(width) logits, and greedy text walks one long cycle over
ordinary tokens. All matrix products and KV reads run at full size, on any engine, unchanged.

A draft knows the target's next token as its 1st, 2nd, 3rd or 4th choice with the probabilities of `RANKS`, else not at
all; its other choices are other tokens of the cycle. Every token of the cycle has its rank for good. Of the draft
"published" the paper's tree accepts 2.75 tokens a round on average, a chain of five 1.94. "self" stands for the target
with fewer bits. Of "changing", stretches of BLOCK tokens along the cycle are "hopeless" and "published" in turn.

It says nothing about pruning quality: that needs trained weights.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from specvlm.core.errors import UnsupportedModel
from specvlm.families import family_for
from specvlm.kernels.quant import QuantWeight, quantize
from specvlm.runtime.graphs import Workspaces, on
from specvlm.runtime.model import VideoLM
from specvlm_bench import tokens
from specvlm_bench.published import Spec

RANKS: Mapping[str, tuple[float, ...]] = {
    "published": (0.70, 0.12, 0.05, 0.03),
    "hopeless": (0.05, 0.02, 0.01, 0.01),
    "self": (0.90, 0.05, 0.02, 0.01),
}
BLOCK = 128  # tokens along the cycle between two changes of the draft "changing"
_NUM_RANKS = 4
_DAMPING = 1e-2  # of every layer's output
_RANK_GAP = (
    4.8  # logits between a draft's choices, at most _MAX_STEP of its first: head weights 1, .92, .84, .76 at 3584
)
_MAX_STEP = 0.2  # between two of these weights
_CHUNK = 1 << 14  # rows of a head planted at once
_RANK_STREAM = 1 << 20  # added to the seed: ranks are drawn independently of the order


@dataclass(frozen=True)
class Cycle:
    """The planted order of tokens: `order` is one long cycle, all other ids of the vocabulary follow each other."""

    order: Tensor  # [n] int64, the cycle's ids
    place: Tensor  # [n] int64 by id minus the lowest: where an id stands in order
    low: int

    @staticmethod
    def of(spec: Spec, seed: int) -> Cycle:
        """Return the cycle over the spec's ordinary ids; the same for every model of a family."""
        low, high = spec.cycle
        permutation = torch.randperm(high - low, generator=torch.Generator().manual_seed(seed))
        return Cycle(permutation + low, permutation.argsort(), low)

    def along(self, ids: Tensor, stride: int) -> Tensor:
        """Return the tokens `stride` further along the cycle than `ids` (all of them of the cycle)."""
        return self.order[(self.place[ids - self.low] + stride) % self.order.shape[0]]

    def follows(self, previous: int, ids: Sequence[int]) -> bool:
        """Whether a text is the one planted after the token `previous`."""
        inside = range(self.low, self.low + self.order.shape[0])
        if any(token not in inside for token in (previous, *ids)):
            return False
        path = torch.tensor([previous, *ids])
        return bool((self.along(path[:-1], 1) == path[1:]).all())

    def is_good(self, ids: Tensor) -> Tensor:
        """Return [n] bool: whether the draft "changing" is "published", not "hopeless", about what follows each id."""
        return self.place[ids - self.low] // BLOCK % 2 == 1


def build(
    spec: Spec, *, cycle: Cycle, device: torch.device, dtype: torch.dtype, seed: int, draft: str | None = None
) -> VideoLM:
    """Build and plant one model; equal arguments give equal weights.

    The 32B takes about a second on a GPU and never touches the CPU.

    Args:
        spec: its shapes.
        cycle: the text of the target.
        device: where it is built.
        dtype: of its weights.
        seed: of weights and ranks.
        draft: what it knows of the text, a name of `RANKS` or "changing"; None is a target, which knows it all.
    """
    hf = _random_model(spec, device, dtype, seed)
    with torch.no_grad():
        for name, weight in hf.model.language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(_DAMPING)
        embeds: Tensor = hf.get_input_embeddings().weight
        embeds.normal_(generator=torch.Generator(device).manual_seed(seed))
        ranks = torch.zeros_like(cycle.order) if draft is None else _draw_ranks(cycle, draft, seed)
        _plant_head(hf.lm_head.weight, embeds, cycle, ranks, is_draft=draft is not None)
    hf.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=spec.ids[spec.eos], pad_token_id=spec.ids["<|endoftext|>"], do_sample=False
    )
    with tempfile.TemporaryDirectory() as folder:
        kind = family_for(spec.model_type)
        for name, settings in kind.processor_files(hf.config).items():
            Path(folder, name).write_text(json.dumps(settings), encoding="utf-8")
        family = kind(folder, hf.config, tokens.tokenizer(spec))
    return VideoLM(hf, family, name=f"{spec.name} (planted)")


def replanted(model: VideoLM, draft: str, *, cycle: Cycle, seed: int) -> VideoLM:
    """Return a copy with the head of another draft and its own state; layers and embeddings are shared.

    The head is quantised as the model's own is. A copy of the target becomes a draft that shares the target's `hf`.

    Args:
        model: planted on this cycle.
        draft: a name of `RANKS` or "changing".
        cycle: the text of the target.
        seed: of the ranks.

    Raises:
        UnsupportedModel: the model runs without the fused decoder, which alone takes another head.
    """
    if model.decoder is None:
        raise UnsupportedModel(f"{model.name}: another head cannot be planted on layers that are not fused")
    embeds: Tensor = model.hf.get_input_embeddings().weight
    head = embeds.new_empty(model.vocab_size, embeds.shape[1])
    with on(model.device), torch.no_grad():
        _plant_head(head, embeds.detach(), cycle, _draw_ranks(cycle, draft, seed), is_draft=True)
        other = copy.copy(model)
        other.head = quantize(head, model.head.format) if isinstance(model.head, QuantWeight) else head
    other.workspaces = Workspaces(model.kv_shape, model.dtype, model.device)  # their graphs read the head
    return other


def _random_model(spec: Spec, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Return a model with transformers' own initialisation, every tensor made on the device."""
    config = AutoConfig.for_model(spec.model_type, **spec.config())
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]


def _draw_ranks(cycle: Cycle, draft: str, seed: int) -> Tensor:
    """Return for every id of the cycle the draft's rank of its successor, [n] int64 from the lowest id on; 4 is none.

    Every hundred tokens along the cycle hold each rank as often as its probability says, in random order: so how much
    of a short text is accepted depends less on where it begins.
    """
    if draft == "changing":
        good, bad = (_draw_ranks(cycle, name, seed) for name in ("published", "hopeless"))
        return torch.where(cycle.is_good(cycle.low + torch.arange(cycle.order.shape[0])), good, bad)
    counts = [round(100 * share) for share in (*RANKS[draft], 1 - sum(RANKS[draft]))]
    hundred = torch.repeat_interleave(torch.arange(_NUM_RANKS + 1), torch.tensor(counts))
    dice = torch.rand(
        -(-cycle.order.shape[0] // 100), 100, generator=torch.Generator().manual_seed(seed + _RANK_STREAM)
    )
    along: Tensor = hundred[dice.argsort(1)].flatten()
    return along[cycle.place]


def _weights(ranks: Tensor, width: int) -> Tensor:
    """Return the head weights [5, n] of the tokens at each of the five strides after each token of the cycle.

    Stride 0 is the successor, at its rank; strides 1 to 4 fill the other ranks in their order, and 0 stands for a
    token that is no choice.
    """
    step = min(_MAX_STEP, _RANK_GAP / width**0.5)
    by_rank = torch.tensor([1 - step * rank for rank in range(_NUM_RANKS)] + [0.0])
    rows = [by_rank[ranks]]
    for other in range(4):
        rank = other + (ranks <= other).long()  # ranks below the successor's stay, those from it on move down
        rows.append(by_rank[rank.clamp_max(4)])
    return torch.stack(rows)


def _strides(length: int) -> list[int]:
    """Return five distances along the cycle: the successor's and those of a draft's four other choices."""
    return [1, *(length * part // 11 + part for part in (2, 4, 6, 8))]


def _plant_head(head: Tensor, embeds: Tensor, cycle: Cycle, ranks: Tensor, *, is_draft: bool) -> None:
    """Fill an output head [vocab, width]: the row of a token sums what may stand before it, weighted by rank."""
    device, (vocab, width) = head.device, head.shape
    order, low = cycle.order, cycle.low
    inside = torch.arange(low, low + order.shape[0])
    rest = torch.cat([torch.arange(low), torch.arange(low + order.shape[0], vocab)])
    head[rest.to(device)] = embeds[rest.roll(1).to(device)] / width**0.5
    strides = _strides(order.shape[0]) if is_draft else [1]
    weights = _weights(ranks, width)
    for ids in torch.split(inside, _CHUNK):
        total = torch.zeros(ids.shape[0], width, dtype=torch.float32, device=device)
        for number, stride in enumerate(strides):
            before = cycle.along(ids, -stride)
            weight = weights[number, before - low] / width**0.5
            total += embeds[before.to(device)].float() * weight[:, None].to(device)
        head[ids.to(device)] = total.to(head.dtype)
