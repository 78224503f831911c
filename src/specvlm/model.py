"""VideoLM = Hugging Face model + family + KV cache: encode, prefill, step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import logging as hf_logging

from specvlm import attention, tree
from specvlm.cache import KVCache
from specvlm.errors import CapacityError, ConfigError, UnsupportedModel
from specvlm.families import Family, Inputs, Prompt, family_for


class VideoLM:
    """One loaded model. It holds no request's state, so requests may interleave on it and it may draft for itself."""

    def __init__(self, hf: Any, family: Family, *, name: str = "") -> None:
        text = hf.config.get_text_config()
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise UnsupportedModel(
                f"{name}: sliding-window attention is not supported: set use_sliding_window to false"
            )
        hf.set_attn_implementation({"text_config": attention.NAME})
        self.hf = hf.eval()
        self.family = family
        self.name = name
        self.tokenizer = family.tokenizer
        self.model_type: str = hf.config.model_type
        self.device: torch.device = hf.lm_head.weight.device
        self.vocab_size: int = hf.lm_head.weight.shape[0]
        self.context_len: int = text.max_position_embeddings
        self.eos_ids = _eos_ids(hf, self.tokenizer)
        self.repetition_penalty = float(hf.generation_config.repetition_penalty or 1.0)  # what generate() would apply

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto") -> VideoLM:
        """Load a Hugging Face directory or hub id.

        Args:
            name: directory or hub id.
            device: "auto" is cuda where there is one, else cpu.
            dtype: "auto" is bfloat16 on a GPU and float32 on a CPU, or float32, bfloat16, float16.

        Raises:
            UnsupportedModel: the checkpoint cannot be found, read or served.
            ConfigError: device or dtype is not allowed.
        """
        name = os.fspath(name)
        place = resolve_device(device)
        number = resolve_dtype(dtype, place)
        family_type = family_for(_model_type(name))
        directory = _directory(name)
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            hf: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=number)
        except (OSError, ValueError) as error:
            raise UnsupportedModel(f"cannot load {name}: {_first_line(error)}") from error
        family = family_type(directory, hf.config, tokenizer)
        try:
            return cls(hf.to(place), family, name=name)
        except torch.OutOfMemoryError as error:
            raise CapacityError(f"{name} does not fit on {place}: {_first_line(error)}") from error

    @torch.inference_mode()
    def encode(self, inputs: Inputs) -> Prompt:
        """Run the vision tower; return the prompt as the language model takes it."""
        return self.family.merged(self.hf, inputs.to(self.device))

    @torch.inference_mode()
    def start(
        self, prompt: Prompt, max_new_rows: int, score_rows: Tensor | None = None
    ) -> tuple[Session, Tensor, Tensor]:
        """Prefill a prompt and score its visual tokens on the way (SpecVLM, section 3.2).

        The paper runs the text after the video in a pass of its own; here the attention function scores within the one
        pass, which saves reading all weights twice.

        Args:
            prompt: S tokens of which V are visual.
            max_new_rows: room for new tokens and one tree, in rows.
            score_rows: [R] int64 places in the prompt whose attention scores the visual tokens; None scores nothing.

        Returns:
            The session, the logits [vocab] after the prompt, and the scores [V] float32 (zeros where none were asked).
        """
        session = Session(self, prompt, len(prompt) + max_new_rows)
        if score_rows is None:
            return (
                session,
                session.prefill(prompt, attention.Plan()),
                torch.zeros(prompt.num_visual, device=self.device),
            )
        scores = attention.Scores(prompt.visual_index, score_rows)
        return session, session.prefill(prompt, attention.Plan(scores=scores)), scores.mean

    def forward(self, embeds: Tensor, positions: Tensor, cache: KVCache, plan: attention.Plan, **extras: Any) -> Tensor:
        """Run the language model over new rows [1, T, D]; return its hidden states [T, D] and store the rows."""
        out = self.hf.model.language_model(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True, plan=plan, **extras
        )
        cache.advance(embeds.shape[1])
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocab] float32 of hidden states [..., D]."""
        logits: Tensor = self.hf.lm_head(hidden)
        return logits.float()

    @contextmanager
    def stock_attention(self) -> Iterator[None]:
        """Give the Hugging Face model its own attention back, as the oracle that this engine is compared with."""
        self.hf.set_attn_implementation({"text_config": "sdpa"})
        try:
            yield
        finally:
            self.hf.set_attn_implementation({"text_config": attention.NAME})

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [1, N, D] of text tokens [N]."""
        embeds: Tensor = self.hf.get_input_embeddings()(tokens[None])
        return embeds


