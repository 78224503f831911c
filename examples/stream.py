"""Print an answer while it is written."""

from specvlm import SpecVLM

model = SpecVLM.from_pretrained()
for chunk in model.stream("src/specvlm/bundled/clips/example.mp4", "What happens?", max_new_tokens=16):
    print(chunk.text, end="", flush=True)
print(f"\n[{chunk.finish_reason}]")
