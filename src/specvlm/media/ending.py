"""Whether a file ends as its container should: what a cut one lacks, told from its bytes."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from specvlm.media.content import head_of
from specvlm.media.frames import Data

_TAIL = 1 << 17  # bytes; holds an Ogg page (64 KiB) and what some writers append
_MOST_ELEMENTS = 1_000_000  # of a file, looked at one after another
_SEGMENT = 0x18538067  # Matroska's, around all but its head
_CLUSTER = 0x1F43B675
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # GUID of the file properties
_ASF_HEAD = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")


def size_of(data: Data) -> int:
    """Return the file's size in bytes."""
    return len(data) if isinstance(data, bytes) else os.path.getsize(data)


def _opened(data: Data) -> BinaryIO:
    return io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb")


def part_of(data: Data, start: int, count: int) -> bytes:
    """Return `count` bytes from `start` on, fewer at the end."""
    with _opened(data) as file:
        file.seek(start)
        return file.read(count)


def is_cut(data: Data, format: str) -> bool:
    """Whether the file (of FFmpeg's format name) plainly lacks its end; False where its container does not tell."""
    check = _CHECKS.get(format.partition(",")[0])
    return check is not None and check(data, size_of(data))


def has_another(data: Data, format: str, place: int) -> bool:
    """Whether a second file of the same kind, which FFmpeg does not read, follows after `place` (joined by `cat`)."""
    if format.startswith("mov"):
        boxes = [kind for kind, _ in _boxes(data)]
        return boxes.count(b"moov") > 1 and b"moof" not in boxes  # fragments are read wherever they stand
    mark = _MARKS.get(format)
    return mark is not None and mark in part_of(data, max(place, len(mark)), 1 << 22)


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
    head = tail[place : place + 27]
    sizes = tail[place + 27 : place + 27 + head[26]] if len(head) == 27 else b""
    is_last = len(sizes) > 0 and head[5] & 4
    return place >= 0 and (not is_last or place + 27 + len(sizes) + sum(sizes) > len(tail))


def _transport(data: Data, size: int) -> bool:
    head = head_of(data, 512)
    for length, first in ((188, 0), (192, 4)):  # the second is a Blu-ray's, with a clock before each packet
        if head[first : first + 2 * length + 1 : length] == b"GGG":
            return size % length != 0
    return False


def _dv(data: Data, size: int) -> bool:
    is_pal = head_of(data, 4)[3:] >= b"\x80"
    return size % (144_000 if is_pal else 120_000) != 0


def _yuv4mpeg(data: Data, size: int) -> bool:
    """Whether the last frame is incomplete."""
    line = head_of(data, 1024).partition(b"\n")[0]
    fields = {field[:1]: field[1:] for field in line.split()[1:]}
    layout = re.fullmatch(rb"(420|422|444|mono)(?:jpeg|paldv|mpeg2)?(p?\d\d)?", fields.get(b"C", b"420"))
    shape = [int(field) for field in (fields.get(b"W", b""), fields.get(b"H", b"")) if field.isdigit()]
    if layout is None or len(shape) != 2 or part_of(data, len(line) + 1, 6) != b"FRAME\n":
        return False
    width, height = shape
    half = (width + 1) // 2
    chroma = {b"420": half * ((height + 1) // 2), b"422": half * height, b"444": width * height, b"mono": 0}[layout[1]]
    samples = width * height + 2 * chroma
    return (size - len(line) - 1) % (len(b"FRAME\n") + samples * (2 if layout[2] else 1)) != 0


def _matroska(data: Data, size: int) -> bool:
    """Whether an element of the file, or a cluster within it, states more bytes than there are."""
    place = 0
    with _opened(data) as file:
        for _ in range(_MOST_ELEMENTS):
            file.seek(place)
            element, length, body = _ebml(file.read(16))
            if element == 0 or (length is None and element != _SEGMENT):
                return False  # its size was never filled in
            if length is not None and element in (_SEGMENT, _CLUSTER) and place + body + length > size:
                return True
            place += body + (0 if element == _SEGMENT else length or 0)
    return False


def _ebml(head: bytes) -> tuple[int, int | None, int]:
    """Return an element's identity (0 if there is none), its length (None if not known) and its header's length."""
    if len(head) < 2 or not head[0] or head[0] < 0x10:
        return 0, None, 0
    first = 9 - head[0].bit_length()
    if len(head) <= first or not head[first]:
        return 0, None, 0
    second = 9 - head[first].bit_length()
    length = int.from_bytes(head[first : first + second]) & ((1 << 7 * second) - 1)
    is_known = length != (1 << 7 * second) - 1
    return int.from_bytes(head[:first]), length if is_known else None, first + second


def _mp4(data: Data, size: int) -> bool:
    """Whether a box states more bytes than there are (what some cameras append is no box)."""
    return any(end > size for kind, end in _boxes(data) if kind in (b"mdat", b"moof", b"moov"))


def _boxes(data: Data) -> Iterator[tuple[bytes, int]]:
    """Yield type and end of an mp4's outermost boxes."""
    place = 0
    with _opened(data) as file:
        for _ in range(_MOST_ELEMENTS):
            file.seek(place)
            head = file.read(16)
            length = int.from_bytes(head[:4])
            length = int.from_bytes(head[8:16]) if length == 1 else length
            if length < 8 or len(head) < 8:
                return  # the end, or a box up to it
            place += length
            yield head[4:8], place


_CHECKS: dict[str, Callable[[Data, int], bool]] = {
    "mov": _mp4,
    "matroska": _matroska,
    "dv": _dv,
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
