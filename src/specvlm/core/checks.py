"""What can be said about a value before torch is imported, which takes seconds: names, trees, devices, paths."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specvlm.core import names, tree
from specvlm.core.config import DraftConfig, EngineConfig, shown
from specvlm.core.errors import ConfigError, UnsupportedModel

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DEVICE = re.compile(r"auto|cpu(:0)?|cuda(:[0-9]{1,4})?")


def pruners() -> Collection[str]:
    """Return the names of the pruners: those of this package, and once torch is there those that were registered."""
    found: Collection[str] = getattr(sys.modules.get("specvlm.prune.selection"), "PRUNERS", names.pruners())
    return found


def drafters() -> Collection[str]:
    """Return the names of the drafters, as `pruners` does."""
    found: Collection[str] = getattr(sys.modules.get("specvlm.speculate.drafters.base"), "DRAFTERS", names.DRAFTERS)
    return found


def policies() -> Collection[str]:
    """Return the names of the policies, as `pruners` does."""
    return (*names.POLICIES, *getattr(sys.modules.get("specvlm.speculate.policy"), "POLICIES", ()))


def prunes(drafter: str) -> bool:
    """Whether a drafter sees what a pruner keeps."""
    registered: dict[str, Any] = getattr(sys.modules.get("specvlm.speculate.drafters.base"), "DRAFTERS", {})
    return bool(registered[drafter].prunes) if drafter in registered else names.DRAFTERS[drafter]


def known(setting: str, value: str, among: Iterable[str]) -> None:
    """Refuse a name that is none of these.

    Raises:
        ConfigError: it is not; the known ones are listed.
    """
    if value not in among:
        raise ConfigError(f"{setting}={shown(value)} is not allowed: known are {', '.join(sorted(among))}")


def drafting(config: DraftConfig) -> None:
    """Refuse a tree that does not exist, or that no pass can verify beside the looked-up tokens.

    Raises:
        ConfigError: so it is.
    """
    most = tree.MAX_NODES - len(tree.parse(config.tree))
    if config.lookup_tokens > most:
        allowed = f"at most {most} beside tree={shown(config.tree)}: a pass verifies {tree.MAX_NODES}"
        raise ConfigError(f"lookup_tokens={config.lookup_tokens} is not allowed: {allowed}")


def settings(config: EngineConfig, *, is_extended: bool) -> None:
    """Refuse a config that no request can have.

    Args:
        config: all settings.
        is_extended: files will be run that may register names, so that an unknown one may be known later.

    Raises:
        ConfigError: a name or a tree does not exist.
    """
    drafting(config.draft)
    if not is_extended:
        known("drafter", config.draft.drafter, drafters())
        known("pruner", config.prune.pruner, pruners())
        if config.draft.policy is not None:
            known("policy", config.draft.policy, policies())


def device(value: object, setting: str = "device") -> None:
    """Refuse what is no device that is served; whether it is there is another question.

    Raises:
        ConfigError: so it is.
    """
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        problem = f"{setting}={shown(value)} is not served"
        raise ConfigError(f"{problem}: choose auto, cpu, cuda, or cuda:1 and so on")


def dtype(value: object) -> None:
    """Refuse what is no type of numbers that is served.

    Raises:
        ConfigError: so it is.
    """
    if not isinstance(value, str) or value not in ("auto", *names.DTYPES):
        raise ConfigError(f"dtype={shown(value)} is not allowed: auto, {', '.join(names.DTYPES)}")


def quant(value: object) -> None:
    """Refuse what is no quantisation of a draft.

    Raises:
        ConfigError: so it is.
    """
    if not isinstance(value, str) or value not in names.QUANTS:
        raise ConfigError(f"draft_quant={shown(value)} is not allowed: {', '.join(names.QUANTS)}")


def checkpoint(name: str) -> None:
    """Refuse what is neither a directory nor may be a hub id.

    Raises:
        UnsupportedModel: so it is.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return
    if os.path.lexists(path):
        raise UnsupportedModel(f"{name} is no directory: give the Hugging Face directory that holds the model")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UnsupportedModel(f"there is no directory {name}: give a Hugging Face directory or hub id (owner/name)")


def file_to_write(name: str) -> None:
    """Try to write a file: one that is there keeps its content, of a new one nothing is left.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(name)
    try:
        with _folder(path.parent):
            is_new = not path.exists()
            open(path, "a").close()
            if is_new:
                path.unlink()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name} cannot be written ({problem}): give another file") from error


def folder_to_write(name: str | os.PathLike[str]) -> None:
    """Try to write to a folder, of which nothing is left where it is new.

    Raises:
        ConfigError: files cannot be written there.
    """
    try:
        with _folder(Path(name)):
            tempfile.TemporaryFile(dir=name).close()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name} cannot be written ({problem}): give another folder") from error


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder with those above it for the block, and take away again what was not there before."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
