"""What all families share: chat template, placeholders, tokens, and how features and ids become a prompt."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError
from torch import Tensor

from specvlm.core.errors import ConfigError, UnsupportedModel, one_line
from specvlm.families.base import Features, Inputs, Prompt, Size, Visual
from specvlm.families.messages import Message, parse, texts
from specvlm.families.pixels import Limits, read_json
from specvlm.media import Frames

_KINDS = ("image", "video")
_TYPE_ID = {"image": 1, "video": 2}  # HF's mm_token_type_ids


@dataclass(frozen=True)
class Encoded:
    """One video or image, ready for the model."""

    visual: Visual
    pixels: Tensor  # as the vision tower takes them
    text: str  # what stands for it in the prompt: one placeholder token a run of visual tokens
    runs: tuple[int, ...]  # tokens that each of these placeholders stands for
    extra: Any = None  # what the family's model_kwargs need besides
    frame_pixels: int = 0  # of one resized frame


def chat_template(directory: str, tokenizer: Any) -> str:
    """Return the checkpoint's chat template; the processor's files win over the tokenizer's, as in HF's processors.

    Raises:
        UnsupportedModel: there is none.
    """
    raw = Path(directory) / "chat_template.jinja"
    found = (
        read_json(directory, "processor_config.json").get("chat_template")
        or (raw.read_text(encoding="utf-8") if raw.is_file() else None)
        or read_json(directory, "chat_template.json").get("chat_template")
        or getattr(tokenizer, "chat_template", None)
    )
    if isinstance(found, dict):
        found = found.get("default")
    if not found:
        raise UnsupportedModel(
            f"{directory} has no chat template: save the one of its instruction-tuned version there as "
            "chat_template.jinja"
        )
    return str(found)


def cells(times: int, rows: int, columns: int, *, first_time: int = 0) -> Tensor:
    """Return the (time, row, column) of every cell of a grid in reading order, [times * rows * columns, 3] int64."""
    axes = torch.arange(first_time, first_time + times), torch.arange(rows), torch.arange(columns)
    return torch.cartesian_prod(*axes).view(-1, 3)


class VisionFamily(ABC):
    """A Family whose prompt carries one placeholder token per visual token. Subclasses fill in the pixels."""

    text_model_type: str = "qwen2"  # see Family
    is_mrope: ClassVar[bool]  # positions are (time, height, width)
    trained_positions: str = "qwen"  # see Family; both are the same where no setting of a family decides
    pixel_dtype: torch.dtype = torch.float32  # of the pixels in Inputs; a model rounds them to its own first of all

    def __init__(self, directory: str, config: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.group: str = config.model_type  # see Family
        self._template = chat_template(directory, tokenizer)
        self._ids = {"image": int(config.image_token_id), "video": int(config.video_token_id)}
        self._tokens = {kind: str(tokenizer.convert_ids_to_tokens(self._ids[kind])) for kind in _KINDS}
        self._placeholder = re.compile("|".join(f"(?P<{kind}>{re.escape(self._tokens[kind])})" for kind in _KINDS))
        self.settings: dict[str, Any] = {
            "model_type": config.model_type,
            "chat_template": self._template,
            "placeholder_ids": dict(self._ids),
        }

    @abstractmethod
    def _encode(self, media: Sequence[Frames], limits: Sequence[Limits], device: torch.device | str) -> list[Encoded]:
        """Return what the model takes for each of the media, in their order, with limits of its own."""

    @abstractmethod
    def _model_kwargs(self, kind: str, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """Return the keyword arguments of HF's forward() for all (one or more) media of a kind."""

    @abstractmethod
    def _layouts(self, inputs: Inputs) -> list[Tensor]:
        """Return [n, 3] for each visual: the (time, row, column) of its n tokens; -1 where one must not be pruned."""

    def inputs(
        self,
        messages: Sequence[Message],
        media: Sequence[Frames],
        *,
        limits: Sequence[Limits] = (),
        device: torch.device | str = "cpu",
    ) -> Inputs:
        """Return the model's inputs (see Family.inputs); media stand in order of appearance in the messages.

        Raises:
            ConfigError: media and placeholders do not match, or a limit cannot be kept.
            MediaError: a frame has a shape that the model refuses.
        """
        ids, order = self._encoded(messages, media, limits, device)
        ids = ids.to(device)
        kwargs: dict[str, Any] = {}
        for kind in _KINDS:
            if chosen := [e for e in order if e.visual.kind == kind]:
                kwargs |= self._model_kwargs(kind, chosen)
        if self.is_mrope:
            kwargs["mm_token_type_ids"] = self._type_ids(ids)[None]
        return Inputs(ids, kwargs, tuple(e.visual for e in order))

    def measure(self, messages: Sequence[Message], media: Sequence[Frames], limits: Sequence[Limits] = ()) -> Size:
        """Return how large these inputs would be: all is done but the work on pixels.

        Arguments are those of `inputs`.
        """
        hollow = [replace(frames, pixels=frames.pixels.to("meta")) for frames in media]
        ids, order = self._encoded(messages, hollow, limits, "meta")
        queues = {kind: [e.frame_pixels for e in order if e.visual.kind == kind] for kind in _KINDS}
        return Size(ids.shape[0], tuple(queues[frames.kind].pop(0) for frames in media))

    def _encoded(
        self, messages: Sequence[Message], media: Sequence[Frames], limits: Sequence[Limits], device: torch.device | str
    ) -> tuple[Tensor, list[Encoded]]:
        """Return the prompt's ids [S] and its encoded media, in order of appearance."""
        text = self._render(messages)
        self._check_media(text, media)
        encoded = self._encode(media, limits or [Limits()] * len(media), device)
        queues = {kind: [e for e in encoded if e.visual.kind == kind] for kind in _KINDS}
        order = [queues[kind].pop(0) for kind in self._found(text)]
        return self._token_ids(text, order), order

    def last_turn(self, input_ids: Tensor) -> int:
        """Return where the last user turn begins; all these families write ChatML, whose last turn opens the answer."""
        turns = (input_ids == self.tokenizer.convert_tokens_to_ids("<|im_start|>")).nonzero().squeeze(1)
        return int(turns[-2]) if turns.shape[0] >= 2 else 0

    def prepare(self, model: Any) -> None:
        """Serve a loaded HF model, on its device: make pixels in its dtype and its vision tower fast.

        Args:
            model: the HF ...ForConditionalGeneration; its results stay the same.
        """
        self.pixel_dtype = model.dtype

    @abstractmethod
    def encode_visual(self, model: Any, inputs: Inputs) -> tuple[Features, ...]:
        """Run the vision tower of a loaded HF model; see Family."""

    def positions(self, model: Any, inputs: Inputs) -> Tensor:
        """Return the positions [1, S] of all tokens, on the device of the ids: they count up."""
        return torch.arange(inputs.input_ids.shape[0], device=inputs.input_ids.device)[None]

    @torch.no_grad()
    def merge(self, model: Any, inputs: Inputs, features: Sequence[Features]) -> Prompt:
        """Return the prompt of a loaded HF model's language model; see Family.

        Args:
            model: the HF ...ForConditionalGeneration.
            inputs: of the prompt.
            features: of its visuals, in order of appearance, from `encode_visual`.

        Raises:
            ConfigError: the features are not those of the prompt's visuals.
        """
        embedding = model.get_input_embeddings()
        ids = inputs.input_ids.to(embedding.weight.device)
        places = self._type_ids(ids).nonzero().squeeze(1)
        layouts = self._layouts(inputs)
        _check_features(features, [len(layout) for layout in layouts])
        embeds = embedding(ids)
        for where, each in zip(torch.split(places, [len(one.rows) for one in features]), features, strict=True):
            embeds[where] = each.rows.to(embeds)
        layout, owner = _joined_layouts(layouts, ids.device)
        prunable = layout[:, 0] >= 0
        positions = self.positions(model, inputs).to(ids.device)
        last = positions[..., -1]
        return Prompt(
            input_ids=ids,
            embeds=embeds[None],
            positions=positions,
            next_position=int(last.max()) + 1,
            visual_index=places[prunable],
            grid=layout[prunable],
            visual_id=owner[prunable],
            deepstack=tuple(_one(layer) for layer in zip(*(each.deepstack for each in features), strict=True)),
            behind=(last.max() - last)[..., None] if bool((last != last.max()).any()) else None,
        )

    def _render(self, messages: Sequence[Message]) -> str:
        """Return the prompt's text with one placeholder a video or image, ready for the answer.

        A last message of the assistant is what the answer goes on from.

        Raises:
            ConfigError: the messages are malformed, or the chat template refuses them or leaves out what they say.
        """
        given, _ = parse(messages)
        problem = ""
        for plain in (given, [_with_list(message) for message in given], [_with_string(message) for message in given]):
            try:
                text = self._apply(plain)
            except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
                problem = problem or f"the model's chat template refuses these messages: {one_line(error)}"
                continue
            left_out = _left_out(given, text) if "messages" in self._template else ""
            if not left_out:
                return text
            problem = problem or f"the model's chat template leaves out {left_out}: it may be one for text alone"
        raise ConfigError(problem)

    def _apply(self, plain: Sequence[Message]) -> str:
        is_continued = bool(plain) and plain[-1]["role"] == "assistant"
        options = {"add_generation_prompt": not is_continued, "continue_final_message": is_continued}
        template = {"chat_template": self._template, "tokenize": False}
        return str(self.tokenizer.apply_chat_template(plain, **template, **options))

    def check_text(self, messages: Sequence[Message]) -> None:
        """Refuse words that would stand for a video or image, where these are parts of their own.

        Raises:
            ConfigError: there are some; the token is named.
        """
        for number, message in enumerate(messages):
            matches = [self._placeholder.search(text) for text in texts(message)]
            if found := next((match for match in matches if match), None):
                problem = f"messages[{number}]: the text holds {found[0]!r}, which stands for a video or image"
                raise ConfigError(f"{problem} in this model: leave it out, they are parts of their own")

    def _found(self, text: str) -> list[str]:
        """Return the kind of every placeholder in the text."""
        return [str(match.lastgroup) for match in self._placeholder.finditer(text)]

    def _check_media(self, text: str, media: Sequence[Frames]) -> None:
        found = self._found(text)
        for kind in _KINDS:
            given, wanted = sum(frames.kind == kind for frames in media), found.count(kind)
            if given != wanted:
                places = f"the messages have {wanted} places for one ({self._tokens[kind]})"
                hint = ": the chat template may be one for text alone" if wanted < given else ""
                raise ConfigError(f"{given} {kind}s are given but {places}{hint}")

    def _token_ids(self, text: str, order: Sequence[Encoded]) -> Tensor:
        """Return the ids of the text, each placeholder repeated once per visual token; int64 [S]."""
        texts = iter(order)
        text = self._placeholder.sub(lambda _: next(texts).text, text)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        repeats = torch.ones_like(ids)
        repeats[self._type_ids(ids) > 0] = torch.tensor([run for e in order for run in e.runs], dtype=torch.int64)
        return torch.repeat_interleave(ids, repeats)

    def _type_ids(self, ids: Tensor) -> Tensor:
        """Return 0 for text, 1 for image and 2 for video placeholders; int64, shape of ids."""
        types = torch.zeros_like(ids)
        for kind in _KINDS:
            types[ids == self._ids[kind]] = _TYPE_ID[kind]
        return types


