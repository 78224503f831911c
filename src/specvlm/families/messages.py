"""Chat messages in the ecosystem's forms -> plain messages for a chat template, and what their videos and images name.

A part is one of these; what it sets holds for itself alone:

    {"type": "text", "text": ...}                           also input_text, output_text
    {"type": "video", "video": ..., "fps": 1.0}             qwen-vl-utils' form; path and url as in transformers
    {"type": "image", "image": ..., "max_pixels": 50176}    also base64
    {"type": "image_url", "image_url": {"url": ...}}        OpenAI's form; also a plain string, video_url, input_image

A key whose value is None is as if it were not there, since tables give every part the same keys.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specvlm.core.config import VideoConfig, parsed
from specvlm.core.errors import ConfigError

Message = dict[str, Any]  # {"role": str, "content": str | list of parts}

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT = ("text", "input_text", "output_text")
_KIND_OF = {"video": "video", "video_url": "video", "input_video": "video",
            "image": "image", "image_url": "image", "input_image": "image"}  # fmt: skip
_SOURCES = {"video": ("video", "video_url", "path", "url"), "image": ("image", "image_url", "path", "url", "base64")}
_SIZES = {name: name for name in ("min_pixels", "max_pixels", "resized_height", "resized_width")}
_SETTINGS = {  # a part's key -> the setting
    "image": _SIZES,
    "video": _SIZES | {name: name for name in ("fps", "num_frames", "min_frames", "max_frames", "start", "end")}
    | {"total_pixels": "total_pixels", "nframes": "num_frames", "video_start": "start", "video_end": "end",
       "sample_fps": "fps"},
}  # fmt: skip
_EXACT = ("resized_height", "resized_width")
_BOUNDS = ("min_pixels", "max_pixels", "total_pixels")
_RIVALS = {  # what a part sets takes the place of these in the call
    "fps": ("num_frames",), "num_frames": ("fps", "min_frames"), "min_frames": ("num_frames",),
    **dict.fromkeys(_EXACT, _BOUNDS), **dict.fromkeys(_BOUNDS, _EXACT),
}  # fmt: skip


@dataclass(frozen=True)
class Medium:
    """A video or image of a message: what it names, and the settings that are its own."""

    kind: str  # "video" or "image"
    source: Any  # None where the part names nothing
    settings: Mapping[str, Any] = field(default_factory=dict)  # of VideoConfig, by name
    place: str = ""  # the part, for messages

    def config(self, shared: VideoConfig) -> VideoConfig:
        """Return the settings in force: those of the call, changed by the part's own.

        Raises:
            ConfigError: a value of the part is not allowed; its place is named.
        """
        if not self.settings:
            return shared
        rivals = {rival: None for name in self.settings for rival in _RIVALS.get(name, ())}
        try:
            return replace(shared, **rivals | dict(self.settings))
        except ConfigError as error:
            raise ConfigError(f"{self.place}: {error}") from error


def parse(messages: Sequence[Any]) -> tuple[list[Message], list[Medium]]:
    """Return messages as a chat template takes them, their media as bare {"type": kind}, and these media in order.

    Lone surrogates, as undecodable bytes of a command line leave them, become U+FFFD.

    Raises:
        ConfigError: a message or part is malformed, or has a key that nothing reads; the known ones are named.
    """
    plain, media = [], []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        _check_message(message, place)
        content = message["content"]
        if isinstance(content, str):
            plain.append({"role": message["role"], "content": clean(content)})
            continue
        parts: list[dict[str, Any]] = []
        for index, part in enumerate(content):
            found = _part(part, f"{place}.content[{index}]")
            if isinstance(found, Medium):
                media.append(found)
            parts.append({"type": found.kind} if isinstance(found, Medium) else {"type": "text", "text": found})
        plain.append({"role": message["role"], "content": parts})
    return plain, media


def texts(message: Message) -> list[str]:
    """Return the texts of a plain message."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def last_words(messages: Sequence[Message]) -> str:
    """Return what the user said last in plain messages, "" where there is nothing."""
    said = [texts(message) for message in messages if message["role"] == "user"]
    return "\n".join(said[-1]) if said else ""


