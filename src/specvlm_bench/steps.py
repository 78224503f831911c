"""How long single passes take, alone, on a prefilled session: plain, verification and draft steps and their floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from specvlm import prune
from specvlm.core import tree
from specvlm.core.config import EngineConfig
from specvlm.engine.api import SpecVLM
from specvlm.engine.request import Prefilled
from specvlm_bench.hardware import floor_ms, timed

if TYPE_CHECKING:
    from specvlm.runtime.session import Session

VERIFIED_ROWS = (1, 8, 16, 24, 32, 48, 64)  # of target passes: a root and its nodes
DRAFTED_ROWS = (1, 4, 8)  # of the passes that a dynamic tree grows by
_REPEATS = 20
_WARM_UP = 3
_FIRST_TOKEN = 300  # any tokens do: a pass does the same work whatever it reads


@dataclass(frozen=True)
class Step:
    """One kind of pass: its median time and what its reads alone would take."""

    ms: float
    floor_ms: float
    rows: int  # of the widest pass


def verify(start: Prefilled, rows: int, read_gb_s: float) -> Step:
    """Time passes of this many rows on the target: a tree and its root, one row for a plain step."""
    return _measure(start.session, [rows], read_gb_s)


def draft_session(model: SpecVLM, start: Prefilled, config: EngineConfig) -> Session:
    """Return a session of the draft that holds the pruned prompt."""
    drafter, room = model.draft, config.sampling.max_new_tokens + 2 * tree.MAX_NODES
    assert drafter is not None
    start.session.rollback()
    keep = prune.select(start.scores, start.prompt.grid, start.prompt.visual_id, config.prune)
    if config.draft.drafter == "self":
        return drafter.branch(start.prompt.select(keep), start.session, start.prompt.rows(keep), room)
    return drafter.start(drafter.encode(start.inputs).select(keep.to(drafter.device)), room)[0]


def draft(session: Session, passes: Sequence[int], read_gb_s: float) -> Step:
    """Time passes of so many rows on a draft; the mean over them."""
    return _measure(session, passes, read_gb_s)


@torch.inference_mode()
def _measure(session: Session, passes: Sequence[int], read_gb_s: float) -> Step:
    """Return the mean over the passes of each one's median time; all rows are forgotten after a round of them.

    Args:
        session: at the end of its prompt.
        passes: rows of each. They are siblings: which rows see each other makes no difference to the time.
        read_gb_s: the device's read rate.
    """
    model = session.model
    session.rollback()

    def step(rows: int) -> Callable[[], object]:
        tokens = torch.arange(_FIRST_TOKEN, _FIRST_TOKEN + rows, device=model.device)
        return lambda: session.step(tokens, (-1,) * rows)

    times = timed([step(rows) for rows in passes], model.device, _WARM_UP + _REPEATS, lambda: session.keep(()))
    mean = statistics.fmean(statistics.median(values[_WARM_UP:]) for values in times)
    return Step(mean, floor_ms(model, session.length + max(passes), read_gb_s), max(passes))
