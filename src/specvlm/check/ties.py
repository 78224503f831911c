"""Where half precision changes a word, and whether that is a tie: `specvlm compare --ties`.

In fp32 all ways of decoding give the same ids. In bf16 a pass over many rows rounds otherwise than one over a single
row, and where two candidates are nearly equal the other one can win. The reference is the Hugging Face modules, one row
a pass. The yardstick is those modules again, over the reference's text with 26 rows a pass: how far a logit moves by
rounding alone. A first difference is a tie when the gap between its two candidates is no wider than both may move.
A repetition penalty stays out of it, the checkpoint's too: candidates are compared by the logits of the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from specvlm.check import reference
from specvlm.check.compare import Difference, check_draft, first_difference
from specvlm.engine.api import Round, SpecVLM
from specvlm.engine.request import Request

_CANDIDATES = 8  # largest logits kept of every position
WAYS: Mapping[str, Mapping[str, Any]] = {"plain": {"drafter": "none"}, "speculative": {}}
_ROWS = 26  # of a verification pass of the paper's tree


@dataclass(frozen=True)
class Tie:
    """One way of decoding against the reference."""

    name: str
    num_tokens: int  # of the reference
    rounding: float  # the yardstick: largest change of a logit
    moved: float  # largest change of a logit between the two, up to the first difference
    difference: Difference | None  # the first; `plain` is the reference's token
    gap: float | None  # logit of the reference's token minus that of the other, as the reference computed them
    other_gap: float | None  # the same, as the other computed them: negative

    @property
    def is_tie(self) -> bool:
        """Whether the texts are equal up to a tie, which ends the comparison."""
        return self.difference is None or (self.gap is not None and self.gap <= 2 * self.rounding)

    def line(self) -> str:
        """Return the verdict in one line."""
        if self.difference is None:
            return f"{self.name}: all {self.num_tokens} ids equal, logits moved up to {self.moved:.3g}"
        found = self.difference
        gap = "beyond the best eight" if self.gap is None else f"{self.gap:.3g}"
        return (
            f"{self.name}: first difference at token {found.index} of {self.num_tokens}, {found.plain_text!r} against "
            f"{found.speculative_text!r}: logit gap {gap}, logits moved up to {self.moved:.3g}: "
            f"{'a tie' if self.is_tie else 'NOT a tie'}"
        )


@dataclass(frozen=True)
class Ties:
    """All ways of decoding against the reference."""

    dtype: str
    found: tuple[Tie, ...]

    @property
    def is_lossless(self) -> bool:
        """Whether every difference is a tie."""
        return all(tie.is_tie for tie in self.found)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "dtype": self.dtype,
            "lossless_up_to_ties": self.is_lossless,
            "methods": [{**asdict(tie), "is_tie": tie.is_tie} for tie in self.found],
        }

    def table(self) -> str:
        """Return a line a method and the verdict."""
        head = (
            f"reference: the Hugging Face modules, one row a pass, {self.dtype}; "
            f"{_ROWS} rows a pass move a logit up to {self.found[0].rounding:.3g}"
        )
        verdict = f"lossless up to ties: {'yes' if self.is_lossless else 'NO'}"
        return "\n".join([head, *(tie.line() for tie in self.found), verdict])


@dataclass(frozen=True)
class _Text:
    """A text with the largest logits from which each of its tokens was chosen."""

    token_ids: tuple[int, ...]
    logits: tuple[dict[int, float], ...]


def ties(
    model: SpecVLM,
    source: Any,
    prompt: str | None = None,
    *,
    ways: Mapping[str, Mapping[str, Any]] = WAYS,
    has_generate: bool = False,
    watch: Callable[[str], Callable[[str], None]] = lambda prefix: lambda name: None,
    **settings: Any,
) -> Ties:
    """Decode greedily by the Hugging Face modules and in other ways, and judge the first differences.

    Args:
        model: a pair.
        source: what `SpecVLM.request` takes.
        prompt: the question; None asks for a description.
        ways: settings of the other ways, by name.
        has_generate: whether transformers' own generate() is one of them.
        watch: makes, from the name of a run, an observer of its stages.
        **settings: of all ways, as in `EngineConfig.replace`.

    Raises:
        ConfigError: there is no draft.
    """
    check_draft(model)
    watch("")("read")
    question = model.load(source, prompt, **settings)

    def request(name: str, **more: Any) -> Request:
        law = {"temperature": 0.0, "repetition_penalty": 1.0}
        made = model.request(question, **{**settings, **law, "eager": False, **more})
        made.seconds.on_stage = watch(f"{name}: ")
        return made

    reference = _decode(model, request("reference", drafter="none", eager=True))
    rounding = _moved(reference, _forced(model, request("yardstick", drafter="none", eager=True), reference))
    others = {"generate()": _generated(model, request("generate()"))} if has_generate else {}
    others |= {name: _decode(model, request(name, **way)) for name, way in ways.items()}
    found = tuple(_judge(model, name, reference, other, rounding) for name, other in others.items())
    return Ties(model.models["dtype"] or "", found)


def logit_gap(model: SpecVLM, request: Request, found: Difference) -> float | None:
    """Return by how much plain decoding's token beat the other one's logit where it was chosen.

    Args:
        model: any; its draft is not used.
        request: of plain decoding.
        found: where another text parts from its own; None comes back if one of the two had ended there.
    """
    if found.plain is None or found.speculative is None:
        return None
    seen: list[Tensor] = []
    for place, _ in enumerate(model.decode(request, model.prefill(request), observe=seen.append)):
        logits = seen.pop()[-1]  # one row a pass
        if place == found.index:
            return float(logits[found.plain] - logits[found.speculative])
    return None


def _decode(model: SpecVLM, request: Request) -> _Text:
    token_ids: list[int] = []
    logits: list[dict[int, float]] = []
    passes: list[Tensor] = []
    for latest in model.decode(request, model.prefill(request), observe=passes.append):
        logits += _largest(passes.pop(), latest)
        token_ids += latest.token_ids
    return _Text(tuple(token_ids), tuple(logits))


def _generated(model: SpecVLM, request: Request) -> _Text:
    num_new, inputs = request.config.sampling.max_new_tokens, model.read(request)
    found = reference.generate(model.target, inputs, max_new_tokens=num_new, repetition_penalty=1.0, has_logits=True)
    return _Text(found.token_ids, tuple(_best(torch.stack(found.logits))))


def _forced(model: SpecVLM, request: Request, text: _Text) -> _Text:
    """Return the text with the logits that passes of many rows over it give."""
    start = model.prefill(request)
    session, logits = start.session, [text.logits[0]]
    tokens = text.token_ids[:-1]
    for begin in range(0, len(tokens), _ROWS):
        rows = tokens[begin : begin + _ROWS]
        found = session.step(torch.tensor(rows, device=model.target.device), range(-1, len(rows) - 1))
        session.keep(range(len(rows)))
        wanted = text.logits[begin + 1 : begin + 1 + len(rows)]
        for row, at in enumerate(wanted):
            places = list(at)
            logits.append(dict(zip(places, found[row, places].tolist(), strict=True)))
    return _Text(text.token_ids, tuple(logits))


def _moved(one: _Text, other: _Text, count: int | None = None) -> float:
    """Return the largest change of a logit that both texts hold for the same token at one of the first places."""
    pairs = list(zip(one.logits, other.logits, strict=False))[:count]
    return max((abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()), default=0.0)


def _largest(logits: Tensor, latest: Round) -> list[dict[int, float]]:
    """Return, for each new token, the largest logits {token: logit} of the row that chose it."""
    rows = [0, *(node + 1 for node in latest.accepted.nodes)][: len(latest.token_ids)]
    return _best(logits[rows])


def _best(logits: Tensor) -> list[dict[int, float]]:
    """Return the largest of each row of logits [N, vocab], {token: logit}."""
    best = logits.float().topk(_CANDIDATES)
    tokens, values = best.indices.tolist(), best.values.tolist()
    return [dict(zip(*pair, strict=True)) for pair in zip(tokens, values, strict=True)]


def _judge(model: SpecVLM, name: str, reference: _Text, other: _Text, rounding: float) -> Tie:
    difference = first_difference(reference.token_ids, other.token_ids, model)
    moved = _moved(reference, other, None if difference is None else difference.index + 1)
    gaps: list[float | None] = [None, None]
    if difference is not None and difference.plain is not None and difference.speculative is not None:
        for place, text in enumerate((reference, other)):
            at = text.logits[difference.index]
            if difference.plain in at and difference.speculative in at:
                gaps[place] = at[difference.plain] - at[difference.speculative]
    return Tie(name, len(reference.token_ids), rounding, moved, difference, *gaps)
