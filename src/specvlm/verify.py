"""Which drafted tokens stand: pure functions from the target's logits to what is accepted.

Row 0 is the root (the last known token), row i + 1 is drafted node i. The logits of a row are the target's for the
token after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.config import SamplingConfig
from specvlm.tree import ancestors
from specvlm.upload import upload


@dataclass(frozen=True)
class Draft:
    """What a round proposes: N nodes, breadth-first."""

    tokens: Tensor  # [N] int64; -1 where sampling found no token left to draw: that node and all below it are void
    parents: tuple[int, ...]  # -1 for children of the root
    probs: Tensor | None = None  # [N + 1, vocab] when sampling: what the children of root and nodes were drawn from

    @staticmethod
    def empty() -> Draft:
        """Propose nothing: the round is a plain decoding step."""
        return Draft(torch.empty(0, dtype=torch.int64), ())


@dataclass(frozen=True)
class Accepted:
    """What one round adds: the accepted nodes, from the root down, and their tokens with the bonus token after them."""

    nodes: tuple[int, ...]
    token_ids: tuple[int, ...]  # one more than nodes


def _certain(token: int, like: Tensor) -> Tensor:
    probs = torch.zeros_like(like)
    probs[token] = 1
    return probs


class Dice:
    """The randomness of one request, drawn on the CPU so that a seed means the same on every device."""

    def __init__(self, seed: int | None = None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def happens(self, probability: float) -> bool:
        """Return True with this probability; certain from 1 on."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator)) < probability

    def draw(self, probs: Tensor) -> int:
        """Draw one token from probs [vocab]."""
        return int(torch.multinomial(probs.cpu(), 1, generator=self._generator))

    def draw_children(self, probs: Tensor, count: int) -> Tensor:
        """Draw `count` distinct tokens a row, one after another without replacement (Gumbel top-k, arXiv 1903.06059).

        Args:
            probs: [N, vocab] float32.
            count: tokens a row.

        Returns:
            [N, count] int64, in the order drawn; -1 where a row has fewer tokens of positive probability.
        """
        exponential = torch.empty(probs.shape).exponential_(generator=self._generator).to(probs.device)
        top = (probs.log() - exponential.log()).topk(count)
        return top.indices.masked_fill(top.values == -torch.inf, -1)


