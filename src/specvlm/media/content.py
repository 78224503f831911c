"""What the first bytes of a file tell, and an error's own words on one line."""

from __future__ import annotations

from specvlm.media import jpeg
from specvlm.media.frames import Data

_MOST_JPEG = 1 << 26  # bytes of a file that are looked through for a second picture


def head_of(data: Data, count: int) -> bytes:
    """Return the first bytes."""
    if isinstance(data, bytes):
        return data[:count]
    with open(data, "rb") as file:
        return file.read(count)


def is_still(data: Data) -> bool:
    """Whether these are the first bytes of a picture that does not move (animations go to the video reader)."""
    head = head_of(data, 4096)
    if head.startswith(b"\xff\xd8\xff"):
        return not jpeg.is_motion(head_of(data, _MOST_JPEG))
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"acTL" not in head
    return is_webp(head) and not (head[12:16] == b"VP8X" and head[20] & 2)


def is_webp(head: bytes) -> bool:
    """Whether these are the first bytes of a WebP picture."""
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) > 20


def looks_like(data: Data) -> str:
    """Return what the first bytes suggest about a file that cannot be opened, or ""."""
    head = head_of(data, 512)
    if head.lstrip()[:1] == b"<" and b"html" in head.lower():
        return ": it holds a web page, so fetch the file itself"
    if is_webp(head):
        return ": it is an animated webp, which is not supported; convert it to mp4 or gif"
    if head[4:8] == b"ftyp":
        return ": its index is missing or damaged, as after an interrupted copy or recording, so fetch it again"
    if b"\0" not in head and all(byte >= 32 or byte in b"\t\r\n\f\x1b" for byte in head):
        return ": it holds text"
    return ": the format is unknown or the file is damaged; convert it to mp4 (h264)"


def line_of(error: Exception) -> str:
    """Return an error's own words on one line, without the file name that some repeat."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
