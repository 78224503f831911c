"""Plain and speculative decoding of one question, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from specvlm.core.errors import ConfigError
from specvlm.engine.account import Generation
from specvlm.engine.api import SpecVLM

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Difference:
    """The first token that differs; None stands for the end of the text."""

    index: int
    plain: int | None
    speculative: int | None
    plain_text: str  # what it stands for
    speculative_text: str


@dataclass(frozen=True)
class Comparison:
    """The two answers and where they part."""

    plain: Generation
    speculative: Generation
    difference: Difference | None

    @property
    def is_identical(self) -> bool:
        """Whether the token ids are the same."""
        return self.difference is None

    @property
    def speedup(self) -> dict[str, float]:
        """Plain time over speculative time: of a token after the first, and of the whole answer."""
        pairs = {
            "token": (ms_a_token(self.plain), ms_a_token(self.speculative)),
            "total": (self.plain.seconds.total, self.speculative.seconds.total),
        }
        return {name: plain / speculative if speculative else 0.0 for name, (plain, speculative) in pairs.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "plain": self.plain.to_dict(),
            "speculative": self.speculative.to_dict(),
            "ms_a_token": {"plain": ms_a_token(self.plain), "speculative": ms_a_token(self.speculative)},
            "speedup": self.speedup,
            "identical": self.is_identical,
            "first_difference": asdict(self.difference) if self.difference else None,
        }

    def table(self) -> str:
        """Return the two runs side by side and the verdict."""
        rows = [("", "plain", "speculative"), *zip(_LABELS, _cells(self.plain), _cells(self.speculative), strict=True)]
        lines = [f"{label:<22}{plain:>10}  {speculative:>12}" for label, plain, speculative in rows]
        speedup = self.speedup
        lines += ["", f"speedup: {speedup['token']:.2f}x a token, {speedup['total']:.2f}x in all", self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        found = self.difference
        if found is None:
            return "identical: yes"
        return (
            f"identical: no, first at token {found.index}: plain {found.plain_text!r} ({found.plain}), "
            f"speculative {found.speculative_text!r} ({found.speculative})"
        )


_LABELS = (
    "ms a token",
    "tokens",
    "target passes",
    "MAT",
    "acceptance length",
    "time to first token, s",
    "total, s",
)


def _cells(generation: Generation) -> tuple[str, ...]:
    speculation, seconds = generation.speculation, generation.seconds
    return (
        f"{ms_a_token(generation):.2f}",
        f"{generation.usage.completion_tokens}",
        f"{speculation.target_passes}",
        f"{speculation.mean_accepted_length:.2f}" if speculation.rounds else "-",
        f"{speculation.acceptance_length:.2f}",
        f"{seconds.time_to_first_token:.3f}",
        f"{seconds.total:.3f}",
    )


def ms_a_token(generation: Generation) -> float:
    """Return the milliseconds of a token after the first, 0 where there is none.

    Pruning and the draft's prefill are in it; what comes once for a length (timed passes, captured graphs) is not.
    """
    seconds, later = generation.seconds, generation.usage.completion_tokens - 1
    spent = seconds.total - seconds.time_to_first_token - seconds["calibrate"] - seconds["capture"]
    return 1000 * spent / later if later else 0.0


def compare(
    model: SpecVLM,
    source: Any,
    prompt: str | None = None,
    *,
    watch: Callable[[str], Callable[[str], None]] = lambda prefix: lambda name: None,
) -> Comparison:
    """Answer a question plainly and speculatively, after a short warm-up of both.

    The video is read once, before the clock runs.

    Args:
        model: a pair.
        source: what `SpecVLM.request` takes.
        prompt: the question; None asks for a description.
        watch: makes, from the name of a run, an observer of its stages.

    Raises:
        ConfigError: there is no draft to compare with.
    """
    check_draft(model)
    drafter = model.config.draft.drafter
    watch("")("read")
    question = model.load(source, prompt)

    def run(name: str, **settings: Any) -> Generation:
        request = model.request(question, seed=question.config.sampling.seed, **settings)  # one seed, if it is drawn
        request.seconds.on_stage = watch(f"{name}: ")
        return model.generate_request(request)

    warm_up = min(WARM_UP_TOKENS, model.config.sampling.max_new_tokens)
    for kind in ("none", drafter):
        run("warm-up", drafter=kind, max_new_tokens=warm_up)
    plain, speculative = run("plain", drafter="none"), run("speculative", drafter=drafter)
    return Comparison(plain, speculative, first_difference(plain.token_ids, speculative.token_ids, model))


def check_draft(model: SpecVLM) -> None:
    """Refuse to compare plain decoding with itself.

    Raises:
        ConfigError: there is no draft.
    """
    drafter = model.config.draft.drafter
    if drafter == "none" or (drafter == "model" and model.draft is None):
        raise ConfigError(f"drafter={drafter!r} without a draft leaves nothing to compare: give --draft")


def first_difference(plain: tuple[int, ...], speculative: tuple[int, ...], model: SpecVLM) -> Difference | None:
    """Return where two answers part, or None."""
    for index, (ours, theirs) in enumerate(zip_longest(plain, speculative)):
        if ours != theirs:
            texts = ("the end" if token is None else model.target.tokenizer.decode([token]) for token in (ours, theirs))
            return Difference(index, ours, theirs, *texts)
    return None
