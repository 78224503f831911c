"""Is it lossless on this machine? `specvlm verify`: speculative = plain decoding = transformers' own generate().

In fp32 ids are compared one by one. In bf16 and fp16 a pass over many rows rounds otherwise than one over a single row,
so every way of decoding, generate() among them, is judged as `ties` does: equal up to ties, each with its logit gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from specvlm.check import reference
from specvlm.check.compare import Difference, check_draft, first_difference
from specvlm.check.ties import Tie, logit_gap, ties
from specvlm.core.config import SamplingConfig
from specvlm.core.errors import ConfigError
from specvlm.engine.api import SpecVLM
from specvlm.engine.request import Request

GENERATE = "generate()"
WAYS: Mapping[str, Mapping[str, Any]] = {  # of decoding speculatively, beside the one that was configured
    "as configured": {},
    "paper's tree": {"tree": "paper", "policy": "fixed"},
    "chain of 5": {"tree": "chain:5", "policy": "fixed"},
}
_GIVEN = {"max_new_tokens", "repetition_penalty"}  # what generate() is given as well
_SAMPLED = {"temperature": 1.0, "seed": 0}  # the noise belongs to the place in the text: sampled texts are equal, too


@dataclass(frozen=True)
class Check:
    """Two ways of decoding one question that must give the same ids."""

    name: str
    is_equal: bool
    difference: Difference | None
    gap: float | None  # where they part: by how much plain decoding preferred its token


@dataclass(frozen=True)
class Proof:
    """What came of one question."""

    name: str
    num_tokens: int
    found: Sequence[Check | Tie]
    failure: str | None = None  # why it was not answered

    @property
    def is_lossless(self) -> bool:
        """Whether all ids are equal, in half precision up to ties."""
        return self.failure is None and all(
            check.is_equal if isinstance(check, Check) else check.is_tie for check in self.found
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        checks = [asdict(check) | ({"is_tie": check.is_tie} if isinstance(check, Tie) else {}) for check in self.found]
        verdict = {"lossless": None if self.failure else self.is_lossless, "failure": self.failure}
        return {"name": self.name, "tokens": self.num_tokens, **verdict, "checks": checks}

    def text(self) -> str:
        """Return a line where all ids are equal, else one for each that differ."""
        if self.failure is not None:
            return f"{self.name}: not answered, {self.failure}"
        same = [check.name for check in self.found if check.difference is None]
        head = f"{self.name}: {self.num_tokens} tokens, equal: {', '.join(same) or 'none'}"
        return "\n".join([head, *(_line(check) for check in self.found if check.difference is not None)])


def _line(check: Check | Tie) -> str:
    if isinstance(check, Tie):
        return f"  {check.line()}"
    found = check.difference
    assert found is not None
    gap = "" if check.gap is None else f", logit gap {check.gap:.3g}"
    texts = f"{found.plain_text!r} against {found.speculative_text!r}"
    return f"  {check.name}: DIFFERS first at token {found.index}, {texts}{gap}"


def verify(
    model: SpecVLM,
    source: Any,
    prompt: str | None = None,
    *,
    name: str = "",
    watch: Callable[[str], Callable[[str], None]] = lambda prefix: lambda name: None,
    **settings: Any,
) -> Proof:
    """Decode one question in every way and compare.

    Args:
        model: a pair.
        source: what `SpecVLM.request` takes.
        prompt: the question; None asks for a description.
        name: of the proof.
        watch: makes, from the name of a run, an observer of its stages.
        **settings: any field of the configs, as in `EngineConfig.replace`.

    Raises:
        ConfigError: there is no draft, or a setting is not allowed: generate() cannot be given it, or this sets it.
    """
    check_draft(model)
    _check(model, settings)
    watch("")("read")
    question = model.load(source, prompt, **settings)
    if model.target.dtype != torch.float32:
        ways = {"plain": {"drafter": "none"}, **WAYS}
        found = ties(model, question, ways=ways, has_generate=True, watch=watch, **settings).found
        return Proof(name, found[0].num_tokens, found)

    def answer(run: str, **more: Any) -> tuple[int, ...]:
        request = model.request(question, **{**settings, **more})
        request.seconds.on_stage = watch(f"{run}: ")
        return model.generate_request(request).token_ids

    greedy = {"temperature": 0.0}
    plain, sampled = answer("plain", drafter="none", **greedy), answer("sampled", drafter="none", **_SAMPLED)
    others = {f"plain and {GENERATE}": (plain, _generated(model, question, settings))}
    others |= {f"plain and {run}": (plain, answer(run, **greedy, **way)) for run, way in WAYS.items()}
    others["sampled, plain and paper's tree"] = (sampled, answer("sampled", **_SAMPLED, **WAYS["paper's tree"]))
    checks = []
    for run, (one, other) in others.items():
        difference = first_difference(one, other, model)
        gap = None
        if one is plain and difference is not None:
            request = model.request(question, **{**settings, **greedy, "drafter": "none"})
            gap = logit_gap(model, request, difference)
        checks.append(Check(run, difference is None, difference, gap))
    return Proof(name, len(plain), checks)


def _check(model: SpecVLM, settings: Mapping[str, Any]) -> None:
    config, usual = model.config.replace(**settings).sampling, SamplingConfig()
    for name in sorted({field.name for field in fields(config)} - _GIVEN):
        value = getattr(config, name)
        if value != getattr(usual, name):
            problem = f"{name}={value!r} is not allowed: greedy texts are compared with generate()'s"
            raise ConfigError(f"{problem}, and sampled ones with a seed of their own; leave it out")


def _generated(model: SpecVLM, question: Request, settings: Mapping[str, Any]) -> tuple[int, ...]:
    request = model.request(question, **settings)
    sampling = request.config.sampling
    penalty, num_new = sampling.repetition_penalty, sampling.max_new_tokens
    inputs = model.read(request)
    return reference.generate(model.target, inputs, max_new_tokens=num_new, repetition_penalty=penalty).token_ids
