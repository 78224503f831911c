"""Which drafted tokens stand: pure functions from the target's logits to what is accepted.

Row 0 is the root (the last known token), row i + 1 is drafted node i. The logits of a row are the target's for the
token after it.

Sampling is decided before anything is drafted: every place of the text has its own noise, one Gumbel variable a token
of the vocabulary, made from the seed and the place alone. The token there is the argmax of log-probability + noise. It
follows the target's distribution exactly (the Gumbel-max trick), and whatever a drafter proposes, in whatever tree, the
text is the one that plain decoding gives with that seed (drafter-invariant speculative decoding, arXiv 2408.07978).
A drafter that adds the same noise to its own logits agrees as often as the two distributions overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.core.byvalue import ByValue
from specvlm.core.config import SamplingConfig
from specvlm.core.rows import Rows
from specvlm.core.upload import upload

if TYPE_CHECKING:
    from specvlm.runtime.rules import Processors


def _no_numbers() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Draft(ByValue):
    """What a round proposes: N nodes, parents before their children."""

    tokens: Tensor  # [N] int64; -1 is a place left empty, which no choice equals
    parents: Tensor  # [N] int64, -1 for children of the root
    rows: Rows  # of the root and the nodes, N + 1
    notes: Tensor = field(default_factory=_no_numbers)  # [any] int64: what the drafter wants to have fetched at the end

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> Draft:
        """Propose nothing: the round is a plain decoding step."""
        return _empty(torch.device(device))

    @staticmethod
    def of(tokens: Sequence[int], parents: Sequence[int], device: torch.device | str = "cpu") -> Draft:
        """Propose tokens that the host knows; parents are indices of nodes, -1 for children of the root."""
        place = torch.device(device)
        rows = Rows.of((-1, *(parent + 1 for parent in parents)), len(tokens) + 1, place)
        return Draft(upload(tokens, place), upload(parents, place), rows, _no_numbers().to(place))

    def to(self, device: torch.device) -> Draft:
        """Return it on a device."""
        if self.tokens.device == device == self.rows.sees.device:
            return self
        return Draft(self.tokens.to(device), self.parents.to(device), self.rows.to(device), self.notes.to(device))


@cache
def _empty(device: torch.device) -> Draft:
    return Draft.of((), (), device)


@dataclass(frozen=True)
class Accepted:
    """What one round adds: the accepted nodes, from the root down, and their tokens with the bonus token after them."""

    nodes: tuple[int, ...]
    token_ids: tuple[int, ...]  # one more than nodes
    notes: tuple[int, ...] = ()  # of the draft


class Chooser:
    """Turns logits into scores whose argmax is the next token: the logits themselves, or noise added when sampling."""

    def __init__(self, sampling: SamplingConfig) -> None:
        self._sampling = sampling

    @property
    def is_greedy(self) -> bool:
        """Whether the scores are the logits."""
        return self._sampling.temperature == 0

    def scores(self, logits: Tensor, places: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """Return [N, vocab]: the choice of each row is its argmax.

        Args:
            logits: [N, vocab].
            places: [N] int64, how many tokens of the text stand before each row's next one.
            seed: None is the sampling's; a tensor of one number lets one CUDA graph serve every seed.
        """
        if self.is_greedy:
            return logits
        return self.drawn(logits_to_probs(logits, self._sampling), places, seed)

    def drawn(self, probs: Tensor, places: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """Return [N, vocab], whose argmax is drawn from probabilities [N, vocab]; arguments as in `scores`."""
        noise = gumbel(self._sampling.seed or 0 if seed is None else seed, places, probs.shape[-1])
        return probs.double().log() + noise


class Verifier:
    """Judges the rounds of one request and remembers the tokens that were seen.

    Args:
        sampling: how tokens are chosen.
        seen: [vocab] bool, tokens of the prompt (`seen_in`); read for the repetition penalty alone.
        processors: what else stands between logits and choice, the sampling's own filters and penalty included.
    """

    def __init__(self, sampling: SamplingConfig, seen: Tensor, processors: Processors | None = None) -> None:
        self._penalty = sampling.penalty
        self._seen = seen
        self._processors = processors
        self._chooser = Chooser(sampling)
        self._count = 0  # tokens of the text

    def accept(self, logits: Tensor, draft: Draft) -> Accepted:
        """Return what of the draft stands, given the target's logits [N + 1, vocab]."""
        scores = self._scores(logits, draft)
        count = len(draft)
        numbers = torch.cat([scores.argmax(-1), draft.tokens, draft.parents, draft.notes]).tolist()  # the one wait
        choice, tokens = numbers[: count + 1], numbers[count + 1 : 2 * count + 1]
        parents, notes = numbers[2 * count + 1 : 3 * count + 1], numbers[3 * count + 1 :]
        accepted = accept(choice, tokens, parents, notes)
        self._count += len(accepted.token_ids)
        if self._processors is not None:
            self._processors.extend(accepted.token_ids)
        elif self._penalty != 1:
            self._seen.index_fill_(0, upload(accepted.token_ids, logits.device), True)
        return accepted

    def _scores(self, logits: Tensor, draft: Draft) -> Tensor:
        """Return [N + 1, vocab]: the choice of each row is its argmax."""
        places = draft.rows.depths + (self._count - 1)
        if self._processors is not None:
            tokens, parents = torch.stack([draft.tokens, draft.parents]).tolist()
            logits = self._processors(logits, tokens, parents)
            return logits if self._chooser.is_greedy else self._chooser.drawn(logits.softmax(-1), places)
        if self._penalty != 1:
            seen = seen_before(self._seen, draft.tokens, draft.rows.sees[:, 1:])
            logits = penalise(logits, seen, self._penalty)
        return self._chooser.scores(logits, places)


