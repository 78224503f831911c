"""Published sets from the hub: the files that are needed, in the layout of the repository, archives unpacked."""

from __future__ import annotations

import io
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download

from specvlm.core.errors import ConfigError, one_line


def fetch(name: str, repository: str, patterns: Iterable[str]) -> Path:
    """Fetch the files that match, as far as they are not there yet.

    Returns:
        The set's folder, in the hub's own cache folder (HF_HOME).

    Raises:
        ConfigError: they cannot be fetched.
    """
    folder = Path(constants.HF_HOME) / "specvlm" / name
    try:
        snapshot_download(repository, repo_type="dataset", allow_patterns=sorted(patterns), local_dir=folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be fetched from the hub ({one_line(error)}): accept its terms and log in, or download "
            f"{repository} by other means, unpack its archives and give the folder"
        ) from error
    return folder


def unpack(folder: Path, patterns: Iterable[str]) -> None:
    """Unpack the archives that match, each into the folder that holds it; what is there already is left alone.

    A .zip is one archive; files that end in .part.aa, .part.ab and so on are the parts of one .tar.

    Raises:
        ConfigError: an archive is damaged, or the disk is full.
    """
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        try:
            for file in (file for file in files if file.suffix == ".zip"):
                _unzip(file)
            if parts := [file for file in files if ".tar.part." in file.name]:
                _untar(parts)
        except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
            text = f"{folder / pattern} cannot be unpacked ({one_line(error)}): free space, or remove it, and run again"
            raise ConfigError(text) from error


def _unzip(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                _place(file.parent, member.filename, partial(archive.extract, member))


def _untar(parts: Sequence[Path]) -> None:
    with _Joined(parts) as joined, tarfile.open(fileobj=joined, mode="r|") as archive:
        for member in archive:
            if member.isfile():
                _place(parts[0].parent, member.name, partial(archive.extract, member, filter="data"))


def _place(folder: Path, name: str, extract: Callable[[str], object]) -> None:
    """Unpack a member that is not there. It appears when it is whole: a run that is killed leaves no half of it."""
    member = Path(name)
    if member.is_absolute() or ".." in member.parts:
        raise OSError(f"it holds {name!r}, a path out of its folder")
    if not (folder / member).exists():
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            extract(staging)
            (folder / member).parent.mkdir(parents=True, exist_ok=True)
            (Path(staging) / member).rename(folder / member)


class _Joined(io.RawIOBase):
    """Several files, read as one."""

    def __init__(self, parts: Iterable[Path]) -> None:
        self._parts = iter(parts)
        self._file: io.RawIOBase = io.FileIO(next(self._parts))

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the part at hand goes; 0 at the end of the last."""
        while not (count := self._file.readinto(buffer)):
            part = next(self._parts, None)
            if part is None:
                return 0
            self._file.close()
            self._file = io.FileIO(part)
        return count

    def close(self) -> None:
        """Close the part at hand."""
        self._file.close()
        super().close()
