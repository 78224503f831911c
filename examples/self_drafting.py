"""No second model: the target drafts for itself on the visual tokens that are kept.

On a GPU add draft_quant="int4" (or "fp8", "int8"): self-drafting then reads 4-bit weights, and the text stays the same.
"""

from specvlm import SpecVLM

model = SpecVLM.from_pretrained(draft="self")
answer = model.generate("src/specvlm/bundled/clips/example.mp4", "What happens?", tree="chain:3", max_new_tokens=16)
print(answer.text)
print(f"{answer.speculation.accepted_tokens} of {answer.speculation.drafted_tokens} drafted tokens were accepted")
