"""A pruner of your own: the draft sees the newest of what the target attends to."""

import torch

from specvlm import SpecVLM, pruner


@pruner("newest")
def newest(scores: torch.Tensor, grid: torch.Tensor, count: int) -> torch.Tensor:
    """Return the count tokens with the most attention [V], where a later time step (grid[:, 0]) weighs more."""
    return (scores * (1 + grid[:, 0])).topk(count).indices


model = SpecVLM.from_pretrained(pruner="newest", keep_ratio=0.2, tree="chain:4")
answer = model.generate("src/specvlm/bundled/clips/example.mp4", "What happens?", max_new_tokens=12)
print(f"the draft saw {answer.usage.kept_visual_tokens} of {answer.usage.visual_tokens} visual tokens")
print(f"{answer.speculation.mean_accepted_length:.1f} drafted tokens a round were accepted")
