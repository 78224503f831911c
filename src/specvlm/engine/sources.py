"""What a caller hands over -> messages: a video, several, frames, or messages already; and what a thing is called."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from specvlm.core.errors import ConfigError

if TYPE_CHECKING:
    from specvlm.families import Message

DEFAULT_PROMPT = "Describe the video in detail."
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".jfif")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".3gp",
          ".ogv", ".gif", ".apng", ".mjpeg", ".m3u8", ".mxf", ".h264", ".hevc", ".y4m")  # fmt: skip


def messages_of(source: Any, prompt: str | None) -> list[Message]:
    """Return the messages of a request.

    Args:
        source: messages; or what `media.load` reads; or a list of videos, which stand in one prompt; or None.
        prompt: the question; None asks for a description. Not beside messages.

    Raises:
        ConfigError: a prompt beside messages, or a list of both videos and pictures.
    """
    if isinstance(source, dict):
        raise ConfigError("a message by itself is not allowed: put it into a list")
    if isinstance(source, list | tuple) and any(isinstance(item, dict) for item in source):
        if prompt is not None:
            raise ConfigError(f"prompt={prompt!r} is not allowed beside messages: put it into the last message")
        return list(source)
    if isinstance(source, list | tuple) and any(_is_conversation(item) for item in source):
        raise ConfigError("a list of conversations is not allowed: give one, a list of messages, at a time")
    if prompt is not None and not isinstance(prompt, str):
        raise ConfigError(f"prompt={prompt!r} is not allowed: it must be str")
    videos = [{"type": "video", "video": video} for video in videos_in(source)]
    text = {"type": "text", "text": DEFAULT_PROMPT if prompt is None else prompt}
    return [{"role": "user", "content": [*videos, text]}]


def _is_conversation(item: Any) -> bool:
    return isinstance(item, list | tuple) and any(isinstance(message, dict) for message in item)


def videos_in(source: Any) -> list[Any]:
    """Return the videos of a source that is no messages. A list of pictures is the frames of one.

    Raises:
        ConfigError: a list of both videos and pictures.
    """
    if source is None:
        return []
    if not isinstance(source, list | tuple):
        return [source]
    pictures = [is_picture(item) for item in source]
    if all(pictures):
        return [source]
    if any(pictures):
        picture, video = source[pictures.index(True)], source[pictures.index(False)]
        problem = f"a list of both pictures ({name_of(picture)}) and videos ({name_of(video)}) is not allowed"
        raise ConfigError(f"{problem}: give videos, or the frames of one, or messages")
    return list(source)


def is_picture(item: Any) -> bool:
    """Whether an item of a list is a frame, and no video by itself: by its name, else by its first bytes."""
    from specvlm.media import Frames
    from specvlm.media.content import is_still

    if isinstance(item, Frames):
        return item.kind == "image"
    if isinstance(item, list | tuple):
        return False
    if isinstance(item, bytes):
        return is_still(item)
    if not isinstance(item, str | os.PathLike):
        return getattr(item, "ndim", 3) != 4
    path = str(os.fspath(item))
    if path.startswith("data:"):
        return path.startswith("data:image") and not path.startswith("data:image/gif")
    if extension(path) in PICTURES:
        return True
    is_known = extension(path) in VIDEOS or "://" in path
    return not is_known and os.path.isfile(path) and is_still(path)


def extension(path: str) -> str:
    """Return the extension of a path or URL, in lower case."""
    return os.path.splitext(re.split(r"[?#]", path, maxsplit=1)[0] if "://" in path else path)[1].lower()


def looks_like_media(word: str) -> bool:
    """Whether a word of a command line is a video rather than a question: standard input, a URL, or a name of one."""
    is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://\S+$|data:[^\s,]*,", word) is not None
    return word == "-" or is_url or extension(word) in (*VIDEOS, *PICTURES)


def name_of(source: Any) -> str:
    """Return what a source is called in an account; URLs without what may be secret in them."""
    from specvlm.families import clean

    if isinstance(source, str | os.PathLike):
        path = clean(str(os.fspath(source)))
        if path.startswith("data:"):
            return f"{path[:30]}..."
        return re.sub(r"(://)[^/?#]*@|[?#].*", r"\1", path) if "://" in path else path
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    if isinstance(source, Sequence):
        return f"<{len(source)} frames>"
    return f"<{getattr(source, 'name', None) or type(source).__name__}>"
