"""A checkpoint: where it lies, what its files say, and the Hugging Face model that is made of it.

What config, tokenizer and the headers of the weights tell is told before any weight is read: transformers fills weights
that are missing with random numbers and leaves out those that it does not know. Whatever transformers, tokenizers,
safetensors or torch raise on the way is an UnsupportedModel of one line, with the original chained.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoTokenizer
from transformers.activations import ACT2FN
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as hf_logging

from specvlm.core import checks
from specvlm.core.errors import CapacityError, ConfigError, SpecVLMError, UnsupportedModel, one_line
from specvlm.families import Family, family_for
from specvlm.media import Frames

_TEXTS = ("*.json", "*.jinja", "*.txt", "*.model")  # of a checkpoint on the hub: all files but the weights
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers' order; each may be an index of several files
_LFS = b"version https://git-lfs.github.com/spec"
_LFS_BYTES = 1024  # a pointer is shorter
_REHEARSED = {"video": 2, "image": 1}  # frames
_NAMED = 3  # weights that a message names
_MOST_CHARS = 400  # of what another library says
# Numbers of a config that memory or time is asked for before any weight is seen, and the most that is believed.
_MOST = dict.fromkeys(("num_hidden_layers", "depth"), 1000) | dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads",
     "embed_dim", "num_heads", "out_hidden_size", "num_position_embeddings", "patch_size", "temporal_patch_size",
     "spatial_merge_size", "in_channels", "in_chans", "image_size", "mlp_ratio"), 1 << 22
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose texts were read, and whose weights were not."""

    name: str  # as it was asked for
    directory: str  # where its files are; a hub id's lie in the cache
    config: Any  # Hugging Face's
    tokenizer: Any
    family: type[Family]

    @classmethod
    def open(cls, name: str) -> Checkpoint:
        """Find a Hugging Face directory or hub id and read its config and tokenizer.

        Raises:
            UnsupportedModel: there is none, or a file cannot be read or served.
        """
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        directory = _located(name)
        _refuse_pointers(directory)
        _refuse_adapter(name, directory)
        family = _family(name, _config(name, directory))
        for file in Path(directory).glob("*_config.json"):
            _object(file)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if not any((Path(directory) / file).is_file() for file in _TOKENIZERS):
            raise UnsupportedModel(
                f"cannot load {name}: it has no tokenizer ({_TOKENIZERS[0]}): copy the files of the model that it "
                "was made from"
            )
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer("")  # its first call lifts the truncation and padding of tokenizer.json, which threads must not do
        _check_vocabulary(name, config, tokenizer)
        return cls(name, directory, config, tokenizer, family)

    @property
    def is_quantised(self) -> bool:
        """Whether transformers loads it with another library's kinds of weights."""
        configs = (self.config, self.config.get_text_config())
        return any(getattr(config, "quantization_config", None) for config in configs)

    def rehearse(self, family: Family) -> None:
        """Let the family lay out a small video and image, without pixels, so that settings that cannot work are told.

        Raises:
            UnsupportedModel: they fill the whole context.
        """
        pixels = torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device="meta")
        media = [Frames(pixels[:count], torch.arange(count).double(), 1.0, kind) for kind, count in _REHEARSED.items()]
        content = [*({"type": kind} for kind in _REHEARSED), {"type": "text", "text": "?"}]
        context = self.config.get_text_config().max_position_embeddings
        with suppress(ConfigError):  # a chat template for text alone serves text
            tokens = family.measure([{"role": "user", "content": content}], media).num_tokens
            if tokens > context:
                raise UnsupportedModel(
                    f"cannot load {self.name}: three frames of 224 x 224 become {tokens} tokens by its processor's "
                    f"settings, more than its context of {context}: fetch its preprocessor files again"
                )

    def fetch(self) -> None:
        """Bring the weights of a hub id to its folder."""
        if os.path.isdir(os.path.expanduser(self.name)):
            return
        directory = Path(self.directory)
        indices = [file for name in _WEIGHTS if (file := directory / f"{name}.index.json").is_file()]
        files = _indexed(indices[0]) if indices else list(_WEIGHTS)
        are_there = (all if indices else any)((directory / file).is_file() for file in files)
        if are_there:  # not every hub library looks into its cache first where it is offline
            return
        snapshot_download(self.name, revision=directory.name, allow_patterns=files)

    def read(self, place: torch.device, dtype: torch.dtype) -> Any:
        """Return the Hugging Face model, its weights straight on their device.

        Raises:
            UnsupportedModel: weights are missing, unknown, of another size, or cannot be read.
        """
        directory = Path(self.directory)
        files = [directory / file for file in _weight_files(self.name, directory)]
        headers = {key: weight for file in files for key, weight in _header(file).items()}
        if not self.is_quantised:
            _refuse_integers(self.name, headers)
            _check_room(self.name, headers, place, dtype)
            self._refuse_other_weights(self._load(None, torch.device("meta"), dtype, headers)[1])
        model, info = self._load(self.directory, place, dtype)
        self._refuse_other_weights(info)
        return model

    def _load(
        self, directory: str | None, place: torch.device, dtype: torch.dtype, headers: dict[str, Tensor] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Let transformers load the weights, or their headers alone; return the model and what it says about them."""
        model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self.config)]
        options = {"dtype": dtype, "output_loading_info": True, "config": self.config}
        if headers is not None:
            options |= {"state_dict": headers, "ignore_mismatched_sizes": True}
        if place.type != "cpu":
            options["device_map"] = {"": place}
        loaded: tuple[Any, dict[str, Any]] = model_class.from_pretrained(directory, **options)
        return loaded

    def _refuse_other_weights(self, info: Mapping[str, Any]) -> None:
        missing, unknown, other = (info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        problems = []
        if missing:
            problems.append(f"{len(missing)} weights are missing ({_some(missing)})")
        if unknown:
            problems.append(f"{len(unknown)} are none of a {self.config.model_type} ({_some(unknown)})")
        if other:
            sizes = [f"{key} is {list(stored)}, not {list(wanted)}" for key, stored, wanted in other]
            problems.append(f"{len(other)} are of another size than its config says ({_some(sizes)})")
        if problems:
            remedy = "fetch or save the whole model again"
            if any(key.startswith("base_model.") for key in unknown):
                remedy = "merge the adapter with peft's merge_and_unload() and save that model"
            raise UnsupportedModel(f"cannot load {self.name}: {' and '.join(problems)}: {remedy}")


@contextmanager
def refusals(name: str, place: torch.device) -> Iterator[None]:
    """Turn whatever is raised while a checkpoint is loaded into an error of ours, all that is said about it.

    Raises:
        CapacityError: it does not fit.
        UnsupportedModel: anything else.
    """
    try:
        with _logged_at_the_end():
            yield
    except SpecVLMError:
        raise
    except BaseException as error:
        said = _said(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in said:
            raise CapacityError(f"{name} does not fit on {place}: {said}") from error
        is_panic = type(error).__name__ == "PanicException"  # of tokenizers and safetensors, which are Rust
        if not (is_panic or isinstance(error, Exception)):
            raise
        raise UnsupportedModel(f"cannot load {name}: {said}") from error


@contextmanager
def _logged_at_the_end() -> Iterator[None]:
    """Hold back what transformers logs in this thread; tell it when the block ends well."""
    handlers, thread = list(logging.getLogger("transformers").handlers), threading.get_ident()
    held: list[logging.LogRecord] = []

    def is_of_others(record: logging.LogRecord) -> bool:
        if record.thread == thread and (not held or held[-1] is not record):
            held.append(record)
        return record.thread != thread

    for handler in handlers:
        handler.addFilter(is_of_others)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_of_others)
    for record in held:
        for handler in handlers:
            handler.handle(record)


def _said(error: BaseException) -> str:
    """Return what another library's error says, on one line of bounded length."""
    line = one_line(error)
    line = line if len(line) <= _MOST_CHARS else f"{line[:_MOST_CHARS]}..."
    is_plain = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return line if is_plain or line == type(error).__name__ else f"{type(error).__name__}: {line}"


def _located(name: str) -> str:
    """Return the folder of a directory or hub id; of the latter, all but the weights are fetched."""
    checks.checkpoint(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path
    try:
        return snapshot_download(name, allow_patterns=list(_TEXTS))
    except Exception as error:
        raise UnsupportedModel(
            f"there is no directory {name}, and the Hugging Face hub does not give it ({_said(error)}): give a "
            "directory or hub id"
        ) from error


def _refuse_pointers(directory: str) -> None:
    for path in Path(directory).iterdir():
        if path.is_file() and path.stat().st_size < _LFS_BYTES and path.read_bytes().startswith(_LFS):
            raise UnsupportedModel(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull there")


def _refuse_adapter(name: str, directory: str) -> None:
    """Refuse an adapter: transformers loads its base without it where peft is not there, and says nothing."""
    path = Path(directory) / "adapter_config.json"
    if not path.is_file():
        return
    base = _object(path).get("base_model_name_or_path")
    raise UnsupportedModel(
        f"cannot load {name}: it is an adapter (LoRA) of {base or 'another model'}: merge the two with peft's "
        "merge_and_unload(), save the model with its tokenizer and processor files, and load that"
    )


def _config(name: str, directory: str) -> dict[str, Any]:
    """Return what config.json says, once it is what transformers can take."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        inner = sorted(str(found.parent) for found in Path(directory).glob("*/config.json"))
        hint = f"did you mean {inner[-1]}?" if inner else "give a Hugging Face directory or hub id"
        raise UnsupportedModel(f"cannot load {name}: it has no config.json: {hint}")
    config = _object(path)
    if not isinstance(config.get("model_type"), str):
        raise UnsupportedModel(
            f"{path} has no model_type: give the directory of a Hugging Face model, not of a part of one"
        )
    return config


def _family(name: str, config: Mapping[str, Any]) -> type[Family]:
    """Return the family that serves a config, once its parts are what transformers can take."""
    try:
        family = family_for(config["model_type"])
    except UnsupportedModel as error:
        raise UnsupportedModel(f"cannot load {name}: {error}") from error
    # without a tower's config transformers takes one of its own; the text's may stand at the top
    parts = {"vision_config": config.get("vision_config"), "text_config": config.get("text_config", {})}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise UnsupportedModel(
                f"cannot load {name}: {key}={part!r} of its config.json is no object: fetch it again"
            )
    for key, part in (parts | {"config.json": config}).items():
        _check_part(name, key, part)
    return family


def _check_part(name: str, place: str, part: Mapping[str, Any]) -> None:
    """Refuse what transformers would fail on late, or slowly, or not at all."""
    problem = None
    for key, most in _MOST.items():
        value = part.get(key)
        if value is not None and (isinstance(value, bool) or not 0 < float(value) <= most):
            problem = f"{key}={value!r} of its {place} is not allowed: from 1 to {most}"
    if part.get("hidden_act", "silu") not in ACT2FN:
        problem = f"hidden_act={part['hidden_act']!r} of its {place} is unknown to transformers"
    quantisation = part.get("quantization_config")
    if quantisation and not AutoHfQuantizer.supports_quant_method(quantisation):  # type: ignore[no-untyped-call]
        problem = f"quantization_config={quantisation} of its {place} is unknown to transformers"
    if problem is not None:
        raise UnsupportedModel(f"cannot load {name}: {problem}")


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} holds no JSON ({_said(error)}): fetch the file again") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} holds a JSON {type(content).__name__}, not an object: fetch the file again")
    return content


def _check_vocabulary(name: str, config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that knows tokens without an embedding, or none for a video or image."""
    size, added = config.get_text_config().vocab_size, tokenizer.added_tokens_decoder
    last = max(len(tokenizer) - 1, *added)
    problem = None
    if last >= size:
        word = tokenizer.convert_ids_to_tokens(last)
        problem = f"token {last} ({word!r}) of its tokenizer is beyond vocab_size={size}"
    for key in ("image_token_id", "video_token_id"):
        if getattr(config, key) not in added:
            problem = f"{key}={getattr(config, key)!r} is no special token of its tokenizer"
    if problem is not None:
        raise UnsupportedModel(f"cannot load {name}: {problem}: take the tokenizer that it was trained with")


def _weight_files(name: str, directory: Path) -> list[str]:
    """Return the names of the files that hold the weights."""
    for file in _WEIGHTS:
        if (directory / file).is_file():
            return [file]
        index = directory / f"{file}.index.json"
        if index.is_file():
            files = _indexed(index)
            missing = [shard for shard in files if not (directory / shard).is_file()]
            if missing:
                raise UnsupportedModel(
                    f"cannot load {name}: {len(missing)} of {len(files)} files of weights are missing "
                    f"({_some(missing)}): fetch them"
                )
            return files
    raise UnsupportedModel(f"cannot load {name}: it has no weights ({', '.join(_WEIGHTS)}): fetch them")


def _indexed(index: Path) -> list[str]:
    """Return the files that an index of weights names."""
    found = _object(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise UnsupportedModel(f"{index} has no weight_map from weights to files: fetch the file again")
    return sorted(set(found.values()))


def _header(path: Path) -> dict[str, Tensor]:
    """Return the weights of a file by name, without their values."""
    try:
        if path.suffix != ".safetensors":
            found: dict[str, Tensor] = torch.load(path, map_location="meta", weights_only=True)
            return found
        with safe_open(path, "pt") as file:
            found = {}
            for key in file.keys():  # noqa: SIM118
                weight = file.get_slice(key)
                dtype = torch.float32 if "F" in weight.get_dtype() else torch.int8  # no more is asked of it
                found[key] = torch.empty(weight.get_shape(), dtype=dtype, device="meta")
            return found
    except Exception as error:
        raise UnsupportedModel(f"{path} cannot be read ({_said(error)}): fetch the file again") from error


def _refuse_integers(name: str, headers: Mapping[str, Tensor]) -> None:
    """Refuse quantised weights of which the config says nothing: transformers would take the integers as they are."""
    found = [key for key, weight in headers.items() if not weight.is_floating_point() and key.endswith(".weight")]
    if found:
        raise UnsupportedModel(
            f"cannot load {name}: {len(found)} weights are integers ({_some(found)}) and its config.json has no "
            "quantization_config: add it, or fetch weights that are not quantised"
        )


def _check_room(name: str, headers: Mapping[str, Tensor], place: torch.device, dtype: torch.dtype) -> None:
    """Refuse weights that a GPU has no room for, before they are read.

    Raises:
        CapacityError: the numbers.
    """
    if place.type != "cuda":
        return
    needed = sum(weight.numel() for weight in headers.values()) * dtype.itemsize
    unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    free = torch.cuda.mem_get_info(place)[0] + unused
    if needed > free:
        raise CapacityError(
            f"{name} does not fit on {place}: its weights take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "choose another device, a smaller model, or a smaller dtype"
        )


def _some(words: Collection[str]) -> str:
    """Name the first of many."""
    ordered = sorted(words)
    return ", ".join(ordered[:_NAMED]) + (", ..." if len(ordered) > _NAMED else "")