class Session:
    """One request on one model: its KV cache, where its next token stands, and the tree behind the known rows."""

    def __init__(self, model: VideoLM, prompt: Prompt, capacity: int) -> None:
        self.model = model
        self.cache = KVCache(capacity)
        self.length = 0  # rows of the prompt and of the text; rows of the cache behind them belong to the tree
        self.position = prompt.next_position
        self._prompt_len = len(prompt)
        self._is_3d = prompt.positions.dim() == 3
        self._parents: list[int] = []  # of the tree rows

    def prefill(self, prompt: Prompt, plan: attention.Plan) -> Tensor:
        """Store the rows of the prompt; return the logits [vocab] after the last one."""
        extras: dict[str, Any] = {}
        if prompt.deepstack:
            is_visual = torch.zeros(1, len(prompt), dtype=torch.bool, device=prompt.visual_index.device)
            is_visual[0, prompt.visual_index] = True
            extras = {"visual_pos_masks": is_visual, "deepstack_visual_embeds": list(prompt.deepstack)}
        hidden = self.model.forward(prompt.embeds, prompt.positions, self.cache, plan, **extras)
        self.length = self.cache.length
        return self.model.logits(hidden[-1])

    @torch.inference_mode()
    def step(self, tokens: Tensor, parents: Sequence[int]) -> Tensor:
        """Run N tree rows in one pass; return their logits [N, vocab] float32.

        Args:
            tokens: [N] int64.
            parents: of each row: a tree row (of this or an earlier step since the last `keep`), -1 for the known text.
        """
        before = len(self._parents)
        self._parents += parents
        device = self.model.device
        sees = tree.ancestors(torch.tensor(self._parents))[before:]
        positions = (self.position - 1 + sees.sum(1)).to(device)
        shape = (3, 1, -1) if self._is_3d else (1, -1)
        is_chain = before == 0 and list(parents) == list(range(-1, len(parents) - 1))
        plan = attention.Plan(tree=None if is_chain else sees.to(device))
        hidden = self.model.forward(self.model.embed(tokens), positions.expand(shape), self.cache, plan)
        return self.model.logits(hidden)

    def rollback(self) -> None:
        """Go back to the end of the prompt."""
        self.cache.rollback(self._prompt_len)
        self.position -= self.length - self._prompt_len
        self.length = self._prompt_len
        self._parents = []

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Make the tree rows `rows` (one path, from the root down) part of the text; forget the other tree rows."""
        self.cache.keep(self.length, rows)
        self.length += len(rows)
        self.position += len(rows)
        self._parents = []


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a setting.

    Raises:
        ConfigError: it does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} is not available: {_first_line(error)}; try auto or cpu") from error
    return place


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a setting.

    Raises:
        ConfigError: it is unknown.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in names:
        raise ConfigError(f"dtype={dtype!r} is not allowed: auto, {', '.join(names)}")
    return names[dtype]


def check_pair(target: VideoLM, draft: VideoLM) -> None:
    """Refuse a draft that cannot propose for the target.

    Padding of the vocabulary may differ: token ids are compared, not sizes.

    Raises:
        UnsupportedModel: another model_type or another tokenizer; the first differing entry is named.
    """
    if draft is target:
        return
    if draft.model_type != target.model_type:
        raise UnsupportedModel(
            f"draft {draft.name} is a {draft.model_type}, target {target.name} a {target.model_type}: "
            "choose a draft of the target's family"
        )
    words = {index: token for token, index in target.tokenizer.get_vocab().items()}
    others = {index: token for token, index in draft.tokenizer.get_vocab().items()}
    if words != others:
        first = min(index for index in words.keys() | others.keys() if words.get(index) != others.get(index))
        raise UnsupportedModel(
            f"the tokenizers of target and draft differ: token {first} is {words.get(first)!r} in {target.name} "
            f"and {others.get(first)!r} in {draft.name}"
        )
    ours, theirs = _flat(target.family.settings), _flat(draft.family.settings)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UnsupportedModel(
                f"target and draft see a video differently: {key} is {ours.get(key)} in {target.name} "
                f"and {theirs.get(key)} in {draft.name}; choose a draft with the target's processor"
            )


# What a draft may have otherwise: it reads the pixels and ids that the target's settings made.
_FREE_SETTINGS = frozenset(
    ("size", "min_pixels", "max_pixels", "cap_pixels_per_frame", "max_video_tokens", "resample", "chat_template")
)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, without those that a draft may have otherwise."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in _FREE_SETTINGS:
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _directory(name: str) -> str:
    """Return the folder with a checkpoint's processor files; a hub id's are fetched or found in the cache."""
    if os.path.isdir(name):
        return name
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.jinja"])
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"cannot fetch the processor files of {name}: {_first_line(error)}") from error


def _model_type(name: str) -> str:
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no hub id
        raise UnsupportedModel(f"there is no directory {name}: give a Hugging Face directory or hub id")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"cannot read a model at {name}: {_first_line(error)}; give a Hugging Face directory or hub id"
        ) from error
    if "model_type" not in config:
        raise UnsupportedModel(f"{name} has no config.json with a model_type: give a Hugging Face directory or hub id")
    return str(config["model_type"])


def _eos_ids(hf: Any, tokenizer: Any) -> frozenset[int]:
    """Return every id that ends a text: the generation config's, else the config's, else the tokenizer's."""
    generation: GenerationConfig = hf.generation_config
    eos = generation.eos_token_id
    if eos is None:
        eos = hf.config.get_text_config().eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
