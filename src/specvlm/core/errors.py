"""Every error that specvlm raises on purpose; each message names the value at fault and the remedy.

SpecVLMError
  ConfigError        a setting: which, its value, what is allowed
  UnsupportedModel   an unknown model_type; target and draft that do not share a tokenizer or a video grid
  MediaError         cannot open, no frames, corrupt, too large: the file, the cause, the remedy
  CapacityError      prompt + new tokens do not fit: the numbers, and what would
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SpecVLMError(Exception):
    """Base of all errors below; the CLI prints its message on one line and exits with 2."""


class SpecVLMWarning(UserWarning):
    """Base of all warnings of this package."""


class ConfigError(SpecVLMError, ValueError):
    """A setting has a value that is not allowed."""


class UnsupportedModel(SpecVLMError):
    """The checkpoint cannot be served, or target and draft do not fit each other."""


class MediaError(SpecVLMError):
    """A video or image cannot be used."""


class Advice(Exception):
    """Words that advise settings, and name them as the reader writes them: in Python or on a command line.

    Args:
        text: with the settings in braces: "{num_frames}" reads num_frames=96, or --num-frames 96.
        settings: the values that are advised; None stands for one of the reader's own.
    """

    def __init__(self, text: str, **settings: object) -> None:
        super().__init__(text, settings)
        self._text, self._settings = text, settings

    def __reduce__(self) -> tuple[Any, ...]:
        return _advice, (type(self), self._text, self._settings)

    def __str__(self) -> str:
        return self._told(lambda name, value: name if value is None else f"{name}={value!r}")

    def on_command_line(self) -> str:
        """Return the words with options in place of settings."""
        option = "--{}".format
        return self._told(
            lambda name, value: " ".join([option(name.replace("_", "-")), *([] if value is None else [str(value)])])
        )

    def _told(self, named: Callable[[str, object], str]) -> str:
        text = self._text
        for name, value in self._settings.items():
            text = text.replace(f"{{{name}}}", named(name, value))
        return text


def _advice(kind: type[Advice], text: str, settings: dict[str, object]) -> Advice:
    return kind(text, **settings)


class CapacityError(Advice, SpecVLMError):
    """The prompt and the new tokens do not fit."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a lack of memory within the block into a CapacityError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's; it may not be imported yet
        if not (is_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        place = "the GPU" if is_gpu else "this machine"
        cause = (str(error).strip() or "no more").splitlines()[0]
        remedy = "read fewer frames ({num_frames}, {fps}), smaller ones ({max_pixels}), or ask for fewer new tokens"
        names: dict[str, object] = dict.fromkeys(("num_frames", "fps", "max_pixels", "max_new_tokens"))
        problem = f"out of memory on {place} ({cause})"
        raise CapacityError(f"{problem}: {remedy} ({{max_new_tokens}})", **names) from error


def one_line(error: BaseException) -> str:
    """Return what an error says on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
