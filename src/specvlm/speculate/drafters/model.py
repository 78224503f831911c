"""A smaller model drafts: SpecVLM's own way."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from specvlm.core import tree
from specvlm.core.config import DraftConfig
from specvlm.core.errors import ConfigError
from specvlm.core.rows import Rows
from specvlm.core.tree import Shape, Tree
from specvlm.core.upload import staged, upload
from specvlm.families import Prompt
from specvlm.runtime.model import VideoLM
from specvlm.runtime.session import Session
from specvlm.speculate import accept, policy
from specvlm.speculate.accept import Accepted, Draft
from specvlm.speculate.drafters.base import Context, Drafter, drafter
from specvlm.speculate.growth import OVERLAP, Growth, append_chain
from specvlm.speculate.ngrams import words_of
from specvlm.speculate.policy import Observation

T = TypeVar("T")


@drafter("model")
class ModelDrafter(Drafter):
    """A smaller model of the family that sees the kept visual tokens and all text (SpecVLM, section 3).

    Each pass of a round is a function of fixed shape that waits for nothing: a CUDA graph on a GPU.
    """

    needs_model = True
    prunes = True
    encodes = True
    catches_up = True

    @torch.inference_mode()
    def __init__(self, model: VideoLM | None, config: DraftConfig, context: Context) -> None:
        if model is None:
            raise ConfigError(f"drafter={config.drafter!r} needs a draft model: name one, or choose drafter='none'")
        self._model, self._config, self._context = model, config, context
        self.device = model.device
        self._topology: Shape | Tree = tree.PLAIN
        self._num_nodes = 0
        self._sampling, self._chooser = context.sampling, accept.Chooser(context.sampling)
        self._shared = min(model.vocab_size, context.target.vocab_size)
        bias = context.target.rules.bias
        # baked into a round's graphs, beside its shape
        self._sampling_key = (self._shared, bias is None, *self._sampling.sampling_key)
        self._session, pruned = self._start(context)
        self._session.rollback(len(pruned) - 1)
        # known tokens that the cache does not hold yet
        self._pending = [*pruned.input_ids[-1:].tolist(), *context.text]
        self._count = len(context.text)  # tokens of the text that are known
        self._set_up_memory(context.prompt, bias)
        self._see(context.text)
        # beside the model, where tokens of it were asked for
        self._lookup = words_of(context.prompt, context.text) if config.lookup_tokens else None

    def _set_up_memory(self, prompt: Prompt, bias: Tensor | None) -> None:
        """Set up what the graphs of the draft's session read."""
        model, own = self._model, self._session.workspace.own
        seen = accept.seen_in(prompt.input_ids.to(model.device), model.vocab_size)
        self._seen: Tensor = own("seen", lambda: torch.empty_like(seen)).copy_(seen)
        self._bias: Tensor | None = None  # on the logits, [shared]
        if bias is not None:
            shared = bias[: self._shared].to(model.device)
            self._bias = own(("bias", self._shared), lambda: torch.empty_like(shared)).copy_(shared)
        self._clock: Tensor = own("clock", lambda: torch.zeros(2, dtype=torch.int64, device=model.device))
        bins = (tree.NUM_RANKS, policy.NUM_BINS)
        self._worth: Tensor = own("worth", lambda: torch.zeros(bins, dtype=torch.float32, device=model.device))

    def _start(self, context: Context) -> tuple[Session, Prompt]:
        """Return a session of the draft that holds the pruned prompt, and that prompt."""
        model = self._model
        prompt = context.prompt if model.hf is context.target.hf else model.encode(context.inputs)
        pruned = prompt.select(context.keep.to(model.device))
        if context.prune.positions == "repacked":
            pruned = pruned.repacked()
        session, _, _ = model.start(pruned, self._room, eager=context.eager)
        return session, pruned

    @property
    def _room(self) -> int:
        return self._context.sampling.max_new_tokens + 2 * tree.MAX_NODES

    @classmethod
    def options(cls, config: DraftConfig, sizes: Sequence[int]) -> Sequence[Shape | Tree]:
        """Return dynamic trees of any prepared size within the bounds that were asked for, or the one static tree."""
        parsed = tree.parse(config.tree)
        if not isinstance(parsed, Shape):
            return [parsed]
        bounds = (8, 63) if config.tree == "dynamic" else (parsed.depth, parsed.nodes)
        return policy.shapes(*bounds, sizes)

    @classmethod
    def relative_size(cls, model: VideoLM | None, target: VideoLM) -> float:
        """Return the bytes that a pass of the draft reads over those of the target's."""
        return 1.0 if model is None else model.step_bytes / target.step_bytes

    @torch.inference_mode()
    def propose(self, token: int, topology: Shape | Tree) -> Draft:
        """Draft a tree, one pass a level."""
        self._learn_token(token)
        self._topology = topology
        if not len(topology):
            return Draft.empty(self.device)
        draft = self._grown(topology)
        self._num_nodes = len(draft)
        if self._lookup is not None and (found := self._lookup.find(self._config.lookup_tokens)):
            padding = [-1] * (self._config.lookup_tokens - len(found))
            draft = append_chain(draft, [*found, *padding], self.device)
        return draft

    def _learn_token(self, token: int) -> None:
        self._pending.append(token)
        self._count += 1
        self._see([token])
        if self._lookup is not None:
            self._lookup.extend([token])

    def _grown(self, topology: Shape | Tree) -> Draft:
        """Run a round's passes; return the tree."""
        self._catch_up()
        space = self._session.workspace
        space.tokens[: len(OVERLAP)].copy_(staged(self._pending, self.device), non_blocking=True)
        if not self._chooser.is_greedy:
            self._clock.copy_(staged((self._count, self._sampling.seed or 0), self.device), non_blocking=True)
        if isinstance(topology, Shape):
            self._weigh()
        key = self._growth_key(topology)
        growth: Growth = space.own(("growth", key), lambda: self._new_growth(topology))
        self._growth = growth
        self._run(("overlap", key), partial(self._overlap, growth))
        for level in range(1, topology.depth):
            self._run(("level", key, level), partial(self._level, growth, level))
        return self._run(("nodes", key, topology), lambda: growth.nodes(topology))

    def _growth_key(self, topology: Shape | Tree) -> Hashable:
        """Return what the fixed tensors of a round depend on: of a shape, its width alone."""
        return (topology.width if isinstance(topology, Shape) else topology, *self._sampling_key)

    def _new_growth(self, topology: Shape | Tree) -> Growth:
        deepest = replace(topology, depth=tree.MAX_DEPTH) if isinstance(topology, Shape) else topology
        return Growth(deepest, self._worth, self.device)

    def _run(self, key: Hashable, function: Callable[[], T]) -> T:
        """Run a part of a round, on a GPU as a graph that is captured the first time."""
        with self._capturing(is_ready=not self._session.is_captured or self._session.workspace.has(key)):
            return self._session.run(key, function)

    def _capturing(self, *, is_ready: bool) -> AbstractContextManager[None]:
        """Count the time of what is not ready as that of a capture, which says nothing about a round's."""
        return nullcontext() if is_ready else self._context.seconds.stage("capture", self.device)

    def _level(self, growth: Growth, level: int) -> None:
        self._offer(growth, level, *growth.run_next(level))

    def _overlap(self, growth: Growth) -> None:
        tokens = self._session.workspace.tokens[: len(OVERLAP)]
        self._offer(growth, 0, tokens, growth.start(tokens))

    def _offer(self, growth: Growth, level: int, tokens: Tensor, rows: Rows) -> None:
        """Run the rows of a pass and hand their scores to the growth."""
        known = self._model.vocab_size - 1  # the target's padding rows have no embedding in a draft with fewer of them
        logits = self._session.forward(tokens.clamp(0, known), rows)
        if level == 0:
            logits, rows = logits[-1:], Rows(rows.sees[-1:], rows.depths[-1:])
        logits = logits[:, : self._shared].float()
        if self._bias is not None:
            logits = logits + self._bias
        if self._sampling.penalty != 1:
            before = growth.row_tokens[: rows.sees.shape[1]]
            seen = accept.seen_before(self._seen[: self._shared], before, rows.sees)
            logits = accept.penalise(logits, seen, self._sampling.penalty)
        if not self._chooser.is_greedy:  # the root, at depth 2 behind the overlap, stands where the next one comes
            places = self._clock[:1] + (rows.depths - len(OVERLAP))
            logits = self._chooser.scores(logits, places, seed=self._clock[1])
        growth.offer(level, logits)

    def _weigh(self) -> None:
        """Bring the running acceptance to the device: what a candidate is worth by rank and confidence."""
        worth = self._context.acceptance.log_worth()
        self._worth.copy_(staged(worth, self.device, torch.float32).view_as(self._worth), non_blocking=True)

    @torch.inference_mode()
    def commit(self, accepted: Accepted) -> Sequence[Observation]:
        """Keep the rows of the accepted path but its last token, which opens the next round."""
        words = accepted.token_ids[:-1]
        self._see(words)
        if self._lookup is not None:
            self._lookup.extend(words)
        self._count += len(words)
        if not len(self._topology):
            return ()
        rows, observations = self._growth.read(self._num_nodes, accepted)
        self._store(rows, words)
        return observations

    def _store(self, rows: Sequence[int], words: Sequence[int]) -> None:
        """Make rows of the round part of the known text, given those of the accepted nodes, -1 where none was run."""
        path = [len(OVERLAP) - 1, *rows][: len(words)]  # of the root and the accepted nodes but the last
        stored = next((place for place, row in enumerate(path) if row < 0), len(path))
        self._session.keep([0, *path[:stored]])
        self._pending = [self._pending[-1], *words][stored:]

    def rehearse(self, topology: Shape | Tree) -> None:
        """Do the work of a round and forget it. Known tokens that were not run yet are run first, for good."""
        with torch.inference_mode():
            self._pending.append(self._pending[-1])  # in place of the newest token
            self._catch_up()
            pending = self._pending[:-1]
            self._grown(topology)
            self._session.keep(())
        self._pending = pending

    def _catch_up(self) -> None:
        """Run the known tokens before the last two, where the rounds before drafted nothing."""
        older = self._pending[: -len(OVERLAP)]
        while older:
            part, older = older[: tree.MAX_NODES + 1], older[tree.MAX_NODES + 1 :]
            size = 1 << (len(part) - 1).bit_length() if self._session.is_captured else len(part)  # few graphs
            tokens = upload([*part, *[part[-1]] * (size - len(part))], self.device)
            with self._capturing(is_ready=self._session.is_ready(size)):
                self._session.step(tokens.clamp_max(self._model.vocab_size - 1), range(-1, size - 1))
            self._session.keep(range(len(part)))
        self._pending = self._pending[-len(OVERLAP) :]

    def _see(self, tokens: Sequence[int]) -> None:
        if self._sampling.penalty != 1 and tokens:
            self._seen.index_fill_(0, upload(tokens, self.device).clamp_max(self._model.vocab_size - 1), True)