def _with_list(message: Message) -> Message:
    """Return a message with its text as a list of one part, which some templates expect."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _with_string(message: Message) -> Message:
    """Return a message of text alone with a plain string, as templates for text only expect it."""
    content = message["content"]
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _left_out(messages: Sequence[Message], text: str) -> str:
    """Return the words of a user or of the system that a rendered prompt lacks, or ""."""
    for content in (message["content"] for message in messages if message["role"] in ("system", "user")):
        parts = [{"text": content}] if isinstance(content, str) else content
        for part in parts:
            words = part.get("text", "")
            if words.strip() not in text or str(part) in text:  # a list put into text is no list that it takes
                return repr(words[:60]) if words else f"a message's {part['type']}"
    return ""


def _check_features(features: Sequence[Features], lengths: Sequence[int]) -> None:
    """Refuse features of other visuals than the prompt's.

    Raises:
        ConfigError: their numbers differ.
    """
    found = [len(each.rows) for each in features]
    if found != list(lengths):
        problem = f"features of {found} tokens do not fit a prompt whose visuals have {list(lengths)}"
        raise ConfigError(f"{problem}: give those that encode_visual made of these inputs, in their order")


def _joined_layouts(layouts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cell [n, 3] and the visual's number [n] of every placeholder token."""
    lengths = torch.tensor([len(layout) for layout in layouts], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(layouts)), lengths)
    layout = torch.cat([*layouts, torch.empty(0, 3, dtype=torch.int64)])
    return layout.to(device), owner.to(device)


def _one(rows: Sequence[Tensor]) -> Tensor:
    """Return the rows of all visuals together; those of one alone are not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
