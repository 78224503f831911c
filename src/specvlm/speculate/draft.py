"""Drafters: each proposes a tree of tokens a round. A new one is a class under `@drafter(name)`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from specvlm.core import checks, tree
from specvlm.core.clock import Seconds
from specvlm.core.config import DraftConfig, PruneConfig, SamplingConfig, shown
from specvlm.core.errors import ConfigError, SpecVLMError, SpecVLMWarning, one_line
from specvlm.core.rows import Rows
from specvlm.core.tree import Shape, Tree
from specvlm.core.upload import staged, upload
from specvlm.families import Inputs, Prompt
from specvlm.prune import select
from specvlm.runtime import attention
from specvlm.runtime.model import VideoLM
from specvlm.runtime.session import Session
from specvlm.speculate import policy, verify
from specvlm.speculate.growth import HEAD, Growth, merged
from specvlm.speculate.ngrams import Lookup
from specvlm.speculate.policy import Acceptance, Observation
from specvlm.speculate.verify import Accepted, Draft

T = TypeVar("T")


class DraftWarning(SpecVLMWarning):
    """A choice of drafter that works but cannot pay."""


@dataclass(frozen=True)
class Context:
    """One request, as a drafter sees it when it is first asked to draft."""

    target: VideoLM
    session: Session  # the target's; it holds all known tokens but the newest
    inputs: Inputs
    prompt: Prompt  # the target's, unpruned
    keep: Tensor  # [K] int64, ascending indices of the kept visual tokens
    scores: Tensor  # [V] float32, by which they were kept
    sampling: SamplingConfig
    prune: PruneConfig = field(default_factory=PruneConfig)
    acceptance: Acceptance = field(default_factory=Acceptance)  # running, of this request
    eager: bool = False  # run the Hugging Face modules as they are
    seconds: Seconds = field(default_factory=Seconds)  # of the request
    text: tuple[int, ...] = ()  # the known tokens of the text but the newest


class Drafter:
    """Proposes tokens. One instance serves one request, from the first time that it is asked to draft.

    All but `propose` may be left as it is.

    Args:
        model: the draft model, None where there is none.
        config: the request's.
        context: what it drafts for; reading the prompt is a part of making the drafter.
    """

    prunes = False  # whether it reads the prompt with pruned visual tokens
    encodes = False  # whether reading the prompt runs it on a model of its own
    catches_up = False  # whether it has to run what was decoded without it
    device = torch.device("cpu")

    def __init__(self, model: VideoLM | None, config: DraftConfig, context: Context) -> None: ...

    @classmethod
    def options(cls, config: DraftConfig, sizes: Sequence[int]) -> Sequence[Shape | Tree]:
        """Return what a policy may choose from.

        Args:
            config: the request's.
            sizes: numbers of rows (nodes and the root) that the target is prepared to verify.
        """
        return [tree.chain(1)]

    @classmethod
    def relative_size(cls, model: VideoLM | None, target: VideoLM) -> float:
        """Return the bytes that a pass of the draft reads over those of the target's; 0: drafting runs no model."""
        return 0.0

    def propose(self, token: int, drafted: Shape | Tree) -> Draft:
        """Draft after the known text, whose newest token is `token`.

        Args:
            token: the last known token.
            drafted: what the policy chose; an empty one asks for nothing.
        """
        raise NotImplementedError

    def commit(self, accepted: Accepted) -> Sequence[Observation]:
        """Learn which nodes of the last draft stand (the bonus token comes with the next `propose`).

        Returns:
            What the policy can learn from it.
        """
        return ()

    def rehearse(self, drafted: Shape | Tree) -> None:
        """Do the work of a round and forget it, so that it can be timed."""

    def watch(self) -> attention.Scores | None:
        """Return what shall collect the target's attention in the pass that verifies the last draft."""
        return None


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
        ConfigError: there is no drafter of that name (the known are listed), no such tree or no such policy, or one
            pass cannot verify the tree and the looked-up tokens.
    """
    checks.known("drafter", config.drafter, DRAFTERS)
    checks.drafting(config)
    if config.policy is not None:
        policy.check(config.policy)


def kind(config: DraftConfig, model: VideoLM | None) -> type[Drafter]:
    """Return the class in force; without a draft model, "model" falls back to plain decoding."""
    return DRAFTERS["none" if config.drafter == "model" and model is None else config.drafter]


def model_of(config: DraftConfig, draft: VideoLM | None, target: VideoLM) -> VideoLM | None:
    """Return the model that drafts: the draft, or the target itself."""
    is_other = draft is None or draft.hf is not target.hf
    return target if issubclass(kind(config, draft), SelfDrafter) and is_other else draft


def create(config: DraftConfig, draft: VideoLM | None, context: Context) -> Drafter:
    """Return a new drafter of the class in force, which has read the prompt."""
    return kind(config, draft)(model_of(config, draft, context.target), config, context)


def propose(drafter: Drafter, token: int, drafted: Shape | Tree, target: VideoLM) -> Draft:
    """Return what a drafter proposes. What a stranger's class returns is looked through first, which waits for it.

    Raises:
        ConfigError: it failed, or it returned something else than a Draft of this target's tokens.
    """
    if type(drafter).__module__.startswith("specvlm."):
        return drafter.propose(token, drafted)
    name = type(drafter).__name__
    try:
        found: object = drafter.propose(token, drafted)
    except (SpecVLMError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{name}.propose() failed: {type(error).__name__}: {one_line(error)}; mend it") from error
    if not isinstance(found, Draft):
        raise ConfigError(f"{name}.propose() returned {shown(found)}: a Draft is wanted, such as Draft.of() makes")
    if problem := _problem_of(found, target.vocab_size):
        raise ConfigError(f"{name}.propose() returned a Draft whose {problem}: make it with Draft.of()")
    return found


def _problem_of(draft: Draft, vocab_size: int) -> str | None:
    """Say what is wrong with a draft; None where nothing is."""
    tensors = {"tokens": draft.tokens, "parents": draft.parents, "notes": draft.notes}
    for name, values in tensors.items():
        if not isinstance(values, Tensor) or values.dtype != torch.int64 or values.dim() != 1:
            return f"{name} are no tensor [N] of int64"
    count = len(draft)
    if count > tree.MAX_NODES:
        return f"{count} nodes are more than {tree.MAX_NODES}"
    parents, tokens = draft.parents.tolist(), draft.tokens.tolist()
    if len(parents) != count or not all(-1 <= parent < node for node, parent in enumerate(parents)):
        return "parents are not one for each node, -1 or a node before it"
    if not all(-1 <= token < vocab_size for token in tokens):
        return f"tokens are not all from -1 (an empty place) to {vocab_size - 1}"
    rows = Rows.of((-1, *(parent + 1 for parent in parents)), count + 1, torch.device("cpu"))
    if not isinstance(draft.rows, Rows) or draft.rows.to(torch.device("cpu")) != replace(
        rows, is_chain=draft.rows.is_chain
    ):
        return "rows are not those of its parents"
    return None if rows.is_chain or not draft.rows.is_chain else "rows are no chain"


@drafter("none")
class NoDrafter(Drafter):
    """Proposes nothing: plain decoding, in the same engine and counted in the same way."""

    @classmethod
    def options(cls, config: DraftConfig, sizes: Sequence[int]) -> Sequence[Shape | Tree]:
        """There is nothing to choose."""
        return []

    def propose(self, token: int, drafted: Shape | Tree) -> Draft:
        """Propose nothing."""
        return Draft.empty()


def _words_of(prompt: Prompt, text: Sequence[int]) -> Lookup:
    """Return the index of the words of a prompt and of a text, over whose visual tokens no match reaches."""
    words = Lookup(set(prompt.input_ids[prompt.visual_index].tolist()))
    words.extend(prompt.input_ids.tolist())
    words.extend(text)
    return words


@drafter("lookup")
class LookupDrafter(Drafter):
    """Proposes what followed the newest tokens when prompt or text held them before: no model, no memory."""

    def __init__(self, model: VideoLM | None, config: DraftConfig, context: Context) -> None:
        self.device = context.target.device
        self._lookup = _words_of(context.prompt, context.text)
        self._proposed: list[int] = []
        self._chains: dict[int, Draft] = {}  # by length, on the target's device

    @classmethod
    def options(cls, config: DraftConfig, sizes: Sequence[int]) -> Sequence[Shape | Tree]:
        """Return chains of any prepared length, none longer than the tree that was asked for is deep."""
        most = 31 if config.tree == "dynamic" else tree.parse(config.tree).depth
        return [tree.chain(length) for length in sorted({min(size - 1, most) for size in sizes} - {0})]

    def propose(self, token: int, drafted: Shape | Tree) -> Draft:
        """Propose one chain, as long as the tree is deep."""
        self._lookup.extend([token])
        self._proposed = self._lookup.find(drafted.depth)
        if not self._proposed:
            return Draft.empty()
        if drafted.depth not in self._chains:
            self._chains[drafted.depth] = Draft.of([-1] * drafted.depth, range(-1, drafted.depth - 1), self.device)
        padding = [-1] * (drafted.depth - len(self._proposed))  # one size of pass, whatever was found
        tokens = upload([*self._proposed, *padding], self.device)
        return replace(self._chains[drafted.depth], tokens=tokens)

    def commit(self, accepted: Accepted) -> Sequence[Observation]:
        """Add what stands to the index."""
        stood = len(accepted.nodes)
        self._lookup.extend(accepted.token_ids[:stood])
        seen = min(stood + 1, len(self._proposed))
        return [Observation(depth + 1, 0 if depth < stood else None) for depth in range(seen)]


@drafter("model")
class ModelDrafter(Drafter):
    """A smaller model of the family that sees the kept visual tokens and all text (SpecVLM, section 3).

    Each pass of a round is a function of fixed shape that waits for nothing: a CUDA graph on a GPU.
    """

    prunes = True
    encodes = True
    catches_up = True

    @torch.inference_mode()
    def __init__(self, model: VideoLM | None, config: DraftConfig, context: Context) -> None:
        if model is None:
            raise ConfigError(f"drafter={config.drafter!r} needs a draft model: name one, or choose drafter='none'")
        self._model, self._config, self._context = model, config, context
        self.device = model.device
        self._drafted: Shape | Tree = tree.PLAIN
        self._num_nodes = 0
        self._sampling, self._chooser = context.sampling, verify.Chooser(context.sampling)
        self._shared = min(model.vocab_size, context.target.vocab_size)
        bias = context.target.rules.bias
        self._law = (self._shared, bias is None, *self._sampling.law)  # baked into a round's graphs, beside its shape
        self._session, pruned = self._start(context)
        self._session.rollback(len(pruned) - 1)
        # known tokens that the cache does not hold yet
        self._pending = [*pruned.input_ids[-1:].tolist(), *context.text]
        self._count = len(context.text)  # tokens of the text that are known
        self._set_up_memory(context.prompt, bias)
        self._see(context.text)
        # beside the model, where tokens of it were asked for
        self._lookup = _words_of(context.prompt, context.text) if config.lookup_tokens else None

    def _set_up_memory(self, prompt: Prompt, bias: Tensor | None) -> None:
        """Set up what the graphs of the draft's session read."""
        model, own = self._model, self._session.workspace.own
        seen = verify.seen_in(prompt.input_ids.to(model.device), model.vocab_size)
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
    def propose(self, token: int, drafted: Shape | Tree) -> Draft:
        """Draft a tree, one pass a level."""
        self._learn_token(token)
        self._drafted = drafted
        if not len(drafted):
            return Draft.empty(self.device)
        draft = self._grown(drafted)
        self._num_nodes = len(draft)
        if self._lookup is not None and (found := self._lookup.find(self._config.lookup_tokens)):
            padding = [-1] * (self._config.lookup_tokens - len(found))
            draft = merged(draft, [*found, *padding], self.device)
        return draft

    def _learn_token(self, token: int) -> None:
        self._pending.append(token)
        self._count += 1
        self._see([token])
        if self._lookup is not None:
            self._lookup.extend([token])

    def _grown(self, drafted: Shape | Tree) -> Draft:
        """Run a round's passes; return the tree."""
        self._catch_up()
        space = self._session.workspace
        space.tokens[: len(HEAD)].copy_(staged(self._pending, self.device), non_blocking=True)
        if not self._chooser.is_greedy:
            self._clock.copy_(staged((self._count, self._sampling.seed or 0), self.device), non_blocking=True)
        if isinstance(drafted, Shape):
            self._weigh()
        key = self._growth_key(drafted)
        growth: Growth = space.own(("growth", key), lambda: self._new_growth(drafted))
        self._growth = growth
        self._run(("head", key), partial(self._head, growth))
        for level in range(1, drafted.depth):
            self._run(("level", key, level), partial(self._level, growth, level))
        return self._run(("nodes", key, drafted), lambda: growth.nodes(drafted))

    def _growth_key(self, drafted: Shape | Tree) -> Hashable:
        """Return what the fixed tensors of a round depend on: of a shape, its width alone."""
        return (drafted.width if isinstance(drafted, Shape) else drafted, *self._law)

    def _new_growth(self, drafted: Shape | Tree) -> Growth:
        deepest = replace(drafted, depth=tree.MAX_DEPTH) if isinstance(drafted, Shape) else drafted
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

    def _head(self, growth: Growth) -> None:
        tokens = self._session.workspace.tokens[: len(HEAD)]
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
            seen = verify.seen_before(self._seen[: self._shared], before, rows.sees)
            logits = verify.penalise(logits, seen, self._sampling.penalty)
        if not self._chooser.is_greedy:  # the root, at depth 2 behind the head, stands where the next token is chosen
            places = self._clock[:1] + (rows.depths - len(HEAD))
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
        if not len(self._drafted):
            return ()
        rows, observations = self._growth.read(self._num_nodes, accepted)
        self._store(rows, words)
        return observations

    def _store(self, rows: Sequence[int], words: Sequence[int]) -> None:
        """Make rows of the round part of the known text, given those of the accepted nodes, -1 where none was run."""
        path = [len(HEAD) - 1, *rows][: len(words)]  # of the root and the accepted nodes but the last
        stored = next((place for place, row in enumerate(path) if row < 0), len(path))
        self._session.keep([0, *path[:stored]])
        self._pending = [self._pending[-1], *words][stored:]

    def rehearse(self, drafted: Shape | Tree) -> None:
        """Do the work of a round and forget it. Known tokens that were not run yet are run first, for good."""
        with torch.inference_mode():
            self._pending.append(self._pending[-1])  # in place of the newest token
            self._catch_up()
            pending = self._pending[:-1]
            self._grown(drafted)
            self._session.keep(())
        self._pending = pending

    def _catch_up(self) -> None:
        """Run the known tokens before the last two, where the rounds before drafted nothing."""
        older = self._pending[: -len(HEAD)]
        while older:
            part, older = older[: tree.MAX_NODES + 1], older[tree.MAX_NODES + 1 :]
            size = 1 << (len(part) - 1).bit_length() if self._session.is_captured else len(part)  # few graphs
            tokens = upload([*part, *[part[-1]] * (size - len(part))], self.device)
            with self._capturing(is_ready=self._session.is_ready(size)):
                self._session.step(tokens.clamp_max(self._model.vocab_size - 1), range(-1, size - 1))
            self._session.keep(range(len(part)))
        self._pending = self._pending[-len(HEAD) :]

    def _see(self, tokens: Sequence[int]) -> None:
        if self._sampling.penalty != 1 and tokens:
            self._seen.index_fill_(0, upload(tokens, self.device).clamp_max(self._model.vocab_size - 1), True)


