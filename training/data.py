"""Training batches: scenes of one length, one conversation each, as token ids, targets and positions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Qwen2Tokenizer

from training.language import Turn, conversation
from training.render import CELLS, TEMPORAL, Batch, pack
from training.world import sample_scene

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
TRAINING = 1  # first word of a training scene's seed


def chat(turns: list[Turn], *, text_first: bool = False) -> str:
    """The conversation in the chat template's form; the last answer is closed, the video stands in the first turn."""
    text = SYSTEM
    for k, turn in enumerate(turns):
        prompt = turn.prompt
        if k == 0:
            prompt = f"{prompt}{VIDEO}" if text_first else f"{VIDEO}{prompt}"
        text += f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{turn.answer}<|im_end|>\n"
    return text


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into ids, answer masks and positions."""

    tokenizer: Qwen2Tokenizer

    def __post_init__(self) -> None:
        ids = self.tokenizer.convert_tokens_to_ids
        header = [ids("<|im_start|>"), *self.tokenizer("assistant\n").input_ids]
        object.__setattr__(self, "header", header)
        object.__setattr__(self, "end", ids("<|im_end|>"))
        object.__setattr__(self, "video", ids("<|video_pad|>"))

    def __call__(self, text: str, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids [L], answer mask [L] and positions [3, L] of `text` with a video of `num_steps` grid steps."""
        ids = np.array(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        count = num_steps * CELLS * CELLS
        ids = np.repeat(ids, np.where(ids == self.video, count, 1))
        answers, last = self._answers(ids)
        return ids, answers, positions(ids == self.video, num_steps, last)

    def _answers(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Mask [L] of the answers with their end tokens, and where the last answer starts."""
        mask, start = np.zeros(len(ids), bool), len(ids)
        for opened in np.flatnonzero(ids == self.header[0]):
            if list(ids[opened : opened + len(self.header)]) == self.header:
                start = opened + len(self.header)
                mask[start : start + np.argmax(ids[start:] == self.end) + 1] = True
        return mask, start


def positions(is_video: np.ndarray, num_steps: int, last_answer: int) -> np.ndarray:
    """Positions [3, L] as transformers 5 counts: the prompt's by `get_rope_index`, the last answer's behind them all.

    So does a model's forward(); generate() goes on behind the prompt's last token, as earlier answers do here.
    """
    first = int(np.argmax(is_video))
    after = first + int(is_video.sum())
    step, row, column = np.indices((num_steps, CELLS, CELLS)).reshape(3, -1) + first
    tail = np.arange(len(is_video) - after) + first + CELLS
    head = np.tile(np.arange(first), (3, 1))
    out = np.concatenate([head, np.stack([step, row, column]), np.tile(tail, (3, 1))], axis=1)
    out[:, last_answer:] = out[:, :last_answer].max() + 1 + np.arange(len(is_video) - last_answer)
    return out


@dataclass
class Sample:
    """One batch: pictures to draw and text to learn."""

    batch: Batch
    ids: Tensor  # [B, L], padded at the end
    positions: Tensor  # [3, B, L]
    where: Tensor  # [M] indices into B * L whose next token is part of an answer
    targets: Tensor  # [M] that token

    def to(self, device: torch.device | str) -> "Sample":
        """The sample on `device`."""
        rest = (self.ids, self.positions, self.where, self.targets)
        return Sample(self.batch.to(device), *(value.to(device, non_blocking=True) for value in rest))

    def pin_memory(self) -> "Sample":
        """The sample in page-locked memory; the loader calls this."""
        rest = (self.ids, self.positions, self.where, self.targets)
        return Sample(
            Batch(*(value.pin_memory() for value in vars(self.batch).values())), *(value.pin_memory() for value in rest)
        )


def collate(batch: Batch, rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], pad: int) -> Sample:
    """Rows of `Encoder` side by side, padded to a multiple of 32."""
    length = -(-max(len(row[0]) for row in rows) // 32) * 32
    ids, mask = np.full((len(rows), length), pad), np.zeros((len(rows), length), bool)
    where = np.zeros((3, len(rows), length), np.int64)
    for b, (tokens, answers, place) in enumerate(rows):
        ids[b, : len(tokens)], mask[b, : len(tokens)], where[:, b, : len(tokens)] = tokens, answers, place
    chosen = np.flatnonzero(mask)  # an answer never starts a row
    arrays = (ids, where, chosen - 1, ids.reshape(-1)[chosen])
    return Sample(batch, *(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


@dataclass(frozen=True)
class Curriculum:
    """What a training step holds, as a function of its number."""

    steps_a_batch: int  # grid steps in a batch of clips: its cost
    warm_steps: int  # training steps of short clips with few objects and mostly questions

    def num_frames(self, step: int) -> int:
        """Sampled frames of every clip in the batch of that step, in any process."""
        choices, odds = (
            ((16, 24), None) if step < self.warm_steps else ((16, 24, 32, 48, 64), (0.2, 0.2, 0.25, 0.2, 0.15))
        )
        return int(np.random.default_rng((3, step)).choice(choices, p=odds))

    def max_objects(self, step: int) -> int:
        """The most objects a clip may show."""
        return 3 if step < self.warm_steps else 5

    def captioned(self, step: int) -> float:
        """Share of the conversations that start with a caption."""
        return 0.3 if step < self.warm_steps else 0.55


class Clips(IterableDataset):
    """An endless stream of batches; worker w of W makes batches w, w + W, ..."""

    def __init__(self, encoder: Encoder, curriculum: Curriculum, stream: int, first_step: int = 0) -> None:
        self.encoder, self.curriculum, self.stream, self.first_step = encoder, curriculum, stream, first_step

    def sample(self, step: int) -> Sample:
        """The batch of that step."""
        plan, num_frames = self.curriculum, self.curriculum.num_frames(step)
        count, num_steps = max(plan.steps_a_batch * TEMPORAL // num_frames, 1), num_frames // TEMPORAL
        scenes, rows = [], []
        for clip in range(count):
            seed = (TRAINING, self.stream, step, clip)
            rng = np.random.default_rng((*seed, 1))
            scenes.append(sample_scene(seed, num_frames, plan.max_objects(step)))
            turns = conversation(scenes[-1], rng, num_questions=8, captioned=plan.captioned(step))
            rows.append(self.encoder(chat(turns, text_first=rng.random() < 0.1), num_steps))
        return collate(pack(scenes), rows, self.encoder.tokenizer.pad_token_id)

    def __iter__(self) -> Iterator[Sample]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        step = self.first_step + offset
        while True:
            yield self.sample(step)
            step += stride


def loader(clips: Clips, workers: int) -> DataLoader:
    """Batches in order of step, made by `workers` processes ahead of time."""
    ahead = 4 if workers else None
    return DataLoader(
        clips, batch_size=None, num_workers=workers, prefetch_factor=ahead, pin_memory=torch.cuda.is_available()
    )
