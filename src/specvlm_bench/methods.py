"""Named methods: what a quality run compares. A method is settings beside those that all methods share.

    METHODS["mine"] = {"drafter": "model", "tree": "0,1,00", "policy": "fixed"}     # add one by name

Every registered pruner is a method too, once a keep_ratio, and so is every registered drafter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from specvlm.core import checks, config
from specvlm.core.errors import ConfigError
from specvlm_bench.journal import PLAIN

Settings = Mapping[str, Any]

GENERATE = "generate"  # transformers' own generate(): no settings of this engine
_TREE: Settings = {"drafter": "model", "policy": "fixed"}  # and a tree: drafted in every round

METHODS: dict[str, Settings] = {
    PLAIN: {"drafter": "none"},
    GENERATE: {"drafter": "none"},
    "chain": {**_TREE, "tree": "chain:5", "pruner": "none"},
    "tree": {**_TREE, "pruner": "none"},
    "auto": {"drafter": "model", "tree": "dynamic", "policy": "auto"},
}
DEFAULT = (PLAIN, GENERATE, "chain", "tree", "verifier", "uniform", "auto")
DECIDES = ("drafter", "policy", "tree", "pruner")  # settings that are a method's own, never shared
_NO_METHOD = ("none", "model")  # drafters that stand for plain and tree


def named(names: Iterable[str], keep_ratios: Sequence[float], tree: str = "paper") -> dict[str, dict[str, Any]]:
    """Return the settings of the named methods; a pruner gives one a keep_ratio, `NAME@RATIO` one at that ratio.

    Args:
        names: of METHODS, of pruners, or of drafters.
        keep_ratios: what a pruner without a ratio of its own is crossed with.
        tree: what is drafted where a method has no tree of its own.

    Raises:
        ConfigError: a name is unknown (the known ones are listed), or a ratio is no number.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        base, _, ratio = name.partition("@")
        settings = _settings(base, tree)
        if ratio and not _prunes(settings):
            raise ConfigError(f"method {name!r} is not allowed: {base} prunes nothing, so leave the @ out")
        is_crossed = base in checks.pruners() and base not in METHODS
        for keep_ratio in [_ratio(name, ratio)] if ratio else keep_ratios if is_crossed else [None]:
            label = base if keep_ratio is None else f"{base}@{keep_ratio:g}"
            found[label] = settings if keep_ratio is None else {**settings, "keep_ratio": keep_ratio}
    return found


def written(name: str, settings: Iterable[str], tree: str = "paper") -> dict[str, Any]:
    """Return the settings of a method from text: those of `tree`, changed as each "setting=value" says.

    Raises:
        ConfigError: a text is no such pair, a setting is unknown, or the name is not allowed.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.,=@+-]*", name) or name in METHODS:
        allowed = "one that is not taken, of letters, digits and .,=@+-_"
        raise ConfigError(f"method {name!r} is not allowed as a name of your own: give {allowed}")
    found = {**_TREE, "tree": tree}
    for text in settings:
        setting, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} of method {name!r} is not allowed: write setting=value")
        found[setting] = config.parsed(setting, value)
    return found


def _settings(name: str, tree: str) -> dict[str, Any]:
    if name in METHODS:
        settings = dict(METHODS[name])
    elif name in checks.pruners() and name != "none":
        settings = {**_TREE, "pruner": name}
    elif name in checks.drafters() and name not in _NO_METHOD:
        settings = {"drafter": name, "policy": "auto"} if name == "lookup" else {"drafter": name, "policy": "fixed"}
    else:
        drafters = [other for other in checks.drafters() if other not in _NO_METHOD]
        known = [*METHODS, *(other for other in checks.pruners() if other != "none"), *drafters]
        raise ConfigError(f"method {name!r} is not allowed: known are {', '.join(known)}")
    if settings.get("policy") == "fixed":
        settings.setdefault("tree", tree)
    return settings


def _prunes(settings: Settings) -> bool:
    return checks.prunes(settings["drafter"]) and settings.get("pruner") != "none"


def _ratio(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"method {name!r} is not allowed: write a keep_ratio behind the @, such as 0.1") from error
