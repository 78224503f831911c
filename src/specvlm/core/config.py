"""Every setting and its default, once. The CLI's options and the docs are built from these fields.

A config is frozen and validated when it is made; nothing writes into it later. `help` in a field's metadata is the text
that the CLI shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from specvlm.core.errors import ConfigError


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


_LEAST_INT, _MOST_INT = -(2**63), 2**63 - 1  # what tensors hold
_SHOWN = 80  # characters of a value in a message


def shown(value: object) -> str:
    """Return a value as a message shows it: on one line, not too long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever a stranger's object does; a number of more than 4,300 digits, for one
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _plain(value: object, hint: Any) -> Any:
    """Return a value as one of Python's own types; an int serves as a float, a str as a tuple, a bool as nothing else.

    Raises:
        TypeError: it is not of a field's type.
    """
    if get_origin(hint) is UnionType:
        return _plain_of_one(value, get_args(hint))
    if get_origin(hint) is tuple:
        items = (value,) if isinstance(value, str) else value
        if isinstance(items, tuple | list):
            return tuple(_plain(item, get_args(hint)[0]) for item in items)
    elif hint is str and isinstance(value, str):
        return str.__str__(value)
    elif hint in (int, float):
        return _plain_number(value, hint)
    elif type(value) is hint:
        return value
    raise TypeError


def _plain_of_one(value: object, hints: Sequence[Any]) -> Any:
    for hint in hints:
        with suppress(TypeError):
            return _plain(value, hint)
    raise TypeError


def _plain_number(value: object, kind: type[int] | type[float]) -> int | float:
    if isinstance(value, bool):
        raise TypeError
    if kind is int and isinstance(value, Integral) and _LEAST_INT <= int(value) <= _MOST_INT:
        return int(value)
    if kind is float and isinstance(value, Real):
        with suppress(OverflowError):  # of a large int
            number = float(value) + 0.0  # -0.0 becomes 0.0
            if math.isfinite(number):
                return number
    raise TypeError


