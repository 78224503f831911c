"""http(s) URLs: the bytes of an answer, bounded in size and time whatever the server does."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import httpx

from specvlm.core.config import VideoConfig
from specvlm.core.errors import ConfigError, MediaError
from specvlm.media.content import line_of

MAX_REDIRECTS = 5
MIN_RATE = 16 << 10  # bytes a second that a download must bring on the average
_PIECE = 1 << 20  # bytes unpacked at once
_WINDOWS = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
_MAX_ENCODINGS = 2
ENVIRONMENT = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


def url_name(url: str) -> str:
    """Return the URL for messages: without user name, password and query, which may hold secrets."""
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"[:200]
    return shown.encode("utf-8", "backslashreplace").decode()


def too_long(name: str, fault: str, config: VideoConfig) -> MediaError:
    """Return the error of a source that has more bytes than are allowed."""
    return MediaError(f"{name} {fault}, the limit is {config.max_download_bytes}: raise --max-download-bytes")


def download(url: str, config: VideoConfig) -> Iterator[bytes]:
    """Yield the body of a URL's answer, unpacked.

    Args:
        url: http:// or https://.
        config: max_download_bytes bounds the body, packed and unpacked; `timeout` seconds may pass until the answer
            begins, redirects included, or without MIN_RATE bytes a second.

    Raises:
        MediaError: it cannot be fetched within these bounds.
        ConfigError: the environment's proxy or certificates cannot be used.
    """
    name, watchdog = url_name(url), _Watchdog(config.timeout)
    client = _client(config.timeout)
    try:
        with client, watchdog, client.stream("GET", url, extensions={"trace": watchdog.trace}) as response:
            _check_answer(name, response, config)
            chunks = watchdog.counted(response.iter_raw())
            yield from _unpacked(name, chunks, response.headers.get("content-encoding", ""), config)
    except httpx.TooManyRedirects as error:
        raise MediaError(f"{name}: more than {MAX_REDIRECTS} redirects: pass the final URL") from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError) as error:
        if watchdog.has_barked or isinstance(error, httpx.TimeoutException):
            raise _too_slow(name, watchdog.count, config) from error
        # ValueError: a host that IDNA refuses, a surrogate in the address
        checked = ", ".join(["the URL", "the network", *_in_force("PROXY")])
        raise MediaError(f"{name} cannot be fetched ({line_of(error)[:200]}): check {checked}") from error


def _client(timeout: float) -> httpx.Client:
    """Return a client that takes proxy and certificates from the environment, as curl does."""
    wait = min(timeout, threading.TIMEOUT_MAX)
    try:
        return httpx.Client(
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            timeout=wait,
            headers={"Accept-Encoding": "identity"},  # media are packed already
        )
    except (httpx.InvalidURL, ImportError, OSError, ValueError) as error:
        names = " or ".join(_in_force("")) or "network setting"
        problem = f"the environment's {names} cannot be used ({line_of(error)[:200]})"
        raise ConfigError(f"{problem}: correct it or unset it") from error


def _in_force(part: str) -> list[str]:
    """Return the variables of the environment that are set and have `part` in their names."""
    there = {name.upper() for name, value in os.environ.items() if value}
    return [name for name in ENVIRONMENT if name in there and part in name]


def _check_answer(name: str, response: httpx.Response, config: VideoConfig) -> None:
    if response.is_error:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        raise MediaError(f"{name}: the server answered {status}: check the URL")
    size = response.headers.get("content-length", "")
    if re.fullmatch(r"[0-9]{1,20}", size) and int(size) > config.max_download_bytes:
        raise too_long(name, f"has {size} bytes", config)


def _too_slow(name: str, count: int, config: VideoConfig) -> MediaError:
    if not count:
        return MediaError(f"{name}: no answer within {config.timeout:g} s: try again or raise --timeout")
    slow = f"{count} bytes came and then too few (below {MIN_RATE >> 10} KiB/s over {config.timeout:g} s)"
    return MediaError(f"{name}: {slow}: try again or raise --timeout")


class _Watchdog:
    """Cuts the connections of one download when its time is up.

    A client's own timeouts bound one read each: a server that sends a byte now and then, or one interim answer after
    the other, would be waited for without end.
    """

    def __init__(self, timeout: float) -> None:
        self.count = 0  # bytes of the body so far
        self.has_barked = False
        self._timeout = min(timeout, threading.TIMEOUT_MAX / 2)  # seconds
        self._deadline = time.monotonic() + self._timeout
        self._is_over = threading.Event()
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Remember every connection; the client calls it (httpx's extension "trace")."""
        stream = info.get("return_value")
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")) and stream is not None:
            self._sockets.append(stream.get_extra_info("socket"))

    def counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the chunks; each gives the download more time, `timeout` seconds from now at most."""
        for chunk in chunks:
            self.count += len(chunk)
            self._deadline = min(self._deadline + len(chunk) / MIN_RATE, time.monotonic() + self._timeout)
            yield chunk
        if self.has_barked:  # an answer without a length ends where its connection does
            raise httpx.ReadTimeout("cut")

    def _watch(self) -> None:
        while not self._is_over.wait(max(self._deadline - time.monotonic(), 0)):
            if time.monotonic() >= self._deadline:
                self.has_barked = True
                for each in list(self._sockets):
                    with suppress(OSError):
                        socket.socket.shutdown(each, socket.SHUT_RDWR)  # a read in progress ends
                self._deadline = time.monotonic() + 0.1  # until the client has noticed, also on a new connection


# Content encodings


def _unpacked(name: str, chunks: Iterable[bytes], encodings: str, config: VideoConfig) -> Iterator[bytes]:
    """Yield a body without its content encodings, the last of which was applied last."""
    layers = [layer.strip().lower() for layer in encodings.split(",") if layer.strip().lower() not in ("", "identity")]
    if len(layers) > _MAX_ENCODINGS or any(layer not in _WINDOWS for layer in layers):
        raise MediaError(f"{name}: its bytes are packed as {', '.join(layers)[:80]!r}: serve the file as it is")
    for layer in reversed(layers):
        chunks = _inflated(name, chunks, _WINDOWS[layer], config)
    return iter(chunks)


def _inflated(name: str, chunks: Iterable[bytes], window: int, config: VideoConfig) -> Iterator[bytes]:
    """Yield what packed chunks hold, in pieces, up to max_download_bytes."""
    count, engine = 0, zlib.decompressobj(window)
    try:
        for chunk in chunks:
            while chunk:
                if engine.eof:  # gzip allows one member behind the other
                    engine = zlib.decompressobj(window)
                piece = engine.decompress(chunk, _PIECE)
                chunk = engine.unused_data if engine.eof else engine.unconsumed_tail
                count += len(piece)
                if count > config.max_download_bytes:
                    raise too_long(name, f"unpacks to more than {config.max_download_bytes} bytes", config)
                yield piece
    except zlib.error as error:
        raise MediaError(f"{name}: its packed bytes are damaged ({line_of(error)}): fetch it again") from error
    if not engine.eof:
        raise MediaError(f"{name}: its packed bytes end too early: fetch it again")
