"""Every error that specvlm raises on purpose; each message names the value at fault and the remedy.

SpecVLMError
  ConfigError        a setting: which, its value, what is allowed
  UnsupportedModel   an unknown model_type; target and draft that do not share a tokenizer or a video grid
  MediaError         cannot open, no frames, corrupt, too large: the file, the cause, the remedy
  CapacityError      prompt + new tokens do not fit: the numbers, and what would
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SpecVLMError(Exception):
    """Base of all errors below; the CLI prints its message on one line and exits with 2."""


class ConfigError(SpecVLMError, ValueError):
    """A setting has a value that is not allowed."""


class UnsupportedModel(SpecVLMError):
    """The checkpoint cannot be served, or target and draft do not fit each other."""


class MediaError(SpecVLMError):
    """A video or image cannot be used."""


class CapacityError(SpecVLMError):
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
        raise CapacityError(
            f"out of memory on {place} ({cause}): read fewer frames (--num-frames, --fps), smaller ones "
            "(--max-pixels), or ask for fewer new tokens (--max-new-tokens)"
        ) from error


def one_line(error: BaseException) -> str:
    """Return what an error says on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
