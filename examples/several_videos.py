"""Ask one question about two videos, each with settings of its own. (The bundled pair has only learnt to see one.)"""

from specvlm import SpecVLM

clips = "src/specvlm/bundled/clips"
content = [
    {"type": "video", "video": f"{clips}/example.mp4", "num_frames": 4},
    {"type": "video", "video": f"{clips}/clip00.mp4", "num_frames": 2},
    {"type": "text", "text": "What differs?"},
]
model = SpecVLM.from_pretrained()
answer = model.generate([{"role": "user", "content": content}], max_new_tokens=16)
for seen in answer.seen:
    print(f"{seen.source}: {len(seen.frame_times)} frames")
print(answer.text)