class Verifier:
    """Judges the rounds of one request, greedily or by rejection sampling, and remembers the tokens that were seen.

    Args:
        sampling: how tokens are chosen.
        seen: [vocab] bool, tokens of the prompt (`seen_in`); read for the repetition penalty alone.
        dice: randomness, read when sampling.
    """

    def __init__(self, sampling: SamplingConfig, seen: Tensor, dice: Dice) -> None:
        self._sampling = sampling
        self._seen = seen
        self._dice = dice
        self._pairs: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def accept(self, logits: Tensor, draft: Draft) -> Accepted:
        """Return what of the draft stands, given the target's logits [N + 1, vocab]."""
        device = logits.device
        drafted = draft.tokens.to(device)
        if self._sampling.penalty != 1:
            logits = penalise(logits, seen_tokens(self._seen, drafted, *self._paths(draft)), self._sampling.penalty)
        if self._sampling.temperature == 0:
            fetched = torch.cat([logits.argmax(-1), drafted]).tolist()  # the round's one host synchronisation
            count = logits.shape[0]
            accepted = accept_greedy(fetched[:count], fetched[count:], draft.parents)
        else:
            target_probs = logits_to_probs(logits, self._sampling)
            draft_probs = None if draft.probs is None else draft.probs.to(device)
            accepted = accept_sampled(target_probs, draft_probs, drafted.tolist(), draft.parents, self._dice)
        if self._sampling.penalty != 1:
            self._seen.index_fill_(0, upload(accepted.token_ids, device), True)
        return accepted

    def _paths(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """Return `path_pairs` of the draft on the device, made once a shape."""
        if draft.parents not in self._pairs:
            self._pairs[draft.parents] = path_pairs(draft.parents, self._seen.device)
        return self._pairs[draft.parents]


def seen_in(token_ids: Tensor, vocab_size: int) -> Tensor:
    """Return [vocab] bool: which tokens occur (ids beyond the vocabulary are left out)."""
    seen = torch.zeros(vocab_size, dtype=torch.bool, device=token_ids.device)
    seen[token_ids[token_ids < vocab_size]] = True
    return seen


def path_pairs(parents: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (rows, nodes) [P] int64: node `nodes[i]` stands on the path of row `rows[i]`, row 0 being the root."""
    node, ancestor = ancestors(parents).nonzero(as_tuple=True)
    return (node + 1).to(device), ancestor.to(device)


def seen_tokens(seen: Tensor, tokens: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
    """Return which tokens stand before each row's next one.

    Args:
        seen: [vocab] bool, tokens of the prompt and of the text up to and with the root.
        tokens: [N] int64, drafted nodes.
        rows: [P] int64, with `nodes` the paths (`path_pairs`).
        nodes: [P] int64.

    Returns:
        [N + 1, vocab] bool; a row's own path counts, its siblings' tokens do not.
    """
    found = seen.repeat(tokens.shape[0] + 1, 1)
    found[rows, tokens[nodes]] = found.new_ones(())  # True would come from the host, and wait
    return found


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


def _children(parents: Sequence[int]) -> list[list[int]]:
    """Return the children of each row, in the draft's order."""
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for node, parent in enumerate(parents):
        children[parent + 1].append(node)
    return children


def accept_greedy(choice: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Accepted:
    """Follow the target's choice from the root as long as a drafted node agrees.

    Args:
        choice: the target's argmax after each of the N + 1 rows.
        tokens: N drafted tokens.
        parents: N parents, -1 for children of the root.
    """
    children, row = _children(parents), 0
    nodes: list[int] = []
    while (match := next((node for node in children[row] if tokens[node] == choice[row]), None)) is not None:
        nodes.append(match)
        row = match + 1
    return Accepted(tuple(nodes), (*(tokens[node] for node in nodes), choice[row]))


def accept_sampled(
    target_probs: Tensor, draft_probs: Tensor | None, tokens: Sequence[int], parents: Sequence[int], dice: Dice
) -> Accepted:
    """Accept by rejection so that every token is distributed as the target's (arXiv 2211.17192; trees: 2402.14020).

    The children of a node are drawn one after another without replacement from the draft's distribution there. Each is
    accepted with probability min(1, target / draft); after a rejection the target's distribution becomes the normalised
    positive part of target - draft, and the rejected token leaves the draft's. What remains at the end of the path
    gives the bonus token.

    Args:
        target_probs: [N + 1, vocab] float32.
        draft_probs: [N + 1, vocab] float32, the distribution that a row's children were drawn from; zeros for leaves.
            None: the drafter chose its tokens outright, each with certainty.
        tokens: N drafted tokens, siblings in the order they were drawn; -1 where none was left to draw.
        parents: N parents, -1 for children of the root.
        dice: decides what is accepted and draws the bonus token.
    """
    children, row = _children(parents), 0
    nodes: list[int] = []
    while True:
        target, accepted = target_probs[row], None
        draft = None if draft_probs is None else draft_probs[row]
        for node in children[row]:
            token = tokens[node]
            if token < 0:  # the draft's distribution had no token left, and none for later siblings
                break
            proposed = _certain(token, target) if draft is None else draft
            residual = (target - proposed).clamp_min(0)
            mass = residual.sum()
            if dice.happens(float(target[token] / proposed[token])) or (mass == 0 and target[token] > 0):
                accepted = node
                break
            if mass > 0:  # without, the two distributions are equal but for rounding
                target = residual / mass
            if draft is not None:
                draft = draft.clone()
                draft[token] = 0
                draft = draft / draft.sum()
        if accepted is None:
            return Accepted(tuple(nodes), (*(tokens[node] for node in nodes), dice.draw(target)))
        nodes.append(accepted)
        row = accepted + 1
