"""Sample: a seed gives the same text whatever is drafted, another seed may give another."""

from specvlm import SpecVLM

model = SpecVLM.from_pretrained(temperature=3.0, tree="chain:4", max_new_tokens=12)
clip, question = "src/specvlm/bundled/clips/example.mp4", "What happens?"
first = model.generate(clip, question, seed=1)
again = model.generate(clip, question, seed=1, drafter="none")
other = model.generate(clip, question, seed=2)
print("seed 1:", first.text)
print("seed 2:", other.text)
print("the same without a draft:", first.token_ids == again.token_ids)
