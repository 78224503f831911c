"""Trains one model of the pair on clips rendered as it goes.

    python -m training.train target OUT --minutes 9
    python -m training.train draft OUT --minutes 6 --teacher path/to/target
    torchrun --nproc-per-node 4 -m training.train target OUT --minutes 9      several GPUs
    python -m training.train tiny OUT --small                                 a minute on a CPU

The loss is next-token cross-entropy on the answers, plus what the renderer knows about every visual token: linear
heads on the tower's output (what two frames show) and on the middle text layer (what needs the frames before). Without
these heads the tower learns nothing for a long time. They are dropped when the model is saved.
"""

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from training import models
from training.data import Clips, Curriculum, Encoder, Sample, loader
from training.render import REMEMBERED, SEEN, cell_labels, clip_pixels, patchify
from training.tokenizer import build as build_tokenizer
from training.world import COLOURS

LOG_EVERY = 20  # steps between log lines, and between agreements on the learning rate


@dataclass(frozen=True)
class Plan:
    """The settings of one run; the command line sets them."""

    size: str
    out: Path
    minutes: float
    rate: float
    steps_a_batch: int
    warm_steps: int
    workers: int
    tokenizer: Path | None
    start: Path | None
    teacher: Path | None
    keep: float
    compiled: bool
    max_steps: int


class Probes(nn.Module):
    """The dense heads: `seen` reads the visual tokens, `remembered` a text layer at their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seen = nn.Linear(width, sum(SEEN.values()))
        self.remembered = nn.Linear(width, sum(REMEMBERED.values()))

    @staticmethod
    def losses(logits: Tensor, sizes: dict[str, int], labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean cross-entropy of every attribute; logits [B * V, sum of sizes]."""
        parts = logits.float().split(list(sizes.values()), dim=-1)
        return {name: F.cross_entropy(part, labels[name].flatten()) for name, part in zip(sizes, parts, strict=True)}


class Learner(nn.Module):
    """A model with its probes; calling it gives the losses of a sample."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, teacher: nn.Module | None, keep: float) -> None:
        super().__init__()
        self.keep = keep
        self.model, self.probes = model, Probes(model.config.text_config.hidden_size)
        layers = model.model.language_model.layers
        self._middle: Tensor | None = None
        layers[(len(layers) - 1) // 2].register_forward_hook(self._keep_middle)
        object.__setattr__(self, "teacher", teacher)  # no submodule: it is neither trained nor saved

    def _keep_middle(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        self._middle = output

    def forward(self, sample: Sample, patches: Tensor) -> dict[str, Tensor]:
        """Losses of `sample`, whose clips are `patches` [all patches, 1176]."""
        labels = cell_labels(sample.batch)
        visual = models.visual_tokens(self.model, patches)
        losses = Probes.losses(self.probes.seen(visual), SEEN, labels)
        shown, video = sample, self.model.config.video_token_id
        if torch.rand(()) < 0.5 and self.keep < 1:
            kept = likely(labels["colour"], self.keep)
            shown, visual = thinned(sample, kept, video), visual[kept.flatten()]
            labels = {name: value[kept] for name, value in labels.items()}
        logits = self._answers(self.model, shown, visual)
        losses |= Probes.losses(self.probes.remembered(self._middle[shown.ids == video]), REMEMBERED, labels)
        losses["text"] = F.cross_entropy(logits.float(), sample.targets)
        if self.teacher is not None:
            losses["teacher"] = self._distance(logits, sample, patches)
        return losses

    def _answers(self, model: nn.Module, sample: Sample, visual: Tensor) -> Tensor:
        """Logits [M, vocab] for every token of an answer."""
        hidden = models.hidden_states(model, sample.ids, sample.positions, visual)
        return model.lm_head(hidden.flatten(0, 1)[sample.where])

    def _distance(self, logits: Tensor, sample: Sample, patches: Tensor) -> Tensor:
        """Mean KL divergence from the teacher's distribution over each answer token."""
        with torch.no_grad():
            wanted = self._answers(self.teacher, sample, models.visual_tokens(self.teacher, patches))
        return F.kl_div(
            logits.float().log_softmax(-1), wanted.float().log_softmax(-1), reduction="batchmean", log_target=True
        )


def likely(colour: Tensor, share: float) -> Tensor:
    """Mask [B, V] of `share` of the visual tokens, drawn at random with a preference for those that show an object."""
    odds = torch.rand(colour.shape, device=colour.device) + 0.7 * (colour < len(COLOURS))
    chosen = odds.topk(round(colour.shape[1] * share), dim=1).indices
    return torch.zeros_like(colour, dtype=torch.bool).scatter_(1, chosen, True)


def thinned(sample: Sample, kept: Tensor, video: int) -> Sample:
    """The sample without the visual tokens outside `kept` [B, V]; the others stay at their positions."""
    stays = (sample.ids != video).masked_scatter(sample.ids == video, kept)  # [B, L]
    count, length = len(stays), int(stays[0].sum())
    moved = (stays.cumsum(1) - 1 + length * torch.arange(count, device=stays.device)[:, None]).flatten()
    positions = sample.positions[:, stays].view(3, count, length)
    return Sample(sample.batch, sample.ids[stays].view(count, length), positions, moved[sample.where], sample.targets)


