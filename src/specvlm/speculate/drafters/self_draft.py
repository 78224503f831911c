"""Self-drafting: the target on the kept visual tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from specvlm.core.config import DraftConfig
from specvlm.families import Prompt
from specvlm.prune import select
from specvlm.runtime import attention
from specvlm.runtime.model import VideoLM
from specvlm.runtime.session import Session
from specvlm.speculate.accept import Accepted
from specvlm.speculate.drafters.base import Context, DraftWarning, drafter
from specvlm.speculate.drafters.model import ModelDrafter
from specvlm.speculate.growth import OVERLAP
from specvlm.speculate.policy import Observation


@drafter("self")
class SelfDrafter(ModelDrafter):
    """The target drafts for itself on the kept visual tokens, with the same weights or a quantised copy of them.

    Its keys and values are gathered from the target's cache: no second vision pass, no draft prefill. What the target
    verifies is gathered, too, so that the draft's own rows live for one round only.
    """

    needs_model = False
    is_target = True
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
        count, end = len(self._pending) - len(OVERLAP), self._context.session.length - 1
        if count:
            self._session.copy_rows(self._context.session, slice(end - count, end))
        self._pending = self._pending[-len(OVERLAP) :]

    def score_collector(self) -> attention.Scores | None:
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
