"""Drafters: each proposes a tree of tokens a round. One file each, found by itself: a class under `@drafter(name)`."""

from importlib import import_module
from pkgutil import iter_modules

from specvlm.speculate.drafters.base import (
    DRAFTERS,
    Context,
    Drafter,
    DraftWarning,
    check,
    create,
    drafter,
    drafter_class,
    model_of,
    propose,
)

__all__ = [
    "DRAFTERS",
    "Context",
    "DraftWarning",
    "Drafter",
    "check",
    "create",
    "drafter",
    "drafter_class",
    "model_of",
    "propose",
]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
