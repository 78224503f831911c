"""VideoLM = Hugging Face model + family + KV cache: encode, prefill, step."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from specvlm.core import checks
from specvlm.core.ambient import neutral
from specvlm.core.config import shown
from specvlm.core.errors import ConfigError, UnsupportedModel, one_line
from specvlm.core.names import QUANTS
from specvlm.core.plain import is_patched
from specvlm.core.rows import Rows
from specvlm.families import Family, Features, Inputs, Prompt
from specvlm.kernels.quant import is_served, quantize
from specvlm.runtime import attention
from specvlm.runtime.checkpoint import Checkpoint, refusals
from specvlm.runtime.decoder import Decoder, Weight, is_supported
from specvlm.runtime.graphs import Workspaces, on
from specvlm.runtime.rules import Rules
from specvlm.runtime.session import FusedSession, HFSession, Session


class VideoLM:
    """One loaded model. It holds no request's state, so requests may interleave on it and it may draft for itself."""

    def __init__(self, hf: Any, family: Family, *, name: str = "") -> None:
        text = hf.config.get_text_config()
        check_text(text, name)
        self.device: torch.device = _device_of(hf, name)
        _settle(hf, name)
        hf.set_attn_implementation({"text_config": attention.NAME})
        self.hf = hf.eval()
        self.family = family
        family.prepare(hf)
        self.name = name
        self.tokenizer = family.tokenizer
        self.model_type: str = hf.config.model_type
        embeddings = hf.get_input_embeddings().weight  # of the model's own type, whatever became of the other weights
        self.vocab_size: int = hf.lm_head.out_features
        self.context_len: int = text.max_position_embeddings
        language_model = hf.model.language_model
        is_fused = is_supported(language_model, hf.lm_head, self.device)
        self.decoder = Decoder(language_model) if is_fused else None  # else the modules run as they are
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.num_layers = int(text.num_hidden_layers)
        self.kv_shape = (self.num_layers, int(text.num_key_value_heads), int(head_dim))  # layers, heads, d
        self.quant: str | None = None  # format of the language layers' weights
        self.head: Weight = getattr(hf.lm_head, "weight", embeddings)  # [vocab, D]; fused layers alone read it
        self.dtype: torch.dtype = embeddings.dtype
        self.workspaces = Workspaces(self.kv_shape, self.dtype, self.device)
        self._rows: dict[tuple[tuple[int, ...], int], Rows] = {}
        _check_rotary(hf, int(head_dim), is_3d=bool(getattr(family, "is_mrope", False)), name=name)
        self.eos_ids = _eos_ids(hf, self.tokenizer, name)
        self.rules = Rules(hf, name, self.eos_ids, self.vocab_size)  # of its generation_config.json

    @classmethod
    @neutral()
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        watch: Callable[[str], None] = lambda text: None,
    ) -> VideoLM:
        """Load a Hugging Face directory or hub id, its weights straight to their device.

        Args:
            name: directory or hub id.
            device: "auto" is cuda where there is one, else cpu.
            dtype: "auto" is bfloat16 on a GPU and float32 on a CPU, or float32, bfloat16, float16.
            watch: told now and then, in words, how far it is.

        Raises:
            CapacityError: it does not fit.
            UnsupportedModel: the checkpoint cannot be found, read or served.
            ConfigError: device or dtype is not allowed.
        """
        name = os.fspath(name)
        place = resolve_device(device)
        number = resolve_dtype(dtype, place)
        with refusals(name, place):
            checkpoint = Checkpoint.open(name)
            check_text(checkpoint.config.get_text_config(), name)
            family = checkpoint.family(checkpoint.directory, checkpoint.config, checkpoint.tokenizer)
            checkpoint.rehearse(family)
            checkpoint.fetch()
            with _progress(name, checkpoint.directory, place, watch):
                hf = checkpoint.read(place, number)
            return cls(hf, family, name=name)

    @torch.inference_mode()
    def encode_visual(self, inputs: Inputs) -> tuple[Features, ...]:
        """Run the vision tower; return the features of every video and image, which may be kept and merged again."""
        with on(self.device):
            return self.family.encode_visual(self.hf, inputs.to(self.device))

    @torch.inference_mode()
    def merge(self, inputs: Inputs, features: Sequence[Features]) -> Prompt:
        """Return the prompt as the language model takes it, with the features of its videos and images."""
        with on(self.device):
            return self.family.merge(self.hf, inputs.to(self.device), features)

    def encode(self, inputs: Inputs) -> Prompt:
        """Return the prompt as the language model takes it: `encode_visual` and `merge`."""
        return self.merge(inputs, self.encode_visual(inputs))

    @torch.inference_mode()
    def start(
        self,
        prompt: Prompt,
        max_new_rows: int,
        *,
        score_from: int | None = None,
        score_layers: Collection[int] | None = None,
        eager: bool = False,
    ) -> tuple[Session, Tensor, Tensor]:
        """Prefill a prompt and score its visual tokens on the way (SpecVLM, section 3.2).

        The paper runs the text after the video in a pass of its own; here the attention function scores within the one
        pass, which saves reading all weights twice.

        Args:
            prompt: S tokens of which V are visual.
            max_new_rows: room for new tokens and one tree, in rows.
            score_from: the first text row whose attention scores the visual tokens, behind the last of them; None
                scores nothing.
            score_layers: the decoder layers that score; None is all of them.
            eager: run the Hugging Face modules as they are, here and in the session's steps.

        Returns:
            The session, the logits [vocab] after the prompt, and the scores [V] float32 (zeros where none were asked).
        """
        session = self._session_type(eager)(self, prompt, len(prompt) + max_new_rows)
        if score_from is None:
            return (
                session,
                session.prefill(prompt, None),
                torch.zeros(prompt.num_visual, dtype=torch.float32, device=self.device),
            )
        scores = attention.Scores(prompt.visual_index, score_from, score_layers)
        return session, session.prefill(prompt, scores), scores.mean

    @torch.inference_mode()
    def branch(
        self, prompt: Prompt, session: Session, rows: Tensor, max_new_rows: int, *, eager: bool = False
    ) -> Session:
        """Start a session from another one of the same layers, whose keys and values it copies: no prefill.

        Args:
            prompt: what the new session starts with.
            session: holds the prompt, pruned or not.
            rows: [len(prompt)] int64, the rows of the prompt in that session's cache.
            max_new_rows: room for new tokens and one tree, in rows.
            eager: as in `start`.
        """
        new = self._session_type(eager)(self, prompt, len(prompt) + max_new_rows)
        new.position -= len(prompt)  # the copied rows are counted
        new.copy_rows(session, rows)
        return new

    def _session_type(self, eager: bool) -> type[Session]:
        return HFSession if self.decoder is None or (eager and self.quant is None) else FusedSession

    @neutral()
    def quantised(self, format: str, *, keep_original: bool = True) -> VideoLM:
        """Return a copy whose language layers and output head are weight-only quantised, for drafting.

        Vision tower, embeddings, norms and biases are shared. The head has 8 bits at least.

        Args:
            format: one of `specvlm.core.names.QUANTS`.
            keep_original: False frees the original's language layers, which can then not run any more.

        Raises:
            ConfigError: the format is unknown, or this device has no kernel for it.
            UnsupportedModel: the layers are none that the fused decoder serves.
        """
        check_quant(format, self.device)
        if self.decoder is None:
            raise UnsupportedModel(f"{self.name}: these layers cannot be quantised: leave draft_quant out")
        other = copy.copy(self)
        with on(self.device), torch.no_grad():
            other.decoder = self.decoder.quantised(format)
            other.head = quantize(self.hf.lm_head.weight, "fp8" if format == "int4" else format)
        other.quant = format
        other.workspaces = Workspaces(self.kv_shape, self.dtype, self.device)
        if not keep_original:
            self.decoder = None
            _free_language_layers(self.hf)
        return other

    def rows(self, parents: tuple[int, ...], count: int) -> Rows:
        """Return what the last `count` rows of a tree see, made once a shape."""
        if (parents, count) not in self._rows:
            self._rows[parents, count] = Rows.of(parents, count, self.device)
        return self._rows[parents, count]

    def stock(self) -> Any:
        """Return transformers' own model over the same weights and vision tower: the oracle, for one caller.

        It is a copy of everything but the weights, so that its attention, and what generate() notes on it, concern
        nobody else.
        """
        language_model = self.hf.model.language_model
        shared: list[Any] = [*self.hf.parameters(), *self.hf.buffers()]
        shared += [child for child in self.hf.model.children() if child is not language_model]
        copied = copy.deepcopy(self.hf, {id(each): each for each in shared})
        copied.set_attn_implementation({"text_config": "sdpa"})
        return copied

    @property
    def step_bytes(self) -> int:
        """The bytes of weights that one step reads: the language layers, the last norm and the output head.

        The embedding table counts only where it is the head too, and the vision tower not at all.
        """
        if self.decoder is not None:
            return int(self.decoder.nbytes + self.head.nbytes)
        table: Tensor = self.hf.get_input_embeddings().weight
        language = [weight for weight in self.hf.model.language_model.parameters() if weight is not table]
        return int(sum(weight.nbytes for weight in language) + self.head.nbytes)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [1, N, D] of text tokens [N]."""
        embeds: Tensor = self.hf.get_input_embeddings()(tokens[None])
        return embeds


def check_text(text: Any, name: str) -> None:
    """Refuse a language model in which a row's result depends on more than the rows that it sees.

    Args:
        text: the text part of a Hugging Face config.
        name: of the checkpoint.

    Raises:
        UnsupportedModel: it attends within a sliding window, or its rotary embedding depends on how long a pass is, so
            that keys stored by one pass are not those of another.
    """
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise UnsupportedModel(f"{name}: sliding-window attention is not supported: set use_sliding_window to false")
    for kind in _rope_types(getattr(text, "rope_parameters", None) or {}):
        if kind == "longrope" or "dynamic" in kind:  # what transformers' dynamic_rope_update acts upon
            problem = f"rope_type {kind!r} is not supported: its angles depend on the length of a pass"
            raise UnsupportedModel(f"{name}: {problem}; yarn, linear and llama3 do not")


def _rope_types(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Yield the types of rotary embeddings in a config, which has one for all layers or one a kind of layer."""
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif key in ("rope_type", "type"):
            yield str(value)


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a setting, a GPU's with its number.

    Raises:
        ConfigError: it does not exist here.
    """
    if not isinstance(device, str | torch.device):
        raise ConfigError(f"device={shown(device)} is not allowed: auto, cpu, cuda, or cuda:1 and so on")
    if isinstance(device, str):
        checks.device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.cpu()  # a device without memory, such as meta, computes nothing
        place = probe.device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={shown(device)} is not available: {_first_line(error)}; try auto or cpu") from error
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={shown(device)} is not served: choose auto, cpu, cuda, or cuda:1 and so on")
    return place if place.type == "cuda" else torch.device("cpu")


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a setting.

    Raises:
        ConfigError: it is unknown.
    """
    checks.dtype(dtype)
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found: torch.dtype = getattr(torch, dtype)
    return found


