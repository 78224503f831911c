"""Drafters: each proposes a tree of tokens a round. A new one is a class under `@drafter(name)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specvlm import tree, verify
from specvlm.config import DraftConfig, SamplingConfig
from specvlm.errors import ConfigError
from specvlm.families import Inputs, Prompt
from specvlm.model import VideoLM
from specvlm.verify import Accepted, Draft


@dataclass(frozen=True)
class Context:
    """One request, as a drafter sees it at its start."""

    target: VideoLM
    inputs: Inputs
    prompt: Prompt  # the target's, unpruned
    keep: Tensor  # [K] int64, ascending indices of the kept visual tokens
    sampling: SamplingConfig
    dice: verify.Dice


class Drafter(Protocol):
    """Proposes tokens. One instance serves one request."""

    prunes: bool  # whether it reads the prompt with pruned visual tokens
    device: torch.device

    def __init__(self, model: VideoLM | None, config: DraftConfig) -> None: ...

    def begin(self, context: Context) -> None:
        """Read the prompt."""
        ...

    def propose(self, token: int, budget: int) -> Draft:
        """Draft at most `budget` tokens deep after the known text, whose newest token is `token`."""
        ...

    def commit(self, accepted: Accepted) -> None:
        """Learn which nodes of the last draft stand (the bonus token comes with the next `propose`)."""
        ...


DRAFTERS: dict[str, type[Drafter]] = {}


def drafter(name: str) -> Callable[[type], type]:
    """Register a Drafter class under its name."""

    def add(cls: type) -> type:
        DRAFTERS[name] = cls
        return cls

    return add


def check(config: DraftConfig) -> None:
    """Refuse what no drafter can serve.

    Raises:
        ConfigError: there is no drafter of that name (the known are listed) or no such tree.
    """
    if config.drafter not in DRAFTERS:
        raise ConfigError(f"drafter={config.drafter!r} is not allowed: known are {', '.join(sorted(DRAFTERS))}")
    tree.parse(config.tree)


def kind(config: DraftConfig, model: VideoLM | None) -> type[Drafter]:
    """Return the class in force; without a draft model, "model" falls back to plain decoding."""
    return DRAFTERS["none" if config.drafter == "model" and model is None else config.drafter]


def create(config: DraftConfig, model: VideoLM | None) -> Drafter:
    """Return a new drafter of the class in force."""
    return kind(config, model)(model, config)


@drafter("none")
class NoDrafter:
    """Proposes nothing: plain decoding, in the same engine and counted in the same way."""

    prunes = False
    device = torch.device("cpu")

    def __init__(self, model: VideoLM | None, config: DraftConfig) -> None: ...

    def begin(self, context: Context) -> None:
        """Do nothing."""

    def propose(self, token: int, budget: int) -> Draft:
        """Propose nothing."""
        return Draft.empty()

    def commit(self, accepted: Accepted) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class _Level:
    """One depth of a static tree: how its nodes come out of the rows that were just run, and which of them run next."""

    nodes: slice  # the nodes of this depth
    slots: list[int]  # of each node: its parent's place among the rows just run
    ranks: list[int]  # of each node: which of its parent's candidates it is
    inner: list[int]  # nodes of this depth that have children
    inner_parents: list[int]  # of each inner node: its parent's tree row, -1 for the known text


def _levels(topology: tree.Tree) -> list[_Level]:
    has_children, levels = set(topology.parents), []
    rows = {-1: -1}  # node -> tree row, in the order of running
    running, begin = [-1], 0
    for depth in range(1, topology.depth + 1):
        end = begin + topology.depths.count(depth)
        nodes = range(begin, end)
        inner = [node for node in nodes if node in has_children]
        levels.append(
            _Level(
                slice(begin, end),
                [running.index(topology.parents[node]) for node in nodes],
                [topology.ranks[node] for node in nodes],
                inner,
                [rows[topology.parents[node]] for node in inner],
            )
        )
        for node in inner:
            rows[node] = len(rows) - 1
        running, begin = inner, end
    return levels


@drafter("model")
class ModelDrafter:
    """A smaller model of the family that sees the kept visual tokens and all text (SpecVLM, section 3)."""

    prunes = True

    def __init__(self, model: VideoLM | None, config: DraftConfig) -> None:
        if model is None:
            raise ConfigError("drafter='model' needs a draft model: name one, or choose drafter='none'")
        self._model = model
        self.device = model.device
        self._tree = tree.parse(config.tree)
        self._plans: dict[int, list[_Level]] = {}

    def begin(self, context: Context) -> None:
        """Encode, prune and prefill the prompt on the draft."""
        model, self._sampling, self._dice = self._model, context.sampling, context.dice
        same = model is context.target
        prompt = context.prompt if same else model.encode(context.inputs)
        self._vocab_size = context.target.vocab_size
        self._shared = min(model.vocab_size, self._vocab_size)
        self._seen = verify.seen_in(prompt.input_ids, model.vocab_size)
        pruned = prompt.select(context.keep.to(model.device))
        rows = context.sampling.max_new_tokens + len(self._tree) + 1
        self._session, _, _ = model.start(pruned, rows)
        self._pending: list[int] = []  # known tokens that the draft has not run yet

    def propose(self, token: int, budget: int) -> Draft:
        """Draft the static tree, cut to the budget, one pass a level."""
        self._pending.append(token)
        topology = self._tree.cut(min(budget, self._tree.depth))
        if not len(topology):
            return Draft.empty()
        logits = self._catch_up()
        device, size = self._model.device, len(topology)
        tokens = torch.zeros(size, dtype=torch.int64, device=device)
        probs = torch.zeros(size + 1, self._vocab_size, device=device) if self._sampling.temperature else None
        running, self._run = [-1], []
        for level in self._plan(topology):
            logits = self._penalised(logits, tokens, topology, running)
            candidates = self._candidates(logits, running, max(level.ranks) + 1, probs)
            tokens[level.nodes] = candidates[level.slots, level.ranks]
            if not level.inner:
                break
            logits = self._step(tokens[level.inner].clamp_min(0), level.inner_parents)
            running = level.inner
            self._run += running
        self._tokens, draft = tokens, Draft(tokens, topology.parents, probs)
        self._nodes = list(range(size))
        return draft if probs is None else self._without_missing(draft)

    def commit(self, accepted: Accepted) -> None:
        """Keep the rows of the accepted path; a leaf was never run and is caught up in the next round."""
        nodes = [self._nodes[node] for node in accepted.nodes]
        rows = [self._run.index(node) for node in nodes if node in self._run]
        self._session.keep(rows)
        if nodes:
            self._pending += self._tokens[nodes[len(rows) :]].tolist()
            self._see(self._tokens[nodes])

    def _catch_up(self) -> Tensor:
        """Run the pending tokens; return the logits [1, vocab] after them."""
        tokens = torch.tensor(self._pending, device=self._model.device)
        self._see(tokens)
        logits = self._step(tokens, range(-1, len(self._pending) - 1))
        self._session.keep(range(len(self._pending)))
        self._pending = []
        return logits[-1:]

    def _see(self, tokens: Tensor) -> None:
        if self._sampling.penalty != 1:
            self._seen[tokens.clamp_max(self._model.vocab_size - 1)] = True

    def _step(self, tokens: Tensor, parents: Sequence[int]) -> Tensor:
        # the target's padding rows have no embedding in a draft with fewer of them; such a token costs acceptance only
        return self._session.step(tokens.clamp_max(self._model.vocab_size - 1), list(parents))[:, : self._shared]

    def _plan(self, topology: tree.Tree) -> list[_Level]:
        if topology.depth not in self._plans:
            self._plans[topology.depth] = _levels(topology)
        return self._plans[topology.depth]

    def _penalised(self, logits: Tensor, tokens: Tensor, topology: tree.Tree, running: list[int]) -> Tensor:
        if self._sampling.penalty == 1:
            return logits
        sees = tree.ancestors(torch.tensor(topology.parents, device=logits.device))
        rows = torch.tensor(running, device=logits.device) + 1
        seen = verify.seen_tokens(self._seen, tokens, sees)[rows, : self._shared]
        return verify.penalise(logits, seen, self._sampling.penalty)

    def _candidates(self, logits: Tensor, running: list[int], count: int, probs: Tensor | None) -> Tensor:
        """Return each row's `count` candidates [rows, count]: the best when greedy, else drawn without replacement."""
        if probs is None:
            return logits.topk(count).indices
        rows = verify.logits_to_probs(logits, self._sampling)
        probs[torch.tensor(running, device=probs.device) + 1, : self._shared] = rows
        return self._dice.draw_children(rows, count)

    def _without_missing(self, draft: Draft) -> Draft:
        """Leave out nodes for which the draft's distribution had no token left, and all below them."""
        assert draft.probs is not None
        place: dict[int, int] = {-1: -1}
        self._nodes = []
        for node, (token, parent) in enumerate(zip(draft.tokens.tolist(), draft.parents, strict=True)):
            if token >= 0 and parent in place:
                place[node] = len(self._nodes)
                self._nodes.append(node)
        if len(self._nodes) == len(draft.parents):
            return draft
        nodes = self._nodes
        rows = [0, *(node + 1 for node in nodes)]
        return Draft(draft.tokens[nodes], tuple(place[draft.parents[node]] for node in nodes), draft.probs[rows])
