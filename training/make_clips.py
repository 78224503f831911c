"""Writes held-out clips as H.264 files, with their reference captions and facts.

python -m training.make_clips src/specvlm/bundled/clips
"""

import argparse
import json
from pathlib import Path

import av
import torch

from training.heldout import held_out, pixels
from training.language import PROMPTS, caption
from training.world import Scene

FILE_FPS = 4  # every second frame is one that the models see
FILE_SEEDS = 5000  # first scene of the files, apart from those that evaluate.py renders by itself
FILE_NOISE = 0.2  # of a training clip's noise: grain is what costs bytes
EXAMPLE = 5097


def write(scene: Scene, path: Path) -> None:
    """Encodes one scene at FILE_FPS."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FILE_FPS, options={"crf": "26", "preset": "slow", "threads": "1"})
        stream.pix_fmt = "yuv420p"
        for frame in pixels(scene, FILE_FPS, FILE_NOISE).numpy():
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def record(scene: Scene, number: int, name: str) -> dict[str, object]:
    """One line of clips.jsonl."""
    return {
        "id": name,
        "file": f"{name}.mp4",
        "prompt": PROMPTS[number % len(PROMPTS)],
        "caption": caption(scene),
        "facts": scene.facts(),
        "scene_seed": list(scene.seed),
        "frames": scene.num_frames,
    }


def main() -> None:
    """Writes the clips, their records, and one example that is not among them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "clips.jsonl").open("w") as lines:
        for number in range(args.count):
            scene, name = held_out(FILE_SEEDS + number), f"clip{number:02d}"
            write(scene, args.out / f"{name}.mp4")
            lines.write(json.dumps(record(scene, number, name)) + "\n")
    write(held_out(EXAMPLE), args.out / "example.mp4")


if __name__ == "__main__":
    main()
