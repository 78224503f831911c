"""The drafting side of one request: what is drafted, by whom, and from when on.

There is no drafter until a round is to draft for the first time: a short answer never pays for one.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from specvlm import prune
from specvlm.core import tree
from specvlm.core.tree import PLAIN
from specvlm.engine.request import Prefilled, Request
from specvlm.runtime import attention
from specvlm.runtime.model import VideoLM
from specvlm.speculate import accept, costs
from specvlm.speculate import drafters as drafting
from specvlm.speculate.drafters import Context, Drafter
from specvlm.speculate.memory import Memory
from specvlm.speculate.pace import Costs, Pace
from specvlm.speculate.policy import POLICIES, Acceptance, Auto, Choice, Credit, Fixed, Observation, Policy, Start

LEAST_TOKENS = 3  # of an answer that can be drafted for: one comes from the prefill, one follows any draft
_PROMPT_TOKENS = 24  # last ones of a prompt, by which answers to such prompts are known
_START_SHARE = {True: 0.16, False: 0.0}  # what reading the prompt on a draft is thought to take, over the target's


class Drafts:
    """Chooses what each round of one request drafts, and makes the drafter when it is first needed.

    Args:
        target: the model whose words come out.
        draft: the smaller one, None where there is none.
        memory: what the pair has learnt.
        request: what is answered.
        start: its prefill.
    """

    def __init__(
        self, target: VideoLM, draft: VideoLM | None, memory: Memory, request: Request, start: Prefilled
    ) -> None:
        self._target, self._draft, self._memory, self._request, self._start = target, draft, memory, request, start
        self._drafter_class = drafting.drafter_class(request.config.draft, draft)
        self._drafter: Drafter | None = None
        self._text: list[int] = []  # all known tokens
        self._acceptance = memory.acceptance.get(self._acceptance_key, Acceptance)
        self._policy = self._make_policy()

    def _make_policy(self) -> Policy:
        config = self._request.config
        options = self._drafter_class.options(config.draft, costs.sizes(self._start.session))
        if not options:
            return Fixed(PLAIN, self._acceptance)
        if config.draft.policy in POLICIES:
            return POLICIES[config.draft.policy](options, self._acceptance)
        if not config.draft.is_adaptive:
            return Fixed(tree.parse(config.draft.tree), self._acceptance)
        known = self._memory.times.get(self._target_key, self._draft_key)
        if known is not None:
            pace = Pace(known, is_timed=self._start.session.is_captured)
        else:
            model = drafting.model_of(config.draft, self._draft, self._target)
            size = self._drafter_class.relative_size(model, self._target)
            pace = Pace(Costs.guess(1.0, size), is_guess=True, is_scaled=False)
        credit = self._memory.credit.get(self._acceptance_key, Credit)
        return Auto(pace, options, self._acceptance, credit, self._what_starting_takes())

    def _what_starting_takes(self) -> Start:
        share = self._memory.start_share(self._drafter_class.__qualname__, _START_SHARE[self._drafter_class.encodes])
        prefill_ms, lengths = 1e3 * self._start.seconds, self._memory.lengths
        return Start(
            share * prefill_ms,
            prefill_ms + 1e3 * self._request.seconds["read"],
            partial(lengths.remaining, self._prompt_key),
            partial(lengths.are_longer, self._prompt_key),
            self._drafter_class.catches_up,
        )

    # Rounds

    def choose(self, token: int, left: int) -> Choice:
        """Return what the next round drafts, where `left` drafted tokens may still be accepted.

        Args:
            token: the newest known token.
            left: how many more tokens may come, the bonus token left out.
        """
        choice = self._policy.choose(left)
        if self._drafter is None and len(choice.topology):
            self._begin()
        self._text.append(token)
        return choice

    def propose(self, choice: Choice) -> accept.Draft:
        """Draft after the newest token."""
        if self._drafter is None:
            return accept.Draft.empty(self._target.device)
        draft = drafting.propose(self._drafter, self._text[-1], choice.topology, self._target)
        return draft.to(self._target.device)

    def score_collector(self) -> attention.Scores | None:
        """Return what shall collect the target's attention in the pass that verifies the last draft."""
        return None if self._drafter is None else self._drafter.score_collector()

    def foresee(self) -> None:
        """Prepare the next choice while a GPU is busy with the round."""
        self._policy.foresee()

    def commit(self, accepted: accept.Accepted) -> Sequence[Observation]:
        """Take in what of the last draft stands; return what it showed."""
        self._text += accepted.token_ids[:-1]
        return () if self._drafter is None else self._drafter.commit(accepted)

    def learn(self, choice: Choice, seen: Sequence[Observation], num_tokens: int, ms: float | None) -> None:
        """Learn from a round: see `policy.Policy.learn`."""
        self._policy.learn(choice, seen, num_tokens, ms)

    def finish(self, num_tokens: int, *, is_cut: bool) -> None:
        """Hand on what was learnt to the next requests.

        Args:
            num_tokens: of the answer.
            is_cut: whether it might have gone on.
        """
        memory = self._memory
        memory.lengths.add(self._prompt_key, num_tokens, is_cut=is_cut)
        if isinstance(self._policy, Auto):
            memory.credit.put(self._acceptance_key, self._policy.credit)
            memory.acceptance.put(self._acceptance_key, self._acceptance)
            if self._policy.pace.has_drafted:
                memory.times.put(self._target_key, self._draft_key, self._policy.pace.costs)

    # The start

    def _begin(self) -> None:
        """Prune, and make the drafter, which reads the prompt."""
        request, start, begin = self._request, self._start, time.perf_counter()
        stage, once = request.seconds.stage, request.seconds["capture"]
        keep = torch.arange(start.prompt.num_visual, device=self._target.device)
        if self._drafter_class.prunes:
            with stage("prune", self._target.device):
                keep = prune.select(start.scores, start.prompt.grid, start.prompt.visual_id, request.config.prune)
            request.keep, request.usage.kept_visual_tokens = keep, keep.shape[0]
        with stage("draft_prefill", *self._devices):
            self._drafter = drafting.create(request.config.draft, self._draft, self._context(keep))
        seconds = time.perf_counter() - begin - (request.seconds["capture"] - once)
        if start.seconds:
            usual = _START_SHARE[self._drafter_class.encodes]
            self._memory.add_start(self._drafter_class.__qualname__, seconds / start.seconds, usual)
        if isinstance(self._policy, Auto):
            self._policy.started()
            self._time_passes(self._policy)

    def _time_passes(self, policy: Auto) -> None:
        """Time passes that are captured anyway; elsewhere the rounds themselves tell what they take."""
        session, drafter = self._start.session, self._drafter
        if drafter is None or not session.is_captured or not policy.pace.is_guess:
            return
        with self._request.seconds.stage("calibrate", *self._devices):
            options = self._drafter_class.options(self._request.config.draft, costs.sizes(session))
            policy.pace.retime(costs.measure(session, drafter, options))

    def _context(self, keep: Tensor) -> Context:
        config, start = self._request.config, self._start
        return Context(
            target=self._target,
            session=start.session,
            inputs=start.inputs,
            prompt=start.prompt,
            keep=keep,
            scores=start.scores,
            sampling=config.sampling,
            prune=config.prune,
            acceptance=self._acceptance,
            eager=config.run.eager,
            seconds=self._request.seconds,
            text=tuple(self._text),
        )

    @property
    def _devices(self) -> set[torch.device]:
        return {self._target.device, (self._draft or self._target).device}

    # What the memory is asked by

    @property
    def _acceptance_key(self) -> Hashable:
        """What acceptance depends on."""
        config = self._request.config
        return config.draft, config.prune, config.sampling.sampling_key

    @property
    def _target_key(self) -> tuple[Hashable, int]:
        """What a target pass takes its time for."""
        return self._request.config.run, len(self._start.prompt)

    @property
    def _draft_key(self) -> tuple[Hashable, int]:
        """What a draft pass takes its time for: who drafts, what kind of tree, and how much it has read."""
        config, prompt = self._request.config, self._start.prompt
        is_grown = isinstance(tree.parse(config.draft.tree), tree.Shape)
        length = len(prompt)
        if self._drafter_class.prunes:
            length -= prompt.num_visual - prune.budget(config.prune, prompt.num_visual) if prompt.num_visual else 0
        return (self._drafter_class.__qualname__, is_grown, config.draft.lookup_tokens, config.run), length

    @cached_property
    def _prompt_key(self) -> tuple[int, ...]:
        """The last words of the prompt: what is asked."""
        prompt = self._start.prompt
        words = torch.ones(len(prompt), dtype=torch.bool, device=prompt.visual_index.device)
        words[prompt.visual_index] = False
        return tuple(prompt.input_ids[words][-_PROMPT_TOKENS:].tolist())
