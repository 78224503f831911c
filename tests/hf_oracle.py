"""Run Hugging Face's own processors, as `python hf_oracle.py TORCHVISION_FOLDER REQUESTS ANSWERS`; an oracle for tests.

They need torchvision, which has no CPU build: its CUDA build imports beside a CPU torch once the two operators that its
library would define are declared. It must not be importable anywhere else, or transformers fails to import: so it lies
in a folder of its own (`pip install --no-deps --target .venv/oracle torchvision==0.28.0`), used by this process alone.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return what the checkpoint's HF processor makes of messages, images and videos."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(request["directory"])
    text = processor.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
    for old, new in request["replace"]:
        text = text.replace(old, new)
    media: dict[str, Any] = {}
    if request["images"]:
        media["images"] = [request["images"]] if request["nested"] else request["images"]
    if request["videos"]:
        media |= {"videos": request["videos"], "video_metadata": request["metadata"], "do_sample_frames": False}
    return dict(processor(text=[text], return_tensors="pt", **media))


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    warnings.simplefilter("ignore")
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    requests = torch.load(sys.argv[2], weights_only=False)
    torch.save({name: answer(request) for name, request in requests.items()}, sys.argv[3])
