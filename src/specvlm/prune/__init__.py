"""Which visual tokens the draft sees. One file a pruner, found by itself: a new one needs no list to be edited."""

from importlib import import_module
from pkgutil import iter_modules

from specvlm.prune.selection import (
    PRUNERS,
    budget,
    get,
    keeps_all,
    needs_scores,
    pruner,
    reads_scores,
    scoring_layers,
    select,
    shares,
)

__all__ = [
    "PRUNERS",
    "budget",
    "get",
    "keeps_all",
    "needs_scores",
    "pruner",
    "reads_scores",
    "scoring_layers",
    "select",
    "shares",
]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
