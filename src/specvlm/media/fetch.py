"""From a source to a path or bytes: local files, file objects, bytes, URLs."""

from __future__ import annotations

import base64
import binascii
import os
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from specvlm.config import VideoConfig
from specvlm.errors import MediaError
from specvlm.media.content import head_of, line_of
from specvlm.media.frames import Data

MAX_REDIRECTS = 5


@contextmanager
def located(source: Any, config: VideoConfig) -> Iterator[tuple[str, Data]]:
    """Yield the source's name for messages, and its path or bytes; a temporary copy is deleted afterwards."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        yield _named(f"<{len(data)} bytes>", data), data
    elif hasattr(source, "read"):
        with _temporary() as path:
            name = str(getattr(source, "name", "<file object>"))
            _copy(iter(lambda: source.read(1 << 20), b""), path, name, config)
            yield _named(name, path), path
    elif not isinstance(source, str | os.PathLike):
        raise MediaError(
            f"cannot read a {type(source).__name__}: pass a path, URL, bytes, uint8 array or list of images"
        )
    elif (scheme := _scheme(path := os.fspath(source))) in ("http", "https"):
        with _temporary() as copy:
            _download(path, copy, config)
            name = _url_name(path)
            yield _named(name, copy), copy
    elif scheme == "data":
        data = _data_url(path)
        yield _named(f"{path[:30]}...", data), data
    elif scheme in ("file", ""):
        local = _file_path(path) if scheme else path
        yield _named(local, local), local
    else:
        raise MediaError(f"{_url_name(path)}: {scheme}:// is not supported: use a path, file://, http:// or https://")


def _scheme(text: str) -> str:
    """Return "" for a path, else the URL's scheme."""
    if text[:5].lower() == "data:" and "," in text:
        return "data"
    head, found, _ = text.partition("://")
    is_scheme = head.isascii() and head.replace("+", "").replace("-", "").replace(".", "").isalnum()
    return head.lower() if found and is_scheme else ""


def _file_path(url: str) -> str:
    host, slash, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost"):
        raise MediaError(f"{url}: {host} is another machine: write file:///path for a local file")
    return urllib.request.url2pathname(slash + path)


def _url_name(url: str) -> str:
    """Return the URL for messages: without user name, password and query, which may hold secrets."""
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"[:200]


def _data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        if not head.lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(body)
        return base64.b64decode(urllib.parse.unquote(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(
            f"{url[:30]}... is no valid base64 ({line_of(error)}): encode the file's bytes again"
        ) from error


def _named(name: str, data: Data) -> str:
    """Return the name on one line, or raise if there is plainly nothing to read."""
    name = " ".join(name.split())
    if isinstance(data, str):
        if "\0" in data or not os.path.exists(data):
            raise MediaError(f"{name!r} does not exist: check the path".replace("\\x00", "\\0"))
        if os.path.isdir(data):
            raise MediaError(f"{name} is a directory: pass one file, or the list of its images")
    try:
        is_empty = not head_of(data, 1)
    except OSError as error:
        raise MediaError(f"{name} cannot be read ({error.strerror}): check its permissions") from error
    if is_empty:
        raise MediaError(f"{name} is empty (0 bytes): the copy or recording that made it failed")
    return name


@contextmanager
def _temporary() -> Iterator[str]:
    """Yield the path of a file to be made, which is deleted afterwards whatever happens."""
    folder = tempfile.mkdtemp(prefix="specvlm-")
    try:
        yield os.path.join(folder, "media")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(url: str, path: str, config: VideoConfig) -> None:
    """Stream a URL's body to a file."""
    name = _url_name(url)
    client = httpx.Client(follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=config.timeout)
    try:
        with client, client.stream("GET", url) as response:
            if response.is_error:
                raise MediaError(
                    f"{name}: the server answered {response.status_code} {response.reason_phrase}: check the URL"
                )
            if (size := response.headers.get("content-length", "")).isdigit() and int(size) > config.max_download_bytes:
                raise _too_long(name, f"has {size} bytes", config)
            _copy(response.iter_bytes(), path, name, config)
    except httpx.TimeoutException as error:
        raise MediaError(f"{name}: no answer within {config.timeout:g} s: try again or raise --timeout") from error
    except httpx.TooManyRedirects as error:
        raise MediaError(f"{name}: more than {MAX_REDIRECTS} redirects: pass the final URL") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MediaError(f"{name} cannot be fetched ({line_of(error)}): check the URL and the network") from error


def _copy(chunks: Iterable[Any], path: str, name: str, config: VideoConfig) -> None:
    """Write chunks to a file, up to max_download_bytes."""
    count = 0
    try:
        with open(path, "wb") as file:
            for chunk in chunks:
                if not isinstance(chunk, bytes):
                    raise MediaError(f"{name} gives text: open it in binary mode")
                if (count := count + len(chunk)) > config.max_download_bytes:
                    raise _too_long(name, f"has more than {config.max_download_bytes} bytes", config)
                file.write(chunk)
    except OSError as error:
        raise MediaError(
            f"{name} cannot be copied to {tempfile.gettempdir()} ({line_of(error)}): free some space"
        ) from error


def _too_long(name: str, fault: str, config: VideoConfig) -> MediaError:
    return MediaError(f"{name} {fault}, the limit is {config.max_download_bytes}: raise --max-download-bytes")
