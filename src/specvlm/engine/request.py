"""What is asked, and what is there of it after the target's prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from specvlm.core.byvalue import ByValue
from specvlm.core.clock import Seconds
from specvlm.core.config import EngineConfig
from specvlm.engine.account import Decision, Seen, Speculation, Usage
from specvlm.engine.fit import Prompted
from specvlm.families import Inputs, Medium, Message, Prompt
from specvlm.runtime.session import Session


@dataclass(eq=False)
class Request(ByValue):
    """One request and the account of its run. It runs once."""

    config: EngineConfig
    messages: Sequence[Message]
    media: Sequence[Medium]  # every video and image, in order of appearance
    usage: Usage = field(default_factory=Usage)
    speculation: Speculation = field(default_factory=Speculation)
    seconds: Seconds = field(default_factory=Seconds)
    keep: Tensor | None = None  # [K] int64, the visual tokens that the draft saw; None where it was never asked
    seen: tuple[Seen, ...] = ()  # what was read of every video and image
    loaded: Prompted | None = None  # its media, where they are read already
    decisions: list[Decision] = field(default_factory=list)  # one a target pass after the prefill


@dataclass(frozen=True)
class Prefilled:
    """A request after the target's prefill. `session.rollback()` makes it fit for another decode()."""

    inputs: Inputs
    prompt: Prompt  # the target's, unpruned
    session: Session
    logits: Tensor  # [vocab], for the first token
    scores: Tensor  # [V] float32, the target's attention to the visual tokens; zeros where the pruner reads none
    seconds: float = 0.0  # that encoding and prefill took
