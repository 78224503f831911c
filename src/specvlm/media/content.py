"""What the first bytes of a file tell, and an error's own words on one line."""

from __future__ import annotations

import re

from specvlm.media import jpeg
from specvlm.media.frames import Data

_MOST_LOOKED_THROUGH = 1 << 26  # bytes of a file, for a second picture
_PNG = b"\x89PNG\r\n\x1a\n"
_BITMAP = re.compile(rb"BM.{12}[\x0c\x28\x6c\x7c]\0\0\0", re.DOTALL)
_NETPBM = re.compile(rb"P[1-6]\s")
_GAP = rb"\s+(?:#[^\n]*\n\s*)*"
_BITS = re.compile(rb"P4%b(\d{1,9})%b(\d{1,9})\s" % (_GAP, _GAP))
_SAMPLES = re.compile(rb"P([56])%b(\d{1,9})%b(\d{1,9})%b(\d{1,5})\s" % (_GAP, _GAP, _GAP))

_STILL_BRANDS = (b"avif", b"mif1", b"heic", b"heix", b"heim", b"heis")
_SEQUENCE_BRANDS = (b"avis", b"msf1", b"hevc", b"hevx", b"hevm", b"hevs")
_STILL_STARTS = (b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")  # TIFF, JPEG 2000

_TEXTS = (  # what a text begins with, what it is, and the remedy
    (rb"#EXTM3U", "a playlist (m3u8), which names other files: pass one of these, or join them into one (ffmpeg -i)"),
    (rb"ffconcat version", "a list of files for ffmpeg: join them into one (ffmpeg -f concat), or pass one of them"),
    (rb"\[playlist\]", "a playlist (pls), which names other files: pass one of these"),
    (rb"version https://git-lfs", "a Git LFS pointer: fetch the file itself (git lfs pull)"),
    (
        rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<MPD",
        "a DASH playlist (mpd), which names other files: join them into one (ffmpeg -i)",
    ),
    (rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<svg", "an SVG drawing: export it as png"),
)
_BINARIES = (
    (rb"%PDF", "a PDF: export its pages as png"),
    (rb"PK\x03\x04|PK\x05\x06|\x1f\x8b|BZh|\xfd7zXZ|Rar!|7z\xbc\xaf|\x28\xb5\x2f\xfd", "an archive: unpack it first"),
    (rb"\x93NUMPY", "a NumPy array: load it and pass the array"),
    (rb"SQLite format 3|\x89HDF\r\n|PAR1", "a data file, not media"),
    (rb"\x7fELF|MZ", "a program, not media"),
)
_VIDEOS = (
    (rb"....ftyp|....(moov|mdat|wide|free|skip)", "mp4 or mov"),
    (rb"\x1a\x45\xdf\xa3", "mkv or webm"),
    (rb"RIFF....AVI ", "avi"),
    (rb"FLV\x01", "flv"),
    (rb"\x47.{187}\x47", "ts"),
    (rb"\0\0\x01[\xba\xb3]", "mpg"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wmv or asf"),
    (rb"OggS", "ogg"),
)


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
        return not jpeg.is_motion(head_of(data, _MOST_LOOKED_THROUGH))
    if head.startswith(_PNG):
        return b"acTL" not in head
    if is_webp(head):
        return not (head[12:16] == b"VP8X" and head[20] & 2)
    is_other = _BITMAP.match(head) is not None or _NETPBM.match(head) is not None
    return head.startswith(_STILL_STARTS) or is_other or _brand(head) in _STILL_BRANDS


def has_second(data: Data) -> bool:
    """Whether a second picture of the same kind stands right behind a PNG, BMP or binary PNM picture (image2pipe)."""
    content = head_of(data, _MOST_LOOKED_THROUGH)
    end = _end_of_picture(content)
    start = _PNG if content.startswith(_PNG) else content[:2]
    return 0 < end < len(content) and content.startswith(start, end)


def _end_of_picture(content: bytes) -> int:
    """Return where a PNG, BMP or binary PNM picture ends, 0 where that is not told."""
    if content.startswith(_PNG):
        last = content.find(b"\0\0\0\0IEND", len(_PNG))
        return 0 if last < 0 else last + 12
    if content.startswith(b"BM"):
        return int.from_bytes(content[2:6], "little")
    if (header := _BITS.match(content)) is not None:
        width, height = map(int, header.groups())
        return header.end() + -(-width // 8) * height
    if (header := _SAMPLES.match(content)) is not None:
        kind, width, height, most = map(int, header.groups())
        return header.end() + width * height * (3 if kind == 6 else 1) * (1 + (most > 255))
    return 0


def is_webp(head: bytes) -> bool:
    """Whether these are the first bytes of a WebP picture."""
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) > 20


def _brand(head: bytes) -> bytes:
    """Return the main brand of an ISO media file: what the whole of it is."""
    return head[8:12] if head[4:8] == b"ftyp" else b""


def described(data: Data, wanted: str) -> str:
    """Return what the first bytes suggest about a file that cannot be opened, and the remedy.

    Args:
        data: the file.
        wanted: "video" or "image".
    """
    head = head_of(data, 1024)
    brand = _brand(head)
    if brand in _STILL_BRANDS + _SEQUENCE_BRANDS and not brand.startswith(b"av"):
        return ": it is a HEIC picture, which is not supported: save it as jpg or png"
    if is_webp(head) and wanted == "video":
        return ": it is an animated webp, which is not supported; convert it to mp4 or gif"
    for pattern, kind in _BINARIES:
        if re.match(pattern, head, re.DOTALL):
            return f": it is {kind}"
    if wanted == "image":
        for pattern, kind in _VIDEOS:
            if re.match(pattern, head, re.DOTALL):
                return f": it is a video or sound ({kind}): pass it as a video"
    return _described_text(head) or _described_unknown(head, wanted)


def _described_text(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, kind in _TEXTS:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            return f": it is {kind}"
    if start[:1] == b"<" and b"html" in head.lower():
        return ": it holds a web page, so fetch the file itself"
    if b"\0" not in head and all(byte >= 32 or byte in b"\t\r\n\f\x1b" for byte in head):
        return ": it holds text: pass a video or an image"
    return ""


def _described_unknown(head: bytes, wanted: str) -> str:
    if wanted == "image":
        return ": the format is unknown or the file is damaged; use png, jpg, webp, gif, bmp or tiff"
    if head[4:8] == b"ftyp":
        return ": its index is missing or damaged, as after an interrupted copy or recording, so fetch it again"
    return ": the format is unknown or the file is damaged; convert it to mp4 (h264)"


def line_of(error: Exception) -> str:
    """Return an error's own words on one line, without the file name that some repeat."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
