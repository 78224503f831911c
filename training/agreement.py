"""How far a draft that sees part of the video agrees with the target, and what the target's attention looks at.

    python -m training.agreement src/specvlm/bundled/target src/specvlm/bundled/draft --count 40

Teacher-forced on the reference captions, which the target repeats word for word in 199 clips of 200. "top1" is the
share of caption tokens that are the draft's first choice, "top4" that are among its first four, "chain" the tokens
accepted a round when it drafts chains of five. Kept tokens stay at their positions. The last line of stdout is JSON.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from training import models
from training.data import Encoder, chat
from training.heldout import held_out, pixels
from training.language import PROMPTS, Turn, caption
from training.render import cell_labels, pack, patchify
from training.world import COLOURS, SAMPLED_FPS, Scene

CHAIN = 5


class Clip:
    """One held-out clip with its reference caption as a sequence."""

    def __init__(self, scene: Scene, encode: Encoder) -> None:
        turns = [Turn(PROMPTS[0], caption(scene))]
        ids, answers, positions = encode(chat(turns), scene.num_frames // 2)
        self.ids, self.positions = torch.tensor(ids)[None], torch.tensor(positions)[:, None]  # [1, L], [3, 1, L]
        video = np.flatnonzero(ids == encode.video)
        self.first, self.after = int(video[0]), int(video[-1]) + 1
        self.answers = torch.tensor(np.flatnonzero(answers))
        self.patches = patchify(pixels(scene, SAMPLED_FPS)[None].float() / 255)
        self.objects = cell_labels(pack([scene]))["colour"][0] < len(COLOURS)  # [V]

    def embeds(self, model: PreTrainedModel) -> Tensor:
        """Input embeddings [1, L, width] with the visual tokens in place."""
        embeds = model.get_input_embeddings()(self.ids)
        embeds[0, self.first : self.after] = models.visual_tokens(model, self.patches)
        return embeds


def attention(target: PreTrainedModel, clip: Clip) -> tuple[Tensor, Tensor]:
    """Mean attention to each visual token [V] of the prompt's rows after the video, and of the caption's rows."""
    text = target.model.language_model
    out = text(inputs_embeds=clip.embeds(target), position_ids=clip.positions, use_cache=False, output_attentions=True)
    weights = torch.stack(out.attentions).mean((0, 1, 2))[:, clip.first : clip.after]  # [L, V]
    start = clip.answers[0]
    return weights[clip.after : start].mean(0), weights[start:].mean(0)


def selections(scores: Tensor, share: float, seed: int) -> dict[str, Tensor]:
    """Sorted indices of the kept visual tokens, by the way of choosing them."""
    total, count = len(scores), round(len(scores) * share)
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return {
        "all": torch.arange(total),
        "attention": scores.topk(count).indices.sort().values,
        "uniform": torch.linspace(0, total - 1, count).round().long(),
        "random": shuffled[:count].sort().values,
        "random half": shuffled[: total // 2].sort().values,
        "none": torch.arange(0),
    }


def choices(draft: PreTrainedModel, clip: Clip, embeds: Tensor, keep: Tensor) -> Tensor:
    """The draft's four first choices [M, 4] for each caption token, seeing the visual tokens `keep`."""
    stays = torch.cat([torch.arange(clip.first), keep + clip.first, torch.arange(clip.after, clip.ids.shape[1])])
    text = draft.model.language_model
    out = text(inputs_embeds=embeds[:, stays], position_ids=clip.positions[:, :, stays], use_cache=False)
    dropped = clip.ids.shape[1] - len(stays)
    return draft.lm_head(out.last_hidden_state[0, clip.answers - 1 - dropped]).topk(4).indices


def rounds(agrees: list[bool]) -> tuple[int, int]:
    """Accepted tokens and rounds when chains of CHAIN are drafted; each round adds one token of the target's own."""
    accepted = turns = place = 0
    while place < len(agrees):
        run = 0
        while run < CHAIN and place + run < len(agrees) and agrees[place + run]:
            run += 1
        accepted, turns, place = accepted + run, turns + 1, place + run + 1
    return accepted, turns


@torch.no_grad()
def measure(target: PreTrainedModel, draft: PreTrainedModel, encode: Encoder, count: int, share: float) -> dict:
    """Means over `count` held-out clips."""
    tally, looks = defaultdict(lambda: np.zeros(5)), np.zeros(4)
    for number in range(count):
        clip = Clip(held_out(number), encode)
        prompt_rows, caption_rows = attention(target, clip)
        best, embeds = prompt_rows.topk(round(len(prompt_rows) * share)), clip.embeds(draft)
        on_objects = [float(rows[clip.objects].sum() / rows.sum()) for rows in (prompt_rows, caption_rows)]
        looks += [float(clip.objects.float().mean()), *on_objects, float(best.values.sum() / prompt_rows.sum())]
        for name, keep in selections(prompt_rows, share, number).items():
            right = choices(draft, clip, embeds, keep) == clip.ids[0, clip.answers, None]
            tokens = [len(right), int(right[:, 0].sum()), int(right.any(1).sum())]
            tally[name] += [*tokens, *rounds(right[:, 0].tolist())]
    names = ("object tokens", "their share of the prompt's attention", "of the caption's", "attention of the kept")
    agreement = {
        name: {"top1": round(top1 / tokens, 3), "top4": round(top4 / tokens, 3), "chain": round(accepted / turns, 2)}
        for name, (tokens, top1, top4, accepted, turns) in tally.items()
    }
    return agreement | {
        "target looks": {name: round(value / count, 3) for name, value in zip(names, looks, strict=True)}
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--keep", type=float, default=0.1, help="share of the visual tokens that the draft sees")
    args = parser.parse_args()
    target, draft = models.load(args.target), models.load(args.draft)
    target.set_attn_implementation({"text_config": "eager", "vision_config": "framewise"})
    draft.set_attn_implementation({"text_config": "sdpa", "vision_config": "framewise"})
    encode = Encoder(AutoTokenizer.from_pretrained(args.target))
    print(json.dumps({"clips": args.count, "keep": args.keep} | measure(target, draft, encode, args.count, args.keep)))


if __name__ == "__main__":
    main()
