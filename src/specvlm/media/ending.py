"""Whether a file ends as its container should: what a cut one lacks, told from its bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from specvlm.media.content import head_of
from specvlm.media.frames import Data

_TAIL = 1 << 17  # bytes; holds an Ogg page (64 KiB) and what some writers append
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # GUID of the file properties
_ASF_HEAD = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")


def size_of(data: Data) -> int:
    """Return the file's size in bytes."""
    return len(data) if isinstance(data, bytes) else os.path.getsize(data)


def part_of(data: Data, start: int, count: int) -> bytes:
    """Return `count` bytes from `start` on, fewer at the end."""
    if isinstance(data, bytes):
        return data[start : start + count]
    with open(data, "rb") as file:
        file.seek(start)
        return file.read(count)


def is_cut(data: Data, format: str) -> bool:
    """Whether the file (of FFmpeg's format name) plainly lacks its end; False where its container does not tell."""
    check = _CHECKS.get(format)
    return check is not None and check(data, size_of(data))


def has_another(data: Data, format: str, place: int) -> bool:
    """Whether a second file of the same kind, which FFmpeg does not read, follows after `place` (joined by `cat`)."""
    if format.startswith("mov"):
        boxes = _boxes(data)
        return boxes.count(b"moov") > 1 and b"moof" not in boxes  # fragments are read wherever they stand
    mark = _MARKS.get(format)
    return mark is not None and mark in part_of(data, max(place, len(mark)), 1 << 22)


def _boxes(data: Data) -> list[bytes]:
    """Return the types of an mp4's outermost boxes."""
    place, size = 0, size_of(data)
    found: list[bytes] = []
    while place + 8 <= size and len(found) < 100_000:
        head = part_of(data, place, 16)
        length = int.from_bytes(head[:4])
        length = int.from_bytes(head[8:16]) if length == 1 else length
        found.append(head[4:8])
        if length < 8:
            break
        place += length
    return found


def _riff(data: Data, size: int) -> bool:
    place = 0
    while (head := part_of(data, place, 8))[:4] == b"RIFF":  # a long file is several of them
        length = int.from_bytes(head[4:], "little")
        if length in (0, 0xFFFFFFFF):
            return False  # never filled in
        place += 8 + length + length % 2
    return place > size + 1


def _asf(data: Data, size: int) -> bool:
    head = head_of(data, 1 << 16)
    place = head.find(_ASF_FILE)
    stated = int.from_bytes(head[place + 40 : place + 48], "little")
    is_live = place + 92 > len(head) or head[place + 88] & 1
    return place >= 0 and not is_live and stated > size


def _gif(data: Data, size: int) -> bool:
    return not part_of(data, max(size - 4096, 0), 4096).rstrip(b"\0\r\n ").endswith(b"\0;")


def _png(data: Data, size: int) -> bool:
    return b"IEND\xaeB`\x82" not in part_of(data, max(size - 4096, 0), 4096)


def _jpegs(data: Data, size: int) -> bool:
    return b"\xff\xd9" not in part_of(data, max(size - 4096, 0), 4096)[-64:]


def _ogg(data: Data, size: int) -> bool:
    tail = part_of(data, max(size - _TAIL, 0), _TAIL)
    place = tail.rfind(b"OggS\0")
    return place >= 0 and len(tail) > place + 5 and not tail[place + 5] & 4


def _transport(data: Data, size: int) -> bool:
    head = head_of(data, 2 * 188 + 1)
    return len(head) > 376 and head[0] == head[188] == head[376] == 0x47 and size % 188 != 0


def _yuv4mpeg(data: Data, size: int) -> bool:
    """Whether the last frame is incomplete (8-bit 4:2:0, 4:2:2, 4:4:4 and grey alone)."""
    line = head_of(data, 1024).partition(b"\n")[0]
    fields = {field[:1]: field[1:] for field in line.split()[1:]}
    layout = re.fullmatch(rb"(420(?:jpeg|paldv|mpeg2)?|422|444|mono)", fields.get(b"C", b"420jpeg"))
    width, height = (int(fields.get(key, b"0") or 0) if fields.get(key, b"").isdigit() else 0 for key in (b"W", b"H"))
    if layout is None or not width or not height:
        return False
    halves = {b"420": ((width + 1) // 2) * ((height + 1) // 2), b"422": ((width + 1) // 2) * height}
    chroma = {b"444": width * height, b"mon": 0}.get(layout[1][:3], halves.get(layout[1][:3], 0))
    frame = len(b"FRAME\n") + width * height + 2 * chroma
    is_plain = part_of(data, len(line) + 1, 6) == b"FRAME\n"
    return is_plain and (size - len(line) - 1) % frame != 0


_CHECKS: dict[str, Callable[[Data, int], bool]] = {
    "avi": _riff,
    "asf": _asf,
    "gif": _gif,
    "apng": _png,
    "mjpeg": _jpegs,
    "ogg": _ogg,
    "mpegts": _transport,
    "yuv4mpegpipe": _yuv4mpeg,
}
_MARKS = {  # how a file of the format begins, where FFmpeg stops at the second one
    "flv": b"FLV\x01",
    "asf": _ASF_HEAD,
    "ivf": b"DKIF",
    "apng": b"\x89PNG\r\n\x1a\n",
    "nut": b"nut/multimedia container\0",
    "yuv4mpegpipe": b"YUV4MPEG2 ",
}
