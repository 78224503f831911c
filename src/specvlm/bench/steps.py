"""How long single passes take, alone, on a prefilled session: plain, verification and draft steps and their floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from specvlm import prune, tree
from specvlm.bench.hardware import floor_ms, timed
from specvlm.config import EngineConfig
from specvlm.draft import round_passes
from specvlm.engine import Prefilled, SpecVLM

if TYPE_CHECKING:
    from specvlm.session import Session

_REPEATS = 20
_WARM_UP = 3
_FIRST_TOKEN = 300  # any tokens do: a pass does the same work whatever it reads


@dataclass(frozen=True)
class Step:
    """One kind of pass: its median time and what its reads alone would take."""

    ms: float
    floor_ms: float
    rows: int  # of the widest pass


def plain(start: Prefilled, read_gb_s: float) -> Step:
    """Time passes of one row on the target."""
    return _measure(start.session, [(-1,)], read_gb_s)


def verify(start: Prefilled, spec: str, read_gb_s: float) -> Step:
    """Time passes over a whole tree and its root on the target."""
    parents = (-1, *(parent + 1 for parent in tree.parse(spec).parents))
    return _measure(start.session, [parents], read_gb_s)


def draft(model: SpecVLM, start: Prefilled, config: EngineConfig, read_gb_s: float) -> Step:
    """Time the passes of one round on the draft, on the pruned prompt; the mean over its passes."""
    drafter = model.draft
    assert drafter is not None
    keep = prune.select(start.scores, start.prompt.grid, start.prompt.visual_id, config.prune)
    prompt = drafter.encode(start.inputs).select(keep.to(drafter.device))
    session, _, _ = drafter.start(prompt, config.sampling.max_new_tokens + tree.MAX_NODES)
    return _measure(session, round_passes(tree.parse(config.draft.tree)), read_gb_s)


@torch.inference_mode()
def _measure(session: Session, passes: Sequence[tuple[int, ...]], read_gb_s: float) -> Step:
    """Return the mean over the passes of each one's median time; all rows are forgotten after a round of them."""
    model = session.model
    session.rollback()

    def step(parents: tuple[int, ...]) -> Callable[[], object]:
        tokens = torch.arange(_FIRST_TOKEN, _FIRST_TOKEN + len(parents), device=model.device)
        return lambda: session.step(tokens, parents)

    times = timed([step(p) for p in passes], model.device, _WARM_UP + _REPEATS, lambda: session.keep(()))
    mean = statistics.fmean(statistics.median(values[_WARM_UP:]) for values in times)
    rows = max(map(len, passes))
    return Step(mean, floor_ms(model, session.length + rows, read_gb_s), rows)
