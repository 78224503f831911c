"""How many facts of held-out clips a model states, and what is left when it is shown another clip.

    python -m training.evaluate src/specvlm/bundled/target                   200 rendered clips
    python -m training.evaluate src/specvlm/bundled/target --clips src/specvlm/bundled/clips      the H.264 files

Greedy captions through `generate()` in float32. A fact is right when the k-th sentence of the caption gives the
reference's value for the k-th object; the denominator is the reference's facts. "swapped" is the same with the video of
the next clip of the same length. The last line of stdout is JSON.
"""

import argparse
import json
import platform
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from training import models
from training.data import SYSTEM, VIDEO
from training.heldout import held_out, pixels
from training.language import PROMPTS, caption, questions, score
from training.render import CELLS, MERGE, TEMPORAL, patchify
from training.world import SAMPLED_FPS

MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class Clip:
    """A held-out clip: frames uint8 [T, 168, 168, 3] at SAMPLED_FPS, its facts and reference caption."""

    frames: Tensor
    facts: dict[str, str]
    caption: str


def rendered(count: int) -> list[Clip]:
    """The first `count` held-out scenes, rendered."""
    scenes = [held_out(number) for number in range(count)]
    return [Clip(pixels(scene, SAMPLED_FPS), scene.facts(), caption(scene)) for scene in scenes]


def decoded(folder: Path) -> list[Clip]:
    """The clips of `folder`, read from their files at SAMPLED_FPS."""
    import av

    clips = []
    for line in (folder / "clips.jsonl").read_text().splitlines():
        record = json.loads(line)
        with av.open(str(folder / record["file"])) as container:
            stride = round(container.streams.video[0].average_rate / SAMPLED_FPS)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][::stride]
        clips.append(
            Clip(torch.stack([torch.from_numpy(frame) for frame in frames]), record["facts"], record["caption"])
        )
    return clips


def inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, videos: list[Tensor], device: str) -> dict[str, Tensor]:
    """What Qwen's processor gives for one prompt about each of `videos` (equally long)."""
    steps, side = len(videos[0]) // TEMPORAL, CELLS * MERGE
    visual = "<|video_pad|>" * (steps * CELLS * CELLS)
    text = f"{SYSTEM}<|im_start|>user\n{VIDEO}{prompt}<|im_end|>\n<|im_start|>assistant\n".replace(
        "<|video_pad|>", visual
    )
    ids = torch.tensor(tokenizer(text).input_ids).expand(len(videos), -1)
    pixel_values = patchify(torch.stack(videos).to(device).float() / 255)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "mm_token_type_ids": (ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")).int().mul(2).to(device),
        "pixel_values_videos": pixel_values,
        "video_grid_thw": torch.tensor([[steps, side, side]] * len(videos), device=device),
        "second_per_grid_ts": torch.ones(len(videos), device=device),
    }


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, videos: list[Tensor], at_once: int = 20
) -> list[str]:
    """Greedy answers to `prompt` about each of `videos` (equally long)."""
    device, texts = str(model.device), []
    for first in range(0, len(videos), at_once):
        batch = inputs(tokenizer, prompt, videos[first : first + at_once], device)
        out = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, clips: list[Clip], shift: int) -> list[str]:
    """A caption for each clip, seen through the video of the clip `shift` further on among those of its length."""
    texts = [""] * len(clips)
    for length in sorted({len(clip.frames) for clip in clips}):
        group = [index for index, clip in enumerate(clips) if len(clip.frames) == length]
        shown = [clips[group[(place + shift) % len(group)]].frames for place in range(len(group))]
        for index, text in zip(group, answers(model, tokenizer, PROMPTS[0], shown), strict=True):
            texts[index] = text
    return texts


def facts_right(clips: list[Clip], texts: list[str]) -> tuple[float, dict[str, float]]:
    """Share of the facts that are right, in all and by slot."""
    right, asked = Counter(), Counter()
    for clip, text in zip(clips, texts, strict=True):
        for slot, (hits, number) in score(text, clip.facts).items():
            right[slot] += hits
            asked[slot] += number
    return sum(right.values()) / sum(asked.values()), {slot: round(right[slot] / asked[slot], 4) for slot in asked}


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, clips: list[Clip]) -> dict[str, object]:
    """Scores on `clips`, and on the same clips with swapped videos."""
    texts = describe(model, tokenizer, clips, 0)
    whole, slots = facts_right(clips, texts)
    swapped, _ = facts_right(clips, describe(model, tokenizer, clips, 1))
    return {
        "clips": len(clips),
        "facts": sum(len(clip.facts) for clip in clips),
        "right": round(whole, 4),
        "swapped": round(swapped, 4),
        "exact": round(sum(clip.caption == text for clip, text in zip(clips, texts, strict=True)) / len(clips), 4),
        "slots": slots,
    }


def answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> float:
    """Share of `count` short questions, one a held-out scene, that are answered word for word."""
    right = 0
    for number in range(count):
        scene = held_out(number)
        turn = questions(scene, np.random.default_rng(number), 1)[0]
        right += answers(model, tokenizer, turn.prompt, [pixels(scene, SAMPLED_FPS)]) == [turn.answer]
    return right / count


def main() -> None:
    """Prints one JSON line of scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clips", type=Path, help="folder of make_clips.py; rendered clips without it")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--questions", type=int, default=0, help="short questions to ask besides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model, tokenizer = models.load(args.model, args.device), AutoTokenizer.from_pretrained(args.model)
    clips, began = decoded(args.clips) if args.clips else rendered(args.count), time.monotonic()
    result = measure(model, tokenizer, clips) if clips else {}
    if args.questions:
        result |= {"questions": args.questions, "answered": round(answered(model, tokenizer, args.questions), 4)}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    where = {"model": args.model.name, "source": "files" if args.clips else "rendered", "device": args.device}
    print(json.dumps(where | result | {"seconds": round(time.monotonic() - began, 1)} | versions))


if __name__ == "__main__":
    main()
