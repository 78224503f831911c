"""Describe a video with the bundled pair and say what drafting brought."""

from specvlm import SpecVLM

model = SpecVLM.from_pretrained()  # your own: from_pretrained("Qwen/Qwen2.5-VL-32B-Instruct", draft="Qwen/...-7B-...")
answer = model.generate("src/specvlm/bundled/clips/example.mp4", tree="paper", max_new_tokens=24)
print(answer.text)
print(f"{answer.usage.completion_tokens} tokens in {answer.speculation.target_passes} target passes")
