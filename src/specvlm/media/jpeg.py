"""Whether a file that begins with a JPEG picture is a row of them (Motion JPEG)."""

from __future__ import annotations

import re
from collections.abc import Iterator

_END = 0xD9
_APP2 = 0xE2
_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the frame headers
_MARKER = re.compile(rb"\xff+([^\0\xd0-\xd7\xff])", re.DOTALL)  # within a scan, zero and restarts are no markers
_FILLING = b"\0\xff\r\n"


def is_motion(data: bytes) -> bool:
    """Whether a second picture of the same size follows the first.

    One of another size is a preview or a gain map, and a file with a multi-picture index (MPF: stereo, HDR) is a still.
    """
    size = None
    for marker, body, end in _segments(data, 0):
        if marker == _APP2 and body.startswith(b"MPF\0"):
            return False
        if marker in _SIZES:
            size = body[1:5]
        if marker == _END:
            rest = len(data) - len(data[end:].lstrip(_FILLING))
            second = rest - 1 if data[rest : rest + 1] == b"\xd8" else rest
            return size is not None and _size_at(data, second) == size
    return False


def _size_at(data: bytes, start: int) -> bytes | None:
    """Return height and width as stored in the picture at `start`, None if there is none."""
    return next((body[1:5] for marker, body, _ in _segments(data, start) if marker in _SIZES), None)


def _segments(data: bytes, start: int) -> Iterator[tuple[int, bytes, int]]:
    """Yield marker, the first bytes of its body and where it ends, of the picture at `start`."""
    if data[start : start + 3] != b"\xff\xd8\xff":
        return
    place = start + 2
    while (found := _MARKER.search(data, place)) is not None:
        marker, body = found[1][0], found.end()
        length = 0 if marker in (_END, 0x01) else int.from_bytes(data[body : body + 2])
        place = body + length
        yield marker, data[body + 2 : min(place, body + 34)], place
        if marker == _END:
            return
