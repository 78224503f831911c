"""A simulated machine: what rounds, starts and prefills take on it, and whole answers through the policy."""

import random
from dataclasses import dataclass, field, replace
from functools import partial

from specvlm.speculate.lengths import Lengths
from specvlm.speculate.pace import Costs, Pace
from specvlm.speculate.policy import Acceptance, Auto, Credit, Start


@dataclass(frozen=True)
class Machine:
    """What things really take, in milliseconds."""

    costs: Costs
    before: float  # reading, encoding, prefill
    start: float = 0.0  # of the draft
    host: float = 0.0  # of a round that drafts, beside its passes
    missed: float = 0.0  # of a token that the draft has to catch up with
    noise: float = 0.05  # of the log of a round's time; one round in a hundred takes three times as long
    slower_after: float = float("inf")  # milliseconds of the answer; then all takes `slower` times as long
    slower: float = 1.5

    def round_ms(self, topology, missed, at):
        ms = self.costs.round_ms(topology)
        if len(topology):
            ms += self.host + missed * self.missed
        return ms * (self.slower if at > self.slower_after else 1.0)


@dataclass
class Pair:
    """What a loaded pair has learnt, and the machine that it runs on. `thought`: what the passes were timed at."""

    machine: Machine
    thought: Costs | None = None  # None: guessed from the sizes, scaled by the first plain step
    relative_size: float = 0.2
    acceptance: Acceptance = field(default_factory=Acceptance)
    credit: Credit = field(default_factory=Credit)
    lengths: Lengths = field(default_factory=Lengths)

    def answer(self, world, candidates, num_tokens, most=256):
        """Return the milliseconds of an answer, from file to last word, over those of plain decoding."""
        machine, dice = self.machine, random.Random(world.random.random())
        guess = Costs.guess(1.0, self.relative_size)
        pace = Pace(guess, is_guess=True, is_scaled=False) if self.thought is None else Pace(self.thought)
        start = Start(
            machine.start,
            machine.before,
            partial(self.lengths.remaining, "prompt"),
            partial(self.lengths.are_longer, "prompt"),
            machine.missed > 0,
        )
        chooser = Auto(pace, candidates, self.acceptance, self.credit, start)
        spent = plain = machine.before
        done, missed, has_begun = 1, 0, machine.start == 0
        while done < num_tokens:
            choice = chooser.choose(most - done - 1)
            is_drafted = len(choice.topology) > 0
            if is_drafted and not has_begun:
                chooser.started()
                has_begun, spent = True, spent + machine.start
            seen, tokens = world.round(choice.topology)
            tokens = min(tokens, num_tokens - done)
            ms = machine.round_ms(choice.topology, missed, spent)
            spent += ms
            for _ in range(tokens):
                plain += machine.round_ms((), 0, plain)
            slip = 3.0 if dice.random() < 0.01 else 1.0
            chooser.learn(choice, seen, tokens, ms * slip * dice.lognormvariate(0, machine.noise))
            missed = 0 if is_drafted else missed + 1
            done += tokens
        self.lengths.add("prompt", done, is_cut=done == most)
        if pace.has_drafted:
            self.thought = pace.costs
        return spent / plain


def wrong(costs, plain=1.0, rows=1.0, draft=1.0):
    """Return costs timed wrongly by these factors."""
    verify = {at: ms * (plain if at == 1 else rows) for at, ms in costs.verify.items()}
    return Costs(verify, costs.first * draft, {at: ms * draft for at, ms in costs.level.items()})


H200_VERIFY = {1: 17.3, 4: 17.4, 8: 17.7, 16: 18.1, 24: 18.5, 32: 19.4, 48: 22.0, 64: 23.4}
H200 = Machine(Costs(H200_VERIFY, 4.5, {1: 4.2, 4: 4.2, 8: 4.3}), before=2100, start=220, missed=0.01, noise=0.02)
INT4 = replace(H200, costs=Costs(H200_VERIFY, 2.5, {1: 2.2, 4: 2.2, 8: 2.3}))
CPU = Machine(Costs({1: 6.0, 33: 6.0 + 32 * 0.36}, 2.5, {1: 1.5, 9: 2.2}), before=400, start=64, missed=0.12, noise=0.1)
TINY = Machine(Costs({1: 0.40, 64: 0.45}, 0.25, {1: 0.12, 8: 0.13}), before=8, start=1.2, host=0.1, missed=0.002)
