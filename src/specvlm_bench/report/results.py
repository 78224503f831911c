"""The results of one run, as tables and figures ask for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from specvlm.core.config import PruneConfig
from specvlm.core.errors import ConfigError
from specvlm_bench import journal
from specvlm_bench.journal import PLAIN, Line

_NEEDED = {
    "run": ("command", "commit", "versions", "started", "data", "target", "draft", "device", "gpu", "cores", "dtype",
            "draft_quant", "settings", "samples", "is_timed", "methods"),
    "answer": ("sample", "video", "prompt", "method", "text", "token_ids", "new_tokens", "new_tokens_with_eos",
               "visual_tokens", "kept_visual_tokens", "target_passes", "rounds", "mean_accepted_length",
               "acceptance_length", "accepted_per_depth", "drafted_per_pass", "tokens_per_pass", "seconds",
               "ms_per_token", "peak_memory_bytes"),
    "failure": ("sample", "method", "text"),
    "problem": ("where", "text"),
    "difference": ("sample", "method", "index", "plain_token", "other_token", "plain_text", "other_text", "gap"),
    "overlay": ("sample", "method", "file", "summary"),
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Where an answer parts from plain decoding's."""

    sample: str
    method: str
    index: int  # of the first token that differs
    plain_token: int | None  # None: plain's text had ended
    other_token: int | None
    plain_text: str | None  # of the token; None where it is not known
    other_text: str | None
    gap: float | None  # logit of plain's token minus the other's; None where it is not known


@dataclass(frozen=True)
class Results:
    """One run.

    Args:
        name: what the report calls the run.
        run: its journal.
        prefix: what names of the run's files begin with.
    """

    name: str
    run: journal.Run
    prefix: str = ""

    @property
    def origin(self) -> Line:
        """What ran, on what, with which settings."""
        return self.run.origin

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods that were to run."""
        return tuple(self.origin["methods"])

    @cached_property
    def answers(self) -> dict[tuple[str, str], Line]:
        """The answers, {(sample, method): line}."""
        return self.run.answers

    @cached_property
    def samples(self) -> tuple[str, ...]:
        """The samples that have an answer."""
        return tuple(dict.fromkeys(sample for sample, _ in self.answers))

    @property
    def num_videos(self) -> int:
        """Videos that the samples are of."""
        return len({line["video"] for line in self.answers.values()})

    @property
    def num_expected(self) -> int:
        """Answers and failures of the finished run."""
        return int(self.origin["samples"]) * len(self.methods)

    @cached_property
    def failures(self) -> list[Line]:
        """The last failure of each sample and method that have no answer."""
        found = {(line["sample"], line["method"]): line for line in self.run.of_kind("failure")}
        return [line for pair, line in found.items() if pair not in self.answers]

    @cached_property
    def problems(self) -> list[tuple[str, str]]:
        """Samples that the data do not give: where and why, once each however often the run was begun."""
        return list(dict.fromkeys((line["where"], line["text"]) for line in self.run.of_kind("problem")))

    @cached_property
    def overlays(self) -> dict[tuple[str, str], Line]:
        """The pictures of what was kept, {(sample, method): line}."""
        return {(line["sample"], line["method"]): line for line in self.run.of_kind("overlay")}

    def of(self, method: str) -> list[Line]:
        """Return the answers of a method."""
        return [line for (_, name), line in self.answers.items() if name == method]

    def drafted(self, method: str) -> list[Line]:
        """Return the answers of a method in which something was drafted."""
        return [line for line in self.of(method) if line["rounds"]]

    @cached_property
    def drafting(self) -> tuple[str, ...]:
        """The methods of which an answer was drafted."""
        return tuple(method for method in self.methods if self.drafted(method))

    def plain(self, sample: str) -> Line | None:
        """Return plain decoding's answer to a sample."""
        return self.answers.get((sample, PLAIN))

    def beside_plain(self, method: str) -> list[tuple[Line, Line]]:
        """Return (plain decoding's answer, the method's) for each sample that has both."""
        pairs = ((self.plain(line["sample"]), line) for line in self.of(method))
        return [(plain, line) for plain, line in pairs if plain is not None]

    def settings(self, method: str) -> dict[str, Any]:
        """Return a method's settings, with those that all share and, for pruning, the defaults."""
        defaults = {field.name: field.default for field in fields(PruneConfig)}
        return {**defaults, **self.origin["settings"], **self.origin["methods"][method]}

    @cached_property
    def compared(self) -> int:
        """Answers that plain decoding's are there to compare with, its own left out."""
        return sum(len(self.beside_plain(method)) for method in self.methods if method != PLAIN)

    @cached_property
    def differences(self) -> list[Difference]:
        """Where answers part from plain decoding's, in the order of the answers."""
        known = {(line["sample"], line["method"]): line for line in self.run.of_kind("difference")}
        found = []
        for (sample, method), line in self.answers.items():
            plain = self.plain(sample)
            if plain is not None and plain["token_ids"] != line["token_ids"]:
                told = known.get((sample, method), {})
                found.append(_difference(plain["token_ids"], line, told))
        return found


def _difference(plain_ids: Sequence[int], line: Line, told: Line) -> Difference:
    """Return where an answer parts from plain decoding's; a killed run may have `told` nothing of it."""
    pairs = zip_longest(plain_ids, line["token_ids"])
    index, (plain, other) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
    texts = (told.get(name) for name in ("plain_text", "other_text", "gap"))
    return Difference(line["sample"], line["method"], index, plain, other, *texts)


def load(directories: Sequence[Path]) -> list[Results]:
    """Return the results of several runs, each under a name of its own: its folder's, or path where two are the same.

    Raises:
        ConfigError: none is named, one twice, or a folder holds no run; or a line lacks what a report is made of.
    """
    if not directories:
        raise ConfigError("no run is named: give one or more --out folders of bench quality")
    places = [directory.resolve() for directory in directories]
    if twice := [directory for place, directory in enumerate(directories) if places[place] in places[:place]]:
        raise ConfigError(f"{twice[0]} is named twice: name each run once")
    names = [place.name for place in places]
    found = []
    for number, (name, directory) in enumerate(zip(names, directories, strict=True), 1):
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        prefix = "" if len(directories) == 1 else f"{number}-{slug}-"
        own = name if names.count(name) == 1 else str(directory)
        found.append(Results(own, _checked(journal.read(directory)), prefix))
    return found


def _checked(run: journal.Run) -> journal.Run:
    for number, line in enumerate((run.origin, *run.lines), 1):
        for name in _NEEDED.get(line["kind"], ()):
            if name not in line:
                raise ConfigError(
                    f"{run.directory / journal.NAME}, line {number} has no {name}: give the --out of a bench quality "
                    "of this version"
                )
    return run
