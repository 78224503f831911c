"""For researchers: one item a target pass, with what was proposed and what of it the target agreed with."""

from specvlm import SpecVLM

model = SpecVLM.from_pretrained()
request = model.request("src/specvlm/bundled/clips/example.mp4", "What happens?", tree="chain:4", max_new_tokens=16)
for number, step in enumerate(model.rounds(request)):
    words = model.target.tokenizer.decode(step.token_ids)
    print(f"{number}: drafted {len(step.draft)}, accepted {step.num_accepted}: {words!r}")
print(f"{request.speculation.mean_accepted_length:.2f} accepted a round")
