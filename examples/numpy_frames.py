"""Ask about frames that are in memory: a square that moves to the right."""

import numpy as np

from specvlm import SpecVLM

frames = np.zeros((8, 112, 112, 3), dtype=np.uint8)  # time, height, width, RGB
for time, frame in enumerate(frames):
    frame[40:70, 10 * time : 10 * time + 30] = (255, 0, 0)

model = SpecVLM.from_pretrained()
answer = model.generate(frames, "What happens?", fps=2.0, max_new_tokens=16)
print(answer.seen[0].frame_times)
print(answer.text)