def total(losses: dict[str, Tensor], progress: float) -> Tensor:
    """The training loss; the probes fade to a tenth of their weight at the end."""
    text = losses["text"] if "teacher" not in losses else 0.3 * losses["text"] + 0.7 * losses["teacher"]
    seen = sum(losses[name] for name in SEEN)
    remembered = sum(losses[name] for name in REMEMBERED)
    return text + (0.5 * seen + 0.3 * remembered) * (1 - 0.9 * progress)


def schedule(step: int, progress: float, warm_up: int = 200) -> float:
    """Share of the peak learning rate: linear warm-up by steps, cosine to zero by time."""
    return min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def optimiser(learner: nn.Module, rate: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in learner.parameters() if p.ndim > 1]
    vectors = [p for p in learner.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=device.type == "cuda")


def average_gradients(learner: nn.Module) -> None:
    """All-reduces the gradients as one buffer."""
    grads = [p.grad for p in learner.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def agreed(value: float, device: torch.device) -> float:
    """The first process's value, in every process."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], device=device)
    dist.broadcast(shared, 0)
    return shared.item()


def prepare(plan: Plan, tokenizer: Qwen2Tokenizer, device: torch.device) -> Learner:
    """The model to train, from scratch or from a checkpoint, with its teacher."""
    torch.manual_seed(0)
    model = models.load(plan.start) if plan.start else models.build(plan.size, tokenizer)
    teacher = models.load(plan.teacher).requires_grad_(False) if plan.teacher else None
    for part in filter(None, (model, teacher)):
        part.to(device)
        part.model.visual.set_attn_implementation("framewise")
        if plan.compiled:
            for block in [*part.model.visual.blocks, *part.model.language_model.layers]:
                block.forward = torch.compile(block.forward)  # hooks stay outside
    return Learner(model, teacher, plan.keep).to(device).train()


def train(plan: Plan, learner: Learner, batches: Iterator[Sample], device: torch.device) -> None:
    """Steps until the time is up; the first process logs and saves."""
    adam, began, progress, first = optimiser(learner, plan.rate, device), time.monotonic(), 0.0, rank() == 0
    generator = torch.Generator(device).manual_seed(rank())
    clips, step = 0, 0
    autocast = torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    while progress < 1 and step < plan.max_steps:
        sample = next(batches).to(device)
        with torch.no_grad():
            patches = patchify(clip_pixels(sample.batch, generator=generator))
        with autocast:
            losses = learner(sample, patches)
        total(losses, progress).backward()
        if dist.is_initialized():
            average_gradients(learner)
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = plan.rate * schedule(step, progress)
        adam.step()
        adam.zero_grad(set_to_none=True)
        clips, step = clips + len(sample.ids), step + 1
        if step % LOG_EVERY == 0:
            seconds = time.monotonic() - began
            progress = agreed(seconds / (60 * plan.minutes), device)
            if first:
                report(step, seconds, clips * world_size(), losses)


def report(step: int, seconds: float, clips: int, losses: dict[str, Tensor]) -> None:
    """One JSON line."""
    rounded = {name: round(loss.item(), 4) for name, loss in losses.items()}
    print(
        json.dumps({"step": step, "seconds": round(seconds, 1), "clips_per_s": round(clips / seconds), **rounded}),
        flush=True,
    )


def rank() -> int:
    """Number of this process, from torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes, from torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start_device() -> torch.device:
    """This process's device; joins the process group when started by torchrun."""
    if not torch.cuda.is_available():
        if world_size() > 1:
            dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    if world_size() > 1:
        dist.init_process_group("nccl", device_id=device)
    return device


def parse_plan() -> Plan:
    """The command line as a plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(models.SIZES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--steps-a-batch", type=int, default=1024, help="grid steps a batch and process")
    parser.add_argument("--warm-steps", type=int, default=600, help="steps of easy clips")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--tokenizer", type=Path, help="folder of a saved tokenizer; trained anew without it")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--teacher", type=Path, help="checkpoint to distil from")
    parser.add_argument("--keep", type=float, default=1.0, help="share of visual tokens in half of the steps")
    parser.add_argument("--compiled", action="store_true", help="compile the layers")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--small", action="store_true", help="a short run on a CPU")
    args = vars(parser.parse_args())
    if args.pop("small"):
        args |= {"minutes": 1.0, "steps_a_batch": 16, "warm_steps": 40, "workers": 0}
    return Plan(**args)


def main() -> None:
    """Trains and saves one model."""
    plan = parse_plan()
    device = start_device()
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer) if plan.tokenizer else build_tokenizer()
    curriculum = Curriculum(plan.steps_a_batch, 0 if plan.start else plan.warm_steps)
    stream = Clips(Encoder(tokenizer), curriculum, stream=100 * bool(plan.start) + rank())
    learner = prepare(plan, tokenizer, device)
    train(plan, learner, iter(loader(stream, plan.workers)), device)
    if rank() == 0:
        models.save(learner.model, tokenizer, plan.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
