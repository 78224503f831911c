"""Say what was drafted round by round, and why."""

from specvlm import SpecVLM
from specvlm.engine.explain import explain

model = SpecVLM.from_pretrained()
answer = model.generate("src/specvlm/bundled/clips/example.mp4", "What happens?", max_new_tokens=64)
print(explain(answer.decisions))
print("accepted at depth 1, 2, ...:", answer.speculation.accepted_per_depth)
