"""How long the passes of a pair take, measured by running them: what a policy decides by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from specvlm.core.clock import wait
from specvlm.core.tree import Shape, Tree
from specvlm.runtime.session import Session
from specvlm.speculate.drafters.base import Drafter
from specvlm.speculate.pace import Costs
from specvlm.speculate.policy import WIDTHS

# Rows of a target pass that are worth preparing: on a GPU each is a graph of its own; elsewhere rows cost time.
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
FREE_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 26, 32)
_TIMED = {True: (1, 4, 16, 32, 64), False: (1, 6, 20)}
_DEPTH = 3
_RUNS = {True: 3, False: 2}  # of each; a GPU's first one captures graphs
_LEAST_LEVEL = 0.3  # of a round's first pass: what noise may not undercut


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
    devices, is_captured = {session.model.device, drafter.device}, session.is_captured
    time_of = partial(_ms, devices=devices, runs=_RUNS[is_captured])
    tokens = session.workspace.tokens

    def verify(count: int) -> Callable[[], None]:
        def run() -> None:
            session.step(tokens[:count].clone(), range(-1, count - 1))
            session.keep(())

        return run

    target = {count: time_of(verify(count)) for count in _TIMED[is_captured]}
    if not any(isinstance(option, Shape) for option in options):  # a pass costs what the mean pass does
        deepest = max(options, key=lambda option: option.depth)
        mean = time_of(partial(drafter.rehearse, deepest)) / deepest.depth
        return Costs(target, mean, {1: mean})
    first = time_of(partial(drafter.rehearse, Shape(1, 1, 3)))
    rounds = {width: time_of(partial(drafter.rehearse, Shape(_DEPTH, width, 7))) for width in WIDTHS}
    levels = {width: max((ms - first) / (_DEPTH - 1), _LEAST_LEVEL * first) for width, ms in rounds.items()}
    return Costs(target, first, levels)


def _ms(action: Callable[[], None], devices: set[torch.device], runs: int) -> float:
    """Return the least milliseconds of an action over some runs, to the end of the devices' work.

    Whatever else a machine does makes a run longer, never shorter.
    """
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        action()
        wait(*devices)
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times)
