"""What a model family provides, what it hands over, and the registry of families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from specvlm.core.errors import UnsupportedModel
from specvlm.families.messages import Message
from specvlm.families.pixels import Limits
from specvlm.media import Frames


@dataclass(frozen=True)
class Visual:
    """One video or image of the prompt: its token grid."""

    kind: str  # "video" or "image"
    grid: tuple[int, int, int]  # time steps, rows, columns that bound its visual tokens; an image in tiles has 2 steps


@dataclass(frozen=True)
class Inputs:
    """What the model's own forward() and generate() take, made without the model: ids, pixel tensors, grids."""

    input_ids: Tensor  # [S] int64, placeholders already repeated once per visual token
    model_kwargs: dict[str, Any]  # the other keyword arguments, batch dimension included where HF has one
    visuals: tuple[Visual, ...]  # in order of appearance
    text_positions: str = "trained"  # see VideoConfig; each model that takes the inputs has its own training

    def to(self, device: torch.device | str) -> Inputs:
        """Return a copy with every tensor on `device`."""

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(item) for item in value]
            return value.to(device) if isinstance(value, Tensor) else value

        kwargs = {key: moved(value) for key, value in self.model_kwargs.items()}
        return replace(self, input_ids=self.input_ids.to(device), model_kwargs=kwargs)


@dataclass(frozen=True)
class Size:
    """How large a prompt is."""

    num_tokens: int
    frame_pixels: tuple[int, ...]  # of one resized frame of every video and image, in order of appearance


@dataclass(frozen=True)
class Features:
    """What one video or image adds to a prompt. It knows nothing of the prompt, so it may be kept and merged again."""

    rows: Tensor  # [n, D]: an embedding for each token that stands for the visual, newlines included
    deepstack: tuple[Tensor, ...] = ()  # Qwen3-VL: [n, D] each, added after the first layers, one a layer