@drafter("self")
class SelfDrafter(ModelDrafter):
    """The target drafts for itself on the kept visual tokens, with the same weights or a quantised copy of them.

    Its keys and values are gathered from the target's cache: no second vision pass, no draft prefill. What the target
    verifies is gathered, too, so that the draft's own rows live for one round only.
    """

    encodes = False
    catches_up = False

    def __init__(self, model: VideoLM | None, config: DraftConfig, context: Context) -> None:
        super().__init__(model, config, context)
        self._rounds = 0
        self._watched: attention.Scores | None = None

    def _start(self, context: Context) -> tuple[Session, Prompt]:
        if self._model.quant is None and context.keep.shape[0] == context.prompt.num_visual:
            text = "the target drafts for itself on all visual tokens and with its own weights, which cannot pay: "
            warnings.warn(f"{text}set draft_quant or a keep_ratio below 1", DraftWarning, stacklevel=2)
        self._attention = context.scores
        self._pruned = context.prompt.select(context.keep)
        rows = context.prompt.rows(context.keep)
        room, session = self._room, context.session
        return self._model.branch(self._pruned, session, rows, room, eager=context.eager), self._pruned

    def _store(self, rows: Sequence[int], words: Sequence[int]) -> None:
        """Forget the round's rows: the target's own of the same tokens come with the next round."""
        self._session.keep(())
        self._pending += words

    def _catch_up(self) -> None:
        """Gather the known tokens before the last two from the target, which has verified all but the newest."""
        count, end = len(self._pending) - len(HEAD), self._context.session.length - 1
        if count:
            self._session.copy_rows(self._context.session, slice(end - count, end))
        self._pending = self._pending[-len(HEAD) :]

    def watch(self) -> attention.Scores | None:
        """Return what shall collect the target's attention in this pass, every `refresh` rounds."""
        self._rounds += 1
        is_due = self._config.refresh > 0 and self._rounds % self._config.refresh == 0
        self._watched = attention.Scores(self._context.prompt.visual_index, 0) if is_due else None
        return self._watched

    def commit(self, accepted: Accepted) -> Sequence[Observation]:
        """Forget the round; choose the kept tokens anew where the target's attention was watched."""
        found: Sequence[Observation] = super().commit(accepted)
        if self._watched is not None:
            self._choose_again(self._watched)
        return found

    @torch.inference_mode()
    def _choose_again(self, watched: attention.Scores) -> None:
        """Keep what the text attends to by now: half of each token's score is new. One gather replaces the rows."""
        context, prompt = self._context, self._context.prompt
        self._attention = (self._attention + watched.mean) / 2
        keep = select(self._attention, prompt.grid, prompt.visual_id, context.prune)
        source, place = prompt.visual_index[keep], self._pruned.visual_index
        if len(source) == len(place):  # a pruner may keep fewer than it is asked for
            self._session.workspace.storage[:, :, :, place] = context.session.workspace.storage[:, :, :, source]
