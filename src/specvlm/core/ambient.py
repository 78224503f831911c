"""What a program has set for its own torch code concerns no request: autocast, a default device, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def neutral() -> Iterator[None]:
    """Compute without the caller's autocast, default device and gradients; all three are a thread's own in torch.

    The default dtype is a whole process's: it is left alone, and nothing here makes a tensor that depends on it.
    """
    with ExitStack() as contexts:
        contexts.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                contexts.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            contexts.enter_context(torch.device("cpu"))
        yield


def neutral_steps(steps: Iterator[T]) -> Iterator[T]:
    """Yield what an iterator yields, each step of it in `neutral`, which the caller never sees."""
    end = object()
    while True:
        with neutral():
            item = next(steps, end)
        if item is end:
            return
        yield item  # type: ignore[misc]