@dataclass(frozen=True)
class Prompt:
    """A prompt as the language model takes it: merged embeddings and true positions.

    `visual_index`, `grid` describe the V prunable visual tokens, in order of appearance. Tokens that structure the
    video (newlines, timestamps, start and end markers) are not among them and are never pruned.
    """

    input_ids: Tensor  # [S] int64
    embeds: Tensor  # [1, S, D]
    positions: Tensor  # [3, 1, S] for M-RoPE, else [1, S]; int64
    next_position: int  # position of the first generated token: the last token's plus 1, its largest axis
    visual_index: Tensor  # [V] int64, ascending places of the visual tokens in the sequence
    grid: Tensor  # [V, 3] int64: time step, row, column within its own visual
    visual_id: Tensor  # [V] int64: which video or image a visual token belongs to
    deepstack: tuple[Tensor, ...] = ()  # Qwen3-VL: features [V, D] added after the first layers, one a layer
    behind: Tensor | None = None  # [3, 1, 1] int64: each axis of generated tokens, behind next_position; None is 0

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_visual(self) -> int:
        """Number of prunable visual tokens, V."""
        return self.visual_index.shape[0]

    def chunks(self, size: int) -> Iterator[Prompt]:
        """Yield the prompt in equal parts of at most `size` tokens, for a prefill of bounded memory."""
        num = -(-len(self) // size)
        if num == 1:
            yield self
            return
        bounds = [len(self) * part // num for part in range(num + 1)]
        places = torch.tensor(bounds, device=self.visual_index.device)
        visual = torch.searchsorted(self.visual_index, places).tolist()
        for begin, end, first, last in zip(bounds, bounds[1:], visual, visual[1:], strict=False):
            yield replace(
                self,
                input_ids=self.input_ids[begin:end],
                embeds=self.embeds[:, begin:end],
                positions=self.positions[..., begin:end],
                visual_index=self.visual_index[first:last] - begin,
                grid=self.grid[first:last],
                visual_id=self.visual_id[first:last],
                deepstack=tuple(features[first:last] for features in self.deepstack),
            )

    def select(self, keep: Tensor) -> Prompt:
        """Return the prompt with only the visual tokens `keep` (ascending indices into V) and all other tokens.

        Kept tokens keep their original positions, and next_position stays (SpecVLM, section 3).
        """
        if keep.shape[0] == self.num_visual:
            return self
        rows = self.rows(keep)
        return replace(
            self,
            input_ids=self.input_ids[rows],
            embeds=self.embeds[:, rows],
            positions=self.positions[..., rows],
            visual_index=torch.searchsorted(rows, self.visual_index[keep]),
            grid=self.grid[keep],
            visual_id=self.visual_id[keep],
            deepstack=tuple(features[keep] for features in self.deepstack),
        )

    def repacked(self) -> Prompt:
        """Return the prompt with its tokens counted 0, 1, 2, ... in every dimension, as the authors' code does."""
        places = torch.arange(len(self), device=self.positions.device).expand(self.positions.shape)
        return replace(self, positions=places, next_position=len(self), behind=None)

    def rows(self, keep: Tensor) -> Tensor:
        """Return the ascending places [K + S - V] of the visual tokens `keep` and of all other tokens."""
        mask = torch.ones(len(self), dtype=torch.bool, device=self.input_ids.device)
        mask[self.visual_index] = False
        mask[self.visual_index[keep]] = True
        return mask.nonzero().squeeze(1)


@dataclass(frozen=True)
class VideoShape:
    """Square frames, and how many visual tokens a model makes of them."""

    side: int  # pixels
    num_frames: int
    num_tokens: int


class Family(Protocol):
    """Turns messages and frames into a model's inputs, and a model's inputs into a Prompt.

    An instance belongs to one checkpoint: `Family(directory, config, tokenizer)`, where directory is the checkpoint's
    folder, config its HF config and tokenizer its HF tokenizer (with a chat template).
    """

    tokenizer: Any
    group: str  # what drafts for what: target and draft must be of one group
    text_model_type: str  # of the Hugging Face model that is its language model alone
    trained_positions: str  # "qwen" or "transformers": how its model was trained; see VideoConfig.text_positions
    settings: dict[str, Any]  # what decides pixels, grids and placeholders; equal settings give equal Inputs

    def __init__(self, directory: str, config: Any, tokenizer: Any) -> None: ...

    @classmethod
    def video_shape(cls, config: Any, visual_tokens: int) -> VideoShape:
        """Return the frames of which the model of a HF config makes about so many visual tokens."""
        ...

    @classmethod
    def processor_files(cls, config: Any) -> dict[str, dict[str, Any]]:
        """Return the processor files, by name, of a checkpoint with this HF config; no limit on pixels or frames."""
        ...

    def inputs(
        self,
        messages: Sequence[Message],
        media: Sequence[Frames],
        *,
        limits: Sequence[Limits] = (),
        device: torch.device | str = "cpu",
    ) -> Inputs:
        """Return the model's inputs; media stand in order of appearance in the messages, as do their limits, if any.

        Resizing, normalising and patchifying run in torch on `device` and are bit-equal to the HF processors'.
        """
        ...

    def measure(self, messages: Sequence[Message], media: Sequence[Frames], limits: Sequence[Limits] = ()) -> Size:
        """Return how large these inputs would be, without making them."""
        ...

    def check_text(self, messages: Sequence[Message]) -> None:
        """Refuse words that would stand for a video or image, with a ConfigError."""
        ...

    def prepare(self, model: Any) -> None:
        """Serve a loaded HF model, on its device: make pixels in its dtype and its vision tower fast."""
        ...

    def last_turn(self, input_ids: Tensor) -> int:
        """Return where the last user turn begins in a prompt's ids [S]."""
        ...

    def encode_visual(self, model: Any, inputs: Inputs) -> tuple[Features, ...]:
        """Run the vision tower of the HF model; return the features of every visual, in order of appearance.

        Nothing of the request stays behind on the model: any number of threads may call it at once.
        """
        ...

    def positions(self, model: Any, inputs: Inputs) -> Tensor:
        """Return the positions of all tokens, int64: [3, 1, S] for M-RoPE, else [1, S]."""
        ...

    def merge(self, model: Any, inputs: Inputs, features: Sequence[Features]) -> Prompt:
        """Return what reaches the language model: embeddings with the features in their places, and positions."""
        ...


def counting(family: Family, inputs: Inputs) -> str:
    """Return how the text behind a video is counted for one model: "qwen" or "transformers"."""
    return family.trained_positions if inputs.text_positions == "trained" else inputs.text_positions


_FAMILIES: dict[str, type[Family]] = {}


def family(*model_types: str) -> Callable[[type], type]:
    """Register a Family class under the model_type of each HF config that it serves."""

    def add(cls: type) -> type:
        _FAMILIES.update(dict.fromkeys(model_types, cls))
        return cls

    return add


def family_for(model_type: str) -> type[Family]:
    """Return the Family class of a model_type.

    Raises:
        UnsupportedModel: no family serves it; the message lists the known ones.
    """
    if model_type not in _FAMILIES:
        raise UnsupportedModel(f"model_type {model_type!r} is not supported: known are {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[model_type]
