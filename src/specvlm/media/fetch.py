"""From a source to a path or bytes: local files, pipes, file objects, bytes, URLs."""

from __future__ import annotations

import base64
import binascii
import os
import select
import stat
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from specvlm.core.config import VideoConfig
from specvlm.core.errors import MediaError
from specvlm.media.content import head_of, line_of
from specvlm.media.download import download, too_long, url_name
from specvlm.media.frames import Data

_CHUNK = 1 << 20  # bytes read at once
_OPEN_FILES = "/proc/self/fd"  # Linux: every open file by its number, also one without a name


@contextmanager
def located(source: Any, config: VideoConfig) -> Iterator[tuple[str, Data]]:
    """Yield the source's name for messages, and its path or bytes; a temporary copy is gone afterwards.

    Raises:
        MediaError: there is nothing to read, or more than max_download_bytes where it must be copied first.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        yield _checked(f"<{len(data)} bytes>", data), data
    elif hasattr(source, "read"):
        named = getattr(source, "name", None)  # a number for a descriptor, None for a temporary file
        name = named if isinstance(named, str) else "<file object>"
        with _copied(name, config, lambda: _read_object(source, name)) as path:
            yield _checked(name, path), path
    elif not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise MediaError(f"cannot read a {kind}: pass a path, URL, bytes, uint8 array or list of images")
    else:
        with _named(_text(source), config) as found:
            yield found


def _text(source: str | os.PathLike[str]) -> str:
    """Return a path or URL as text."""
    path = os.fspath(source)
    return os.fsdecode(path) if isinstance(path, bytes) else str(path)


@contextmanager
def _named(text: str, config: VideoConfig) -> Iterator[tuple[str, Data]]:
    """Yield the name of a path or URL, and its path or bytes."""
    scheme = _scheme(text)
    if scheme in ("http", "https"):
        name = url_name(text)
        with _copied(name, config, lambda: download(text, config)) as path:
            yield _checked(name, path), path
    elif scheme == "data":
        data = _data_url(text)
        yield _checked(f"{text[:30]}...", data), data
    elif scheme in ("file", ""):
        path = _file_path(text) if scheme else text
        if _is_pipe(path):
            with _copied(path, config, lambda: _read_pipe(path, config.timeout)) as copy:
                yield _checked(path, copy), copy
        else:
            name = _checked(path, path)
            with _in_utf8(path) as usable:
                yield name, usable
    else:
        raise MediaError(f"{url_name(text)}: {scheme}:// is not supported: use a path, file://, http:// or https://")


def _scheme(text: str) -> str:
    """Return "" for a path, else the URL's scheme."""
    if text[:5].lower() == "data:" and "," in text:
        return "data"
    head, found, _ = text.partition("://")
    is_scheme = head.isascii() and head.replace("+", "").replace("-", "").replace(".", "").isalnum()
    return head.lower() if found and is_scheme else ""


@contextmanager
def _in_utf8(path: str) -> Iterator[str]:
    """Yield a path that FFmpeg takes: a name that is no UTF-8 stands as the number of the open file."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"{_OPEN_FILES}/{file.fileno()}"
    else:
        yield path


def _file_path(url: str) -> str:
    host, slash, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost"):
        raise MediaError(f"{url}: {host} is another machine: write file:///path for a local file")
    return urllib.request.url2pathname(slash + path)


def _data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        if not head.lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(body)
        return base64.b64decode("".join(urllib.parse.unquote(body).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        problem = f"{url[:30]}... is no valid base64 ({line_of(error)})"
        raise MediaError(f"{problem}: encode the file's bytes again") from error


def _checked(name: str, data: Data) -> str:
    """Return the name on one line, or raise if there is plainly nothing to read."""
    name = printable(name)
    try:
        if isinstance(data, str):
            _check_path(name, data)
        is_empty = not head_of(data, 1)
    except OSError as error:
        raise MediaError(f"{name} cannot be read ({error.strerror}): check its permissions") from error
    if is_empty:
        raise MediaError(f"{name} is empty (0 bytes): the copy or recording that made it failed")
    return name


def printable(name: str) -> str:
    """Return a name on one line that every terminal takes: what is no character stands as an escape."""
    return " ".join(name.encode("utf-8", "backslashreplace").decode().split())


def _check_path(name: str, path: str) -> None:
    """Refuse what is no file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise MediaError(f"{name!r} does not exist: check the path") from error
    except (ValueError, NotADirectoryError) as error:  # ValueError: a zero byte, or a character that no path can hold
        shown = repr(name).replace("\\x00", "\\0")
        raise MediaError(f"{shown} does not exist: check the path") from error
    if stat.S_ISDIR(mode):
        raise MediaError(f"{name} is a directory: pass one file, or the list of its images")
    if not stat.S_ISREG(mode):
        raise MediaError(f"{name} is a device or a socket, not a file: pass a file, a pipe or a URL")


# Copies: what can be read only once


@contextmanager
def _copied(name: str, config: VideoConfig, chunks: Callable[[], Iterable[bytes]]) -> Iterator[str]:
    """Yield the path of a copy of the chunks, up to max_download_bytes; it is gone afterwards whatever happens.

    On Linux the file has no name from the start, so that even a killed process leaves nothing behind.
    """
    has_no_name = os.path.isdir(_OPEN_FILES)
    try:
        file: Any = tempfile.TemporaryFile() if has_no_name else tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115
    except OSError as error:
        raise _no_room(name, error) from error
    try:
        with file:
            _write(file, chunks(), name, config)
            if has_no_name:
                yield f"{_OPEN_FILES}/{file.fileno()}"
                return
        yield file.name
    finally:
        if not has_no_name:
            os.unlink(file.name)


def _write(file: Any, chunks: Iterable[bytes], name: str, config: VideoConfig) -> None:
    count = 0
    for chunk in chunks:
        count += len(chunk)
        if count > config.max_download_bytes:
            raise too_long(name, f"has more than {config.max_download_bytes} bytes", config)
        try:
            file.write(chunk)
        except OSError as error:
            raise _no_room(name, error) from error
    try:
        file.flush()
    except OSError as error:
        raise _no_room(name, error) from error


def _no_room(name: str, error: OSError) -> MediaError:
    place = os.environ.get("TMPDIR") or "the temporary folder"
    return MediaError(f"{name} cannot be copied to {place} ({line_of(error)}): free some space, or set TMPDIR")


def _read_object(source: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield what a binary file object gives."""
    while True:
        try:
            chunk: Any = source.read(_CHUNK)
        except Exception as error:  # whatever is closed, compressed, or on a network raises
            raise MediaError(f"{name} cannot be read ({line_of(error)}): pass an open binary file") from error
        if not isinstance(chunk, bytes | bytearray | memoryview):
            kind = "text" if isinstance(chunk, str) else f"a {type(chunk).__name__}"
            raise MediaError(f"{name} gives {kind}: open it in binary mode")
        if not len(chunk):
            return
        yield bytes(chunk)


def _is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False  # _check_path says why


def _read_pipe(path: str, timeout: float) -> Iterator[bytes]:
    """Yield what a named pipe gives, read once; a writer that says nothing for `timeout` seconds is given up."""
    try:
        pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a blocking open would wait for ever for a writer
    except OSError as error:
        raise MediaError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    try:
        while True:
            if not select.select([pipe], [], [], timeout)[0]:
                raise MediaError(f"{path} is a pipe that gave nothing for {timeout:g} s: write to it, or pass a file")
            chunk = os.read(pipe, _CHUNK)
            if not chunk:
                return
            yield chunk
    finally:
        os.close(pipe)