def check_quant(format: str, device: torch.device) -> None:
    """Refuse a quantisation that is unknown or has no kernel on a device.

    Raises:
        ConfigError: the formats that would do are named.
    """
    checks.quant(format)
    if not is_served(format, device):
        served = [other for other in QUANTS if is_served(other, device)]
        remedy = f"choose {' or '.join(served)}, or leave it out" if served else "leave it out"
        raise ConfigError(f"draft_quant={format!r} has no kernel for {device}: {remedy}")


@torch.no_grad()
def _free_language_layers(hf: Any) -> None:
    """Give back the memory of a Hugging Face model's language layers and of a head of its own."""
    layers = hf.model.language_model.layers
    gone = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    if hf.lm_head.weight is not hf.get_input_embeddings().weight:
        gone.append(hf.lm_head)
    for module in gone:
        module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
    if hf.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _progress(name: str, directory: str, place: torch.device, watch: Callable[[str], None]) -> Iterator[None]:
    """Tell `watch` how much of a checkpoint has arrived on a GPU, twice a second, while the block loads it."""
    watch(f"loading {name}...")
    total = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) / 1e9
    if place.type != "cuda" or not total:
        yield
        return
    before, is_done = torch.cuda.memory_allocated(place), threading.Event()

    def report() -> None:
        while not is_done.wait(0.5):
            there = (torch.cuda.memory_allocated(place) - before) / 1e9
            watch(f"loading {name}: {min(there, total):.1f} of {total:.1f} GB")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()


