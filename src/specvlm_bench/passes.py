"""One timed answer of this engine to a prefilled request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from specvlm.core.clock import wait
from specvlm.engine.account import Decision, measure_peak, reset_peak
from specvlm.engine.api import SpecVLM
from specvlm.engine.request import Prefilled
from specvlm_bench.clips import PROMPT


@dataclass(frozen=True)
class Pass:
    """One answer: `decode_s` reaches from the first token's arrival to the last's, drafting's preparation left out.

    So are calibration and the capture of graphs, which come once for a pair and length.
    """

    token_ids: list[int]
    first_ids: int  # tokens that came first, at once; 1 but for assisted generation
    decode_s: float
    stages: dict[str, float] = field(default_factory=dict)  # seconds of what came before, by stage
    mean_accepted_length: float | None = None
    kept_visual_tokens: int | None = None
    num_rounds: int = 0
    peak_bytes: int = 0
    decisions: tuple[Decision, ...] = ()  # one a target pass after the first token

    @property
    def ms_per_token(self) -> float:
        """Milliseconds a token after the first.

        Raises:
            ValueError: the text had one token only.
        """
        later = len(self.token_ids) - self.first_ids
        if later < 1:
            raise ValueError(f"the text ended after {len(self.token_ids)} tokens: nothing to time")
        return 1e3 * self.decode_s / later


def decode(model: SpecVLM, start: Prefilled, **settings: Any) -> Pass:
    """Answer with this engine from the end of the prompt on."""
    devices = model.devices
    start.session.rollback()
    request = model.request(None, PROMPT, **settings)
    reset_peak(*devices)
    rounds = model.decode(request, start)
    ids = list(next(rounds).token_ids)
    begin = time.perf_counter()
    for latest in rounds:
        ids += latest.token_ids
    wait(*devices)
    wall = time.perf_counter() - begin
    seconds, speculation = request.seconds.to_dict(), request.speculation
    totals = ("decode", "time_to_first_token", "total")
    before = {name: value for name, value in seconds.items() if name not in totals}
    is_drafted = speculation.rounds > 0
    return Pass(
        ids,
        1,
        wall - sum(before.values()),
        before,
        speculation.mean_accepted_length if is_drafted else None,
        None if request.keep is None else request.usage.kept_visual_tokens,
        speculation.rounds,
        measure_peak(*devices),
        tuple(request.decisions),
    )