def clean(text: str) -> str:
    """Return text without lone surrogates, which no tokenizer takes: each is U+FFFD, and a pair its character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_message(message: Any, place: str) -> None:
    if isinstance(message, list | tuple):
        raise ConfigError(f"{place} is a list: give one conversation, a list of messages, at a time")
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConfigError(f"message={message!r} is not allowed: give an object with a role and a content")
    if unknown := sorted(str(key) for key in message if key not in ("role", "content") and message[key] is not None):
        raise ConfigError(f"{place}: unknown key {unknown[0]!r}: known are content, role")
    if message["role"] not in ROLES:
        raise ConfigError(f"{place}: role={message['role']!r} is not allowed: known are {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str | list | tuple):
        raise ConfigError(f"{place}: content={content!r} is not allowed: give a string or a list of parts")
    if not content and not isinstance(content, str):
        raise ConfigError(f"{place}: content={content!r} is not allowed: give at least one part, or a string")


def _part(part: Any, place: str) -> str | Medium:
    """Return the text, or the video or image, of a part."""
    if not isinstance(part, dict):
        raise ConfigError(f"{place}={part!r} is not allowed: a message part is an object with a type")
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.get("type") or next((key for key in ("text", *_KIND_OF) if key in given), None)
    if kind in _TEXT:
        _check_keys(given, ("type", "text"), place)
        if not isinstance(given.get("text"), str):
            raise ConfigError(f"{place}: text={given.get('text')!r} is not allowed: give a string")
        return clean(given["text"])
    if not isinstance(kind, str) or kind not in _KIND_OF:
        raise ConfigError(f"{place}: a message part of type {kind!r} is not allowed: give text, image or video")
    return _medium(_KIND_OF[kind], given, place)


def _medium(kind: str, given: dict[str, Any], place: str) -> Medium:
    given = _unpacked(kind, given, place)
    sources = [key for key in _SOURCES[kind] if key in given]
    if len(sources) > 1:
        raise ConfigError(f"{place} names a {kind} by {sources[0]!r} and by {sources[1]!r}: leave one of them out")
    known = _SETTINGS[kind]
    extra = ("raw_fps",) if kind == "video" else ("detail",)
    _check_keys(given, ("type", *_SOURCES[kind], *known, *extra), place)
    source = given[sources[0]] if sources else None
    _check_detail(given, place)
    if kind == "video":
        _check_rates(given, source, place)
    settings: dict[str, Any] = {}
    for key in (key for key in given if key in known):
        if known[key] in settings:
            raise ConfigError(f"{place}: {key}={given[key]!r} is not allowed: {known[key]} is given twice")
        settings[known[key]] = _value(known[key], given[key], place)
    if sources == ["base64"]:
        source = _decoded(source, place)
    return Medium(kind, source, settings, place)


def _unpacked(kind: str, given: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a part with the object under image_url or video_url laid out flat, as {"url": ..., "detail": ...}."""
    name = f"{kind}_url"
    if not isinstance(given.get(name), dict):
        return given
    inner = {key: value for key, value in given[name].items() if value is not None}
    _check_keys(inner, ("url", "detail") if kind == "image" else ("url",), f"{place}.{name}")
    return {key: value for key, value in given.items() if key != name} | inner


def _check_keys(given: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    if unknown := sorted(str(key) for key in given if key not in known):
        raise ConfigError(f"{place}: unknown key {unknown[0]!r}: known are {', '.join(sorted(known))}")


def _check_detail(given: Mapping[str, Any], place: str) -> None:
    """Images are always seen in the detail that the model's bounds allow."""
    if given.get("detail", "auto") not in ("auto", "high"):
        raise ConfigError(f"{place}: detail={given['detail']!r} is not allowed: auto or high (see max_pixels)")


def _check_rates(given: Mapping[str, Any], source: Any, place: str) -> None:
    """sample_fps is the rate of frames that are there already; their seconds follow from it, whatever raw_fps was."""
    for name in ("sample_fps", "raw_fps"):
        if name in given and not (isinstance(source, list | tuple) or hasattr(source, "ndim")):
            problem = f"{place}: {name}={given[name]!r} is not allowed for a file or Frames, which have times"
            raise ConfigError(f"{problem}: give fps")
    if "raw_fps" in given and "sample_fps" not in given:
        problem = f"{place}: raw_fps={given['raw_fps']!r} is not allowed without sample_fps"
        raise ConfigError(f"{problem}, from which the times of the frames follow")


def _value(name: str, value: Any, place: str) -> Any:
    """Return a setting's value; a number may be written as text, as in qwen-vl-utils' examples."""
    if not isinstance(value, str):
        return value
    try:
        return parsed(name, value)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _decoded(text: Any, place: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error, ValueError) as error:
        raise ConfigError(f"{place}: base64 does not hold base64 ({error}): encode the file's bytes") from error