def _device_of(hf: Any, name: str) -> torch.device:
    """Return the one device on which all weights lie.

    Raises:
        UnsupportedModel: there are several, or some weights are offloaded.
    """
    devices: set[torch.device] = {weight.device for weight in hf.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        places = ", ".join(sorted(map(str, devices)))
        raise UnsupportedModel(f"{name}: its weights lie on {places}: load it on one device")
    return devices.pop()


@torch.no_grad()
def _settle(hf: Any, name: str) -> None:
    """Let what waits for a model's first call happen, as compressed-tensors' unpacking does.

    Raises:
        UnsupportedModel: its hooks, or its forward function, want to see every call; only its parts are called here.
    """
    whole = (hf, hf.model)
    if any(is_patched(module) for module in whole):
        hf(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=hf.get_input_embeddings().weight.device))
    if any(is_patched(module) for module in whole):
        raise UnsupportedModel(
            f"{name}: hooks or a forward function of the whole model are not called here: take them off"
        )


def _check_rotary(hf: Any, head_dim: int, *, is_3d: bool, name: str) -> None:
    """Refuse a rotary embedding that is not made for whole heads of this width.

    Raises:
        UnsupportedModel: its settings are told.
    """
    embeds = hf.get_input_embeddings().weight[:1][None]
    positions = torch.zeros((3, 1, 1) if is_3d else (1, 1), dtype=torch.int64, device=embeds.device)
    try:
        width = hf.model.language_model.rotary_emb(embeds, positions)[0].shape[-1]
        problem = f"turn {width} numbers of a head"
    except Exception as error:
        width, problem = 0, f"do not work ({one_line(error)[:200]})"
    if width != head_dim:
        settings = getattr(hf.config.get_text_config(), "rope_parameters", None)
        raise UnsupportedModel(f"{name}: its rope_parameters={settings} {problem}, not all {head_dim}")


def _eos_ids(hf: Any, tokenizer: Any, name: str) -> frozenset[int]:
    """Return every id that ends a text: the generation config's, else the config's, else the tokenizer's.

    Raises:
        UnsupportedModel: they are no ids.
    """
    generation: GenerationConfig = hf.generation_config
    eos = generation.eos_token_id
    if eos is None:
        eos = hf.config.get_text_config().eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    ids = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    if not all(type(token) is int for token in ids):
        problem = f"eos_token_id={eos!r} is no token id, nor a list of them"
        raise UnsupportedModel(f"{name}: {problem}; mend its generation_config.json or config.json")
    return frozenset(ids)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
