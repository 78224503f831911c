"""What a drafter is, how one is registered, and what is checked of a stranger's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from specvlm.core import checks, tree
from specvlm.core.clock import Seconds
from specvlm.core.config import DraftConfig, PruneConfig, SamplingConfig, shown
from specvlm.core.errors import ConfigError, SpecVLMError, SpecVLMWarning, one_line
from specvlm.core.rows import Rows
from specvlm.core.tree import Shape, Tree
from specvlm.families import Inputs, Prompt
from specvlm.runtime import attention
from specvlm.runtime.model import VideoLM
from specvlm.runtime.session import Session
from specvlm.speculate import policy
from specvlm.speculate.accept import Accepted, Draft
from specvlm.speculate.policy import Acceptance, Observation


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

    needs_model = False  # whether it drafts with a model that is not the target
    is_target = False  # whether the target drafts where the draft is another model
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

    def propose(self, token: int, topology: Shape | Tree) -> Draft:
        """Draft after the known text, whose newest token is `token`.

        Args:
            token: the last known token.
            topology: what the policy chose; an empty one asks for nothing.
        """
        raise NotImplementedError

    def commit(self, accepted: Accepted) -> Sequence[Observation]:
        """Learn which nodes of the last draft stand (the bonus token comes with the next `propose`).

        Returns:
            What the policy can learn from it.
        """
        return ()

    def rehearse(self, topology: Shape | Tree) -> None:
        """Do the work of a round and forget it, so that it can be timed."""

    def score_collector(self) -> attention.Scores | None:
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


def drafter_class(config: DraftConfig, model: VideoLM | None) -> type[Drafter]:
    """Return the class in force; without a draft model, "model" falls back to plain decoding."""
    return DRAFTERS["none" if config.drafter == "model" and model is None else config.drafter]


def model_of(config: DraftConfig, draft: VideoLM | None, target: VideoLM) -> VideoLM | None:
    """Return the model that drafts: the draft, or the target itself."""
    is_other = draft is None or draft.hf is not target.hf
    return target if drafter_class(config, draft).is_target and is_other else draft


def create(config: DraftConfig, draft: VideoLM | None, context: Context) -> Drafter:
    """Return a new drafter of the class in force, which has read the prompt."""
    return drafter_class(config, draft)(model_of(config, draft, context.target), config, context)


def propose(drafter: Drafter, token: int, topology: Shape | Tree, target: VideoLM) -> Draft:
    """Return what a drafter proposes. What a stranger's class returns is looked through first, which waits for it.

    Raises:
        ConfigError: it failed, or it returned something else than a Draft of this target's tokens.
    """
    if type(drafter).__module__.startswith("specvlm."):
        return drafter.propose(token, topology)
    name = type(drafter).__name__
    try:
        found: object = drafter.propose(token, topology)
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
