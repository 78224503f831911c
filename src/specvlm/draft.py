"""Drafters: each proposes a tree of tokens a round. A new one is a class under `@drafter(name)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specvlm import tree, verify
from specvlm.config import DraftConfig, SamplingConfig
from specvlm.errors import ConfigError
from specvlm.families import Inputs, Prompt
from specvlm.model import VideoLM
from specvlm.report import Seconds
from specvlm.upload import staged, upload
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
    eager: bool = False  # run the Hugging Face modules as they are
    seconds: Seconds = field(default_factory=Seconds)  # of the request


class Drafter(Protocol):
    """Proposes tokens. One instance serves one request."""

    prunes: bool  # whether it reads the prompt with pruned visual tokens
    device: torch.device

    def __init__(self, model: VideoLM | None, config: DraftConfig) -> None: ...

    def begin(self, context: Context) -> None:
        """Read the prompt."""
        ...

    def propose(self, token: int, budget: int) -> Draft:
        """Draft after the known text, whose newest token is `token`.

        Args:
            token: the last known token.
            budget: how many tokens may still be accepted; what lies deeper is wasted. At 0 nothing is drafted.
        """
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
    """One depth of a static tree: how its nodes come out of the rows that were just run, and which of them run next.

    The tensors lie on the draft's device.
    """

    choices: Tensor  # [n] int64, of each node: its place among the rows' candidates, flattened
    num_choices: int  # candidates a row
    inner: Tensor  # [r] int64, places within this depth of the nodes that have children
    parents: tuple[int, ...]  # of each inner node: its parent among the rows of the round
    rows: tuple[int, ...]  # of each row just run: its place in Draft.probs
    paths: tuple[Tensor, Tensor]  # rows [P] and nodes [P]: drafted tokens on the paths of the rows just run


# Every round begins with the last two known tokens. The older one was often run before (it is not where a leaf was
# accepted), but running it again costs nothing beside reading the weights, and the round keeps one shape.
_HEAD = (-1, 0)


def round_passes(topology: tree.Tree) -> list[tuple[int, ...]]:
    """Return the passes of a round, each as the parents of its rows among the round's rows.

    The first runs the head, every other one the nodes of one depth that have children.
    """
    inner = sorted(set(topology.parents))  # -1, the root, comes first: the second row of the head
    row_of = {node: len(_HEAD) - 1 + place for place, node in enumerate(inner)}
    depths = [
        tuple(row_of[topology.parents[node]] for node in inner[1:] if topology.depths[node] == depth)
        for depth in range(1, topology.depth)
    ]
    return [_HEAD, *depths]


def _levels(topology: tree.Tree, device: torch.device) -> list[_Level]:
    inner_nodes, levels = set(topology.parents), []
    sees = tree.ancestors(topology.parents)
    later = [*round_passes(topology)[1:], ()]  # behind the deepest nodes nothing runs
    running, begin = [-1], 0
    for depth, parents in enumerate(later, 1):
        nodes = range(begin, begin + topology.depths.count(depth))
        count = 1 + max(topology.ranks[node] for node in nodes)
        inner = [node for node in nodes if node in inner_nodes]
        paths = [(row, int(a)) for row, node in enumerate(running) if node >= 0 for a in sees[node].nonzero()]
        levels.append(
            _Level(
                upload([running.index(topology.parents[n]) * count + topology.ranks[n] for n in nodes], device),
                count,
                upload([node - begin for node in inner], device),
                parents,
                tuple(node + 1 for node in running),
                (upload([row for row, _ in paths], device), upload([node for _, node in paths], device)),
            )
        )
        running, begin = inner, nodes.stop
    return levels


Forward = Callable[[Tensor, tuple[int, ...]], Tensor]  # tokens [N], their parents -> logits [N, vocab]
Choose = Callable[[Tensor, _Level], Tensor]  # logits [R, vocab] of the rows just run -> candidates [R, num_choices]


@drafter("model")
class ModelDrafter:
    """A smaller model of the family that sees the kept visual tokens and all text (SpecVLM, section 3).

    A greedy round (all depths of the tree) is one function of fixed shape that waits for nothing, so that a GPU runs it
    as one CUDA graph.
    """

    prunes = True

    def __init__(self, model: VideoLM | None, config: DraftConfig) -> None:
        if model is None:
            raise ConfigError("drafter='model' needs a draft model: name one, or choose drafter='none'")
        self._model = model
        self.device = model.device
        self._tree = tree.parse(config.tree)

    @torch.inference_mode()
    def begin(self, context: Context) -> None:
        """Encode, prune and prefill the prompt on the draft; capture the round."""
        model, self._sampling, self._dice = self._model, context.sampling, context.dice
        same = model is context.target
        prompt = context.prompt if same else model.encode(context.inputs)
        self._vocab_size = context.target.vocab_size
        self._shared = min(model.vocab_size, self._vocab_size)
        pruned = prompt.select(context.keep.to(model.device))
        room = context.sampling.max_new_tokens + len(self._tree) + len(_HEAD)
        self._session, _, _ = model.start(pruned, room, eager=context.eager)
        self._session.rollback(len(pruned) - 1)
        self._pending = pruned.input_ids[-1:].tolist()  # known tokens that the cache does not hold yet
        workspace, seen = self._session.workspace, verify.seen_in(prompt.input_ids, model.vocab_size)
        self._seen: Tensor = workspace.own("seen", lambda: torch.empty_like(seen)).copy_(seen)
        self._levels: list[_Level] = workspace.own(self._tree, lambda: _levels(self._tree, self.device))
        self._key = ("round", self._tree, self._shared, self._sampling.penalty)
        is_greedy = self._sampling.temperature == 0
        if is_greedy and self._session.is_captured and not workspace.has(self._key):
            with context.seconds.stage("capture", self.device):
                self._greedy()
        elif not is_greedy and not self._session.is_ready(_HEAD):
            with context.seconds.stage("capture", self.device):
                self._capture_passes()

    @torch.inference_mode()
    def propose(self, token: int, budget: int) -> Draft:
        """Draft the static tree, one pass a level."""
        self._pending.append(token)
        self._see([token])
        self._drafted: Tensor | None = None
        if budget == 0:
            return Draft.empty()
        self._catch_up()
        self._session.workspace.tokens[: len(_HEAD)].copy_(staged(self._pending, self.device), non_blocking=True)
        if self._sampling.temperature > 0:
            return self._sampled()
        self._drafted = self._greedy().clone()
        return Draft(self._drafted, self._tree.parents)

    @torch.inference_mode()
    def commit(self, accepted: Accepted) -> None:
        """Keep the rows of the accepted path but its last token, which opens the next round."""
        if self._drafted is None:
            return
        nodes = accepted.nodes
        self._session.keep([0, *(self._row_of(node) for node in [-1, *nodes][:-1])])
        self._pending = [accepted.token_ids[len(nodes) - 1] if nodes else self._pending[-1]]
        self._see(accepted.token_ids[: len(nodes)])

    def _row_of(self, node: int) -> int:
        """Return the row of the round at which a node that has children was run."""
        inner = sorted(set(self._tree.parents))  # -1, the root, comes first: the second row of the head
        return 1 + inner.index(node)

    def _catch_up(self) -> None:
        """Run the known tokens before the last two, where the rounds before drafted nothing."""
        older = self._pending[: -len(_HEAD)]
        if older:
            tokens = upload(older, self.device).clamp_max(self._model.vocab_size - 1)
            self._session.step(tokens, range(-1, len(older) - 1))
            self._session.keep(range(len(older)))
        self._pending = self._pending[-len(_HEAD) :]

    def _see(self, tokens: Sequence[int]) -> None:
        if self._sampling.penalty != 1:
            self._seen.index_fill_(0, upload(tokens, self.device).clamp_max(self._model.vocab_size - 1), True)

    @torch.inference_mode()
    def _greedy(self) -> Tensor:
        """Return the drafted tokens [N], each the best, second best... continuation of its parent."""

        def round_() -> Tensor:
            parents: tuple[int, ...] = ()

            def forward(tokens: Tensor, new: tuple[int, ...]) -> Tensor:
                nonlocal parents
                parents += new
                return self._session.forward(tokens, self._model.rows(parents, len(new)))

            return self._grow(forward, lambda logits, level: logits.topk(level.num_choices).indices)

        return self._session.run(self._key, round_)

    def _sampled(self) -> Draft:
        """Draw each node's children without replacement."""
        probs = torch.zeros(len(self._tree) + 1, self._vocab_size, device=self.device)

        def draw(logits: Tensor, level: _Level) -> Tensor:
            found = verify.logits_to_probs(logits, self._sampling)
            probs[upload(level.rows, self.device), : self._shared] = found
            return self._dice.draw_children(found, level.num_choices)

        self._drafted = self._grow(self._session.step, draw)
        return Draft(self._drafted, self._tree.parents, probs)

    def _capture_passes(self) -> None:
        """Make ready for the passes of a sampled round, each of which is a step of its own."""
        for parents in round_passes(self._tree):
            self._session.step(self._session.workspace.tokens[: len(parents)].clone(), parents)
        self._session.keep(())

    def _grow(self, forward: Forward, choose: Choose) -> Tensor:
        """Run the head and then the tree level by level; return the tokens [N] of all nodes, breadth-first."""
        known = self._model.vocab_size - 1  # the target's padding rows have no embedding in a draft with fewer of them
        logits = forward(self._session.workspace.tokens[: len(_HEAD)].clamp_max(known).clone(), _HEAD)[-1:]
        tokens = logits.new_empty(0, dtype=torch.int64)
        for level in self._levels:
            logits = self._penalised(logits[:, : self._shared], tokens, level)
            nodes = choose(logits, level).flatten()[level.choices]
            tokens = torch.cat([tokens, nodes])
            if level.parents:
                logits = forward(nodes[level.inner].clamp(0, known), level.parents)
        return tokens

    def _penalised(self, logits: Tensor, tokens: Tensor, level: _Level) -> Tensor:
        if self._sampling.penalty == 1:
            return logits
        rows, nodes = level.paths
        seen = self._seen[: self._shared].repeat(logits.shape[0], 1)
        seen[rows, tokens[nodes].clamp_max(self._shared - 1)] = seen.new_ones(())  # True would come from the host
        return verify.penalise(logits.float(), seen, self._sampling.penalty)
