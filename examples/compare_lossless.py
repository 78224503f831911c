"""Decode plainly and speculatively and compare, token by token."""

from specvlm import SpecVLM
from specvlm.check.compare import compare

model = SpecVLM.from_pretrained(tree="paper", max_new_tokens=16)
comparison = compare(model, "src/specvlm/bundled/clips/example.mp4", "What happens?")
print(comparison.table())
print("every token the same:", comparison.is_identical)
