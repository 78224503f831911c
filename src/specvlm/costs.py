"""How long the passes of a pair take, measured by running them: what a policy decides by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from specvlm.draft import Drafter
from specvlm.policy import Costs
from specvlm.session import Session
from specvlm.tree import Shape, Tree

# Rows of a target pass that are worth preparing: on a GPU each is a graph of its own; elsewhere rows cost time.
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
FREE_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 26, 32)
_TIMED = {True: (1, 4, 16, 32, 64), False: (1, 6, 20)}
_WIDTHS = (1, 4, 8)
_DEPTH = 3
_REPEATS = 2


def sizes(session: Session) -> tuple[int, ...]:
    """Return the numbers of rows that the target is prepared to verify."""
    return GRAPH_SIZES if session.is_captured else FREE_SIZES


def measure(session: Session, drafter: Drafter, options: Sequence[Shape | Tree]) -> Costs:
    """Time target passes and draft rounds at the present length; all rows are forgotten.

    Args:
        session: the target's.
        drafter: begun.
        options: what may be drafted.
    """
    devices = {session.model.device, drafter.device}
    tokens = session.workspace.tokens

    def verify(count: int) -> Callable[[], None]:
        def run() -> None:
            session.step(tokens[:count].clone(), range(-1, count - 1))
            session.keep(())

        return run

    target = {count: _ms(verify(count), devices) for count in _TIMED[session.is_captured]}
    if not any(isinstance(option, Shape) for option in options):
        return Costs(target, *_static(drafter, options, devices))
    first = _ms(lambda: drafter.rehearse(Shape(1, 1, 3)), devices)
    rounds = {width: _ms(partial(drafter.rehearse, Shape(_DEPTH, width, 7)), devices) for width in _WIDTHS}
    return Costs(target, first, {width: max((ms - first) / (_DEPTH - 1), 0.0) for width, ms in rounds.items()})


def _static(
    drafter: Drafter, options: Sequence[Shape | Tree], devices: set[torch.device]
) -> tuple[float, dict[int, float]]:
    """Return first and level of drafters that draft static trees only: a pass costs what the mean pass does."""
    deepest = max(options, key=lambda option: option.depth)
    ms = _ms(lambda: drafter.rehearse(deepest), devices) / deepest.depth
    return ms, {1: ms}


def _ms(action: Callable[[], None], devices: set[torch.device]) -> float:
    """Return the least milliseconds of an action, to the end of the devices' work; it runs once before.

    Whatever else a machine does makes a run longer, never shorter.
    """
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        action()
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times[1:])