def seen_in(token_ids: Tensor, vocab_size: int) -> Tensor:
    """Return [vocab] bool: which tokens occur (ids beyond the vocabulary are left out)."""
    seen = torch.zeros(vocab_size, dtype=torch.bool, device=token_ids.device)
    seen[token_ids[token_ids < vocab_size]] = True
    return seen


def seen_before(seen: Tensor, tokens: Tensor, sees: Tensor) -> Tensor:
    """Return which tokens stand before each row's next one.

    Args:
        seen: [vocab] bool, tokens of the prompt and of the known text.
        tokens: [M] int64 of tree rows.
        sees: [N, M] bool, which of them stand on each row's path.

    Returns:
        [N, vocab] bool; a row's own path counts, its siblings' tokens do not.
    """
    places = tokens.clamp(0, seen.shape[0] - 1).expand(sees.shape)
    found = torch.zeros(sees.shape[0], seen.shape[0], dtype=torch.float32, device=seen.device)
    return found.scatter_add_(1, places, sees.float()).bool() | seen


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty to logits [..., vocab] where `seen` holds (CTRL, arXiv 1909.05858, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def logits_to_probs(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return the distribution to sample from, [N, vocab] float32: temperature, then top_k, top_p and min_p.

    The order and the rules at ties are those of transformers' generate().
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    probs = logits.softmax(-1)
    if sampling.min_p > 0:
        floor = sampling.min_p * probs.amax(-1, keepdim=True)
        probs = logits.masked_fill(probs < floor, -torch.inf).softmax(-1)
    return probs


# Counter-based noise: a 64-bit integer hash (SplitMix64's finaliser), the same on every device. Python's constants
# exceed int64, where products wrap as they should.
_GAMMA, _MIX_1, _MIX_2 = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shift right, filling with zeros; int64's own shift repeats the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    return bits ^ _shifted(bits, 31)


def gumbel(seed: int | Tensor, places: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise [N, vocab] float64, which depends on seed, place and token alone.

    Args:
        seed: from 0 to 2^63 - 1.
        places: [N] integers.
        vocab_size: tokens. A larger vocabulary has the same noise on the tokens of a smaller one.
    """
    tokens = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=places.device)
    streams = _mixed(_mixed(places.long() * _GAMMA + seed) + _GAMMA)
    bits = _shifted(_mixed(streams[:, None] + tokens * _GAMMA), 12)  # 52 bits: with a half added still exact, below 1
    uniform = (bits.double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()


def accept(choice: Sequence[int], tokens: Sequence[int], parents: Sequence[int], notes: Sequence[int] = ()) -> Accepted:
    """Keep the longest path from the root on which every node is what the target chose after its parent.

    Args:
        choice: the target's token after each of the N + 1 rows.
        tokens: N drafted tokens.
        parents: N parents, -1 for children of the root; a parent stands before its children. Siblings may hold the
            same token: the longer path stands, of equal ones the first.
        notes: handed on.
    """
    lengths = [0]  # of the path to each row that agrees, -1 for the others
    for token, parent in zip(tokens, parents, strict=True):
        agrees = lengths[parent + 1] >= 0 and choice[parent + 1] == token
        lengths.append(lengths[parent + 1] + 1 if agrees else -1)
    row = last = lengths.index(max(lengths))
    nodes: list[int] = []
    while row > 0:
        nodes.append(row - 1)
        row = parents[row - 1] + 1
    nodes.reverse()
    return Accepted(tuple(nodes), (*(tokens[node] for node in nodes), choice[last]), tuple(notes))