def _make_plain(config: Any) -> None:
    """Bring the values of a config that is being made to Python's own types, so that it compares and prints as it is.

    Raises:
        ConfigError: a value is not of its field's type.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        kind = getattr(hint, "__name__", None) if isinstance(hint, type) else None
        bounds = " between -2^63 and 2^63" if hint in (int, int | None) and isinstance(value, Integral) else ""
        try:
            object.__setattr__(config, name, _plain(value, hint))
        except TypeError as error:
            raise ConfigError(f"{name}={shown(value)} is not allowed: it must be {kind or hint}{bounds}") from error


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={shown(value)} is not allowed: {allowed}")


DEFAULT_FPS = 2.0  # what Qwen's processors sample at
TEXT_POSITIONS = ("trained", "qwen", "transformers")
PENALTIES = (1e-3, 1e3)  # least and largest repetition penalty: logits stay finite


@dataclass(frozen=True)
class VideoConfig:
    """Which frames are read, how large they are, and how positions count on behind them."""

    num_frames: int | None = _setting(None, "read this many evenly spaced frames (instead of --fps)")
    fps: float | None = _setting(None, "frames read per second of video [default: 2, unless num_frames is given]")
    start: float = _setting(0.0, "start of the part to read, in seconds")
    end: float | None = _setting(None, "end of the part to read, in seconds [default: the end of the file]")
    min_frames: int | None = _setting(None, "read at least this many frames of a video that has them, at a given fps")
    max_frames: int = _setting(768, "upper bound on the frames read at a given fps")
    max_pixels: int | None = _setting(None, "upper bound on the pixels of one resized frame [default: the model's own]")
    total_pixels: int | None = _setting(None, "upper bound on the pixels of all resized frames of one video")
    min_pixels: int | None = _setting(None, "lower bound on the pixels of one resized frame [default: the model's own]")
    resized_height: int | None = _setting(
        None, "exact height of a resized frame, rounded to the model's cells (with --resized-width; Qwen's families)"
    )
    resized_width: int | None = _setting(None, "exact width of a resized frame (with --resized-height)")
    fit: str = _setting(
        "thin",
        "what becomes of videos that exceed the model's context: thin (fewer, then smaller frames, with a warning) or "
        "error",
        choices=("thin", "error"),
    )
    text_positions: str = _setting(
        "trained",
        "where text behind a video stands in Qwen2-VL and Qwen2.5-VL: trained (as the checkpoint says that it was "
        "trained; without a word as qwen), qwen (behind the video's largest position, time included) or transformers "
        "(as the installed version counts)",
        choices=TEXT_POSITIONS,
    )
    max_download_bytes: int = _setting(2 << 30, "largest file fetched from a URL, in bytes")
    timeout: float = _setting(30.0, "seconds without an answer after which a URL is given up")

    def __post_init__(self) -> None:
        _make_plain(self)
        if self.num_frames is not None:
            _require(self.num_frames >= 1, "num_frames", self.num_frames, "at least 1")
            _require(self.fps is None, "fps", self.fps, "give num_frames or fps, not both")
        if self.fps is not None:
            _require(0 < self.fps <= 1000, "fps", self.fps, "above 0 and at most 1000")
        _require(self.start >= 0, "start", self.start, "0 or more seconds")
        if self.end is not None:
            _require(self.end > self.start, "end", self.end, f"later than start ({self.start:g} s)")
        _require(self.max_frames >= 1, "max_frames", self.max_frames, "at least 1")
        if self.min_frames is not None:
            allowed = f"from 1 to max_frames ({self.max_frames})"
            _require(1 <= self.min_frames <= self.max_frames, "min_frames", self.min_frames, allowed)
            _require(self.num_frames is None, "min_frames", self.min_frames, "it bounds --fps; leave num_frames out")
        self._check_pixels()
        _require(self.fit in ("thin", "error"), "fit", self.fit, "thin or error")
        _require(self.max_download_bytes >= 1, "max_download_bytes", self.max_download_bytes, "at least 1")
        _require(0 < self.timeout <= 1e6, "timeout", self.timeout, "above 0 and at most 1,000,000 seconds")
        known = self.text_positions in TEXT_POSITIONS
        _require(known, "text_positions", self.text_positions, "trained, qwen or transformers")

    def _check_pixels(self) -> None:
        for name in ("max_pixels", "total_pixels"):
            value = getattr(self, name)
            _require(value is None or value >= 784, name, value, "at least 784 (one 28 x 28 cell)")
        if self.min_pixels is not None:
            most = self.max_pixels or self.total_pixels or self.min_pixels
            allowed = f"from 1 to {'max_pixels' if self.max_pixels else 'total_pixels'} ({most})"
            _require(1 <= self.min_pixels <= most, "min_pixels", self.min_pixels, allowed)
        exact = {"resized_height": self.resized_height, "resized_width": self.resized_width}
        for name, value in exact.items():
            if value is not None:
                _require(value >= 1, name, value, "at least 1 pixel")
                _require(None not in exact.values(), name, value, "give both resized_height and resized_width")
                bound = next((n for n in ("min_pixels", "max_pixels", "total_pixels") if getattr(self, n)), "")
                _require(not bound, name, value, f"it is an exact size; leave {bound} out")


@dataclass(frozen=True)
class PruneConfig:
    """Which visual tokens the draft sees. keep_ratio = 1 - the paper's pruning ratio."""

    keep_ratio: float = _setting(0.1, "share of the visual tokens that the draft sees, above 0 and at most 1")
    keep_tokens: int | None = _setting(None, "number of visual tokens that the draft sees (instead of --keep-ratio)")
    pruner: str = _setting(
        "verifier",
        "how they are chosen: verifier (stage I: those that the target looks at most; stage II: the rest evenly), "
        "attention (stage I alone), uniform (stage II alone), random, window, frame, none, or one that your program "
        "registered",
        choices="pruners",
    )
    mass: float = _setting(
        0.4, "stage I ends where it has covered this share of the target's attention (the paper's lambda)"
    )
    focus: float = _setting(
        0.5, "stage I ends at this share of the kept tokens; stage II chooses the others (1 in the paper)"
    )
    spacing: str = _setting(
        "grid",
        "stage II: even spacing on the time x row x column grid, or along the sequence",
        choices=("grid", "sequence"),
    )
    window: str = _setting("middle", "which part the window pruner keeps", choices=("front", "middle", "back"))
    per_visual: bool = _setting(False, "share the budget between videos and images in proportion to their tokens")
    score_rows: str = _setting(
        "text",
        "text rows whose attention scores the visual tokens: all after the last visual, those of the last user turn, "
        "or the prompt's last one",
        choices=("text", "last_turn", "last"),
    )
    score_layers: str = _setting(
        "all", "decoder layers that score: all, last, or numbers such as 0,2,-1 (negative ones count from the end)"
    )
    positions: str = _setting(
        "original",
        "positions of what the draft sees: those that the target gives it, or counted anew without what was pruned",
        choices=("original", "repacked"),
    )
    prune_seed: int = _setting(0, "seed of the random pruner")

    def __post_init__(self) -> None:
        _make_plain(self)
        _require(0 < self.keep_ratio <= 1, "keep_ratio", self.keep_ratio, "above 0 and at most 1 (1 prunes nothing)")
        if self.keep_tokens is not None:
            _require(self.keep_tokens >= 1, "keep_tokens", self.keep_tokens, "at least 1")
        _require(0 <= self.mass <= 1, "mass", self.mass, "from 0 to 1")
        _require(0 <= self.focus <= 1, "focus", self.focus, "from 0 to 1")
        _require(self.spacing in ("grid", "sequence"), "spacing", self.spacing, "grid or sequence")
        _require(self.window in ("front", "middle", "back"), "window", self.window, "front, middle or back")
        known = ("text", "last_turn", "last")
        _require(self.score_rows in known, "score_rows", self.score_rows, "text, last_turn or last")
        is_list = re.fullmatch(r"-?[0-9]{1,9}(,-?[0-9]{1,9})*", self.score_layers) is not None
        allowed = "all, last, or numbers with commas between them"
        _require(is_list or self.score_layers in ("all", "last"), "score_layers", self.score_layers, allowed)
        _require(self.positions in ("original", "repacked"), "positions", self.positions, "original or repacked")
        _require(0 <= self.prune_seed < 2**63, "prune_seed", self.prune_seed, "from 0 to 2^63 - 1")


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen and when the text ends. temperature 0 is greedy."""

    max_new_tokens: int = _setting(256, "exact upper bound on the new tokens")
    temperature: float = _setting(0.0, "0 is greedy, 1 the model's own distribution")
    top_p: float = _setting(1.0, "smallest set of tokens with this probability, 1 keeps all")
    top_k: int = _setting(0, "keep the k most likely tokens, 0 keeps all")
    min_p: float = _setting(0.0, "drop tokens below this share of the most likely one's probability")
    repetition_penalty: float | None = _setting(
        None,
        "divide positive and multiply negative logits of tokens already seen [default: the checkpoint's own, else 1]",
    )
    seed: int | None = _setting(None, "seed of the sampling [default: a fresh one]")
    stop: tuple[str, ...] = _setting((), "text that ends the answer and is cut off; may be repeated")
    ignore_eos: bool = _setting(False, "go on after an end-of-sequence token")

    def __post_init__(self) -> None:
        _make_plain(self)
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        is_usable = self.temperature == 0 or 1e-3 <= self.temperature <= 1e3
        _require(is_usable, "temperature", self.temperature, "0 (greedy), or from 0.001 to 1000")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "from 0 to below 1")
        least, most = PENALTIES
        is_penalty = least <= self.penalty <= most
        _require(is_penalty, "repetition_penalty", self.repetition_penalty, f"from {least:g} to {most:g} (1 is none)")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2^63 - 1")
        _require(all(self.stop), "stop", self.stop, "no empty string")

    @property
    def penalty(self) -> float:
        """The repetition penalty, 1 where none is set."""
        return 1.0 if self.repetition_penalty is None else self.repetition_penalty

    @property
    def sampling_key(self) -> tuple[float, ...]:
        """What turns logits into choices, the seed left out."""
        return self.temperature, self.top_p, self.top_k, self.min_p, self.penalty


@dataclass(frozen=True)
class DraftConfig:
    """What is drafted a round, and by whom."""

    drafter: str = _setting(
        "model",
        "who drafts: model, self (the target, on the kept visual tokens), lookup (what followed the last words "
        "before), or none (plain decoding)",
        choices="drafters",
    )
    tree: str | tuple[str, ...] = _setting(
        "dynamic",
        "what is drafted a round: 'dynamic' (grown by the draft's own probabilities; 'dynamic:NODES:DEPTH' bounds it), "
        "'paper' (25 nodes, depth 5), 'chain:N', or a comma-separated list of child-rank paths such as 0,1,00,01",
    )
    policy: str | None = _setting(
        None,
        "auto: choose round by round the tree, or none, that gives the most tokens a second; fixed: always draft the "
        "tree [default: auto for the tree 'dynamic', else fixed]",
        choices="policies",
    )
    lookup_tokens: int = _setting(0, "tokens of prompt lookup beside the tree of a model, as a branch of its own")
    refresh: int = _setting(
        0, "self-drafting: choose the kept visual tokens anew every this many rounds, by the attention since; 0 never"
    )

    def __post_init__(self) -> None:
        _make_plain(self)
        _require(0 <= self.lookup_tokens <= 32, "lookup_tokens", self.lookup_tokens, "from 0 to 32")
        _require(self.refresh >= 0, "refresh", self.refresh, "0 or more rounds")

    @property
    def is_adaptive(self) -> bool:
        """Whether the policy in force chooses, round by round."""
        return self.policy == "auto" if self.policy else self.tree == "dynamic"


@dataclass(frozen=True)
class RunConfig:
    """How passes are computed; the words do not depend on it."""

    eager: bool = _setting(
        False,
        "run the Hugging Face language layers as they are: no fused kernels, no CUDA graphs (the slow reference)",
    )

    def __post_init__(self) -> None:
        _make_plain(self)


@dataclass(frozen=True)
class EngineConfig:
    """All that is in force for one request."""

    video: VideoConfig = field(default_factory=VideoConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _make_plain(self)

    def replace(self, **settings: Any) -> EngineConfig:
        """Return a config with these settings changed, by their flat names (`keep_ratio=0.2, seed=1`).

        Raises:
            ConfigError: a name is unknown (the known ones are listed) or a value is not allowed.
        """
        owners = {f.name: part.name for part in fields(self) for f in fields(getattr(self, part.name))}
        if unknown := sorted(set(settings) - set(owners)):
            raise ConfigError(f"unknown setting {unknown[0]!r}: known are {', '.join(sorted(owners))}")
        changed = {}
        for part in fields(self):
            mine = {name: value for name, value in settings.items() if owners[name] == part.name}
            old = getattr(self, part.name)
            changed[part.name] = type(old)(**({f.name: getattr(old, f.name) for f in fields(old)} | mine))
        return EngineConfig(**changed)


def kind_of(hint: Any) -> Any:
    """Return what a field's value is made from on a command line: str, int, float or bool."""
    kind = get_args(hint)[0] if get_origin(hint) is UnionType else hint
    return str if get_origin(kind) is tuple else kind


def parsed(name: str, text: str) -> Any:
    """Return the value of a setting, by its flat name, from text; "none" is None where that is allowed.

    Raises:
        ConfigError: the setting is unknown (the known are listed), or the text is no value of its type.
    """
    hints = {key: hint for part in get_type_hints(EngineConfig).values() for key, hint in get_type_hints(part).items()}
    if name not in hints:
        raise ConfigError(f"unknown setting {name!r}: known are {', '.join(sorted(hints))}")
    hint, kind = hints[name], kind_of(hints[name])
    if text.lower() == "none" and type(None) in get_args(hint):
        return None
    if kind is bool:
        known = {"true": True, "false": False}
        _require(text.lower() in known, name, text, "true or false")
        return known[text.lower()]
    try:
        value = kind(text)
    except ValueError as error:
        raise ConfigError(f"{name}={shown(text)} is not allowed: it must be {kind.__name__}") from error
    return (value,) if get_origin(hint) is tuple else value
