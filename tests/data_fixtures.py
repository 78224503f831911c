"""Makes tiny copies of the published data sets, in the layouts of their hub repositories."""

import json
import zipfile

import media
from PIL import Image

OPTIONS = ["a red kite", "a blue kite"]
MVBENCH_ROWS = {
    "action_sequence": [
        {"video": "ZS9XR.mp4", "question": "What came first?", "candidates": OPTIONS, "answer": OPTIONS[0]}
        | {"start": 0.5, "end": 1},
        {"video": "ZS9XR.mp4", "question": "What came last?", "candidates": OPTIONS, "answer": OPTIONS[0]}
        | {"start": 1, "end": 2.0},
    ],
    "moving_count": [{"video": "video_1.mp4", "question": "How many?", "candidates": ["1", "2"], "answer": "1"}],
    "episodic_reasoning": [
        {"video": "castle_s01", "question": "Who?", "candidates": OPTIONS, "answer": OPTIONS[1], "start": 1, "end": 2.1}
    ],
}
MLVU_ROWS = {
    "1_plotQA": [
        {"video": "8.mp4", "duration": 480, "question": "Which?", "candidates": OPTIONS, "answer": OPTIONS[0]}
        | {"question_type": "plotQA"}
    ],
    "9_summary": [
        {
            "video": "217.mp4",
            "duration": 480.5,
            "question": "Summarize it.",
            "answer": "...",
            "question_type": "summary",
        }
    ],
}


def clip(path):
    """Write a video of two seconds, 6 frames each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return media.make_video(path, 12)


def write_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def video_detail_caption(folder, rows=None):
    rows = rows or [
        {"video_name": "v_one", "question": "Please describe it.", "answer": "..."},
        {"video_name": "v_two", "question": "Describe the scene.", "answer": "..."},
    ]
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows)
    clip(folder / "Test_Videos/v_one.mp4")
    clip(folder / "Test_Videos/v_two.mkv")


def mvbench(folder, rows=None):
    for task, content in (rows or MVBENCH_ROWS).items():
        write_json(folder / f"json/{task}.json", content)
    clip(folder / "video/star/Charades_v1_480/ZS9XR.mp4")
    clip(folder / "video/data0613/clevrer/video_validation/video_1.mp4")
    for number in range(1, 13):
        picture = folder / f"video/tvqa/frames_fps3_hq/castle_s01/{number:05}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(media.picture(number)).save(picture)


def mlvu(folder):
    for task, content in MLVU_ROWS.items():
        write_json(folder / f"MLVU/json/{task}.json", content)
    clip(folder / "MLVU/video/1_plotQA/8.mp4")
    clip(folder / "MLVU/video/9_summary/217.mp4")


def long_video_bench(folder, *, is_json=False):
    common = {"question": "Which kite?", "video_path": "86Cxy.mp4", "correct_choice": 1, "duration": 8.5}
    rows = [common | {"id": f"86Cxy_{number}"} for number in range(2)]
    if is_json:
        write_json(folder / "lvb_val.json", [row | {"candidates": OPTIONS} for row in rows])
    else:
        options = {f"option{place}": (OPTIONS + ["N/A"] * 3)[place] for place in range(5)}
        write_parquet(folder / "validation-00000-of-00001.parquet", [row | options for row in rows])
    clip(folder / "videos/86Cxy.mp4")


def video_mme(folder):
    rows = [
        {"video_id": "001", "duration": "short", "videoID": name, "question_id": f"001-{number}", "question": "Which?"}
        | {"options": ["A. Apples.", "B. Candles."], "answer": "A", "url": f"https://example.com/{name}"}
        for number, name in enumerate(["fFjv93ACGo8", "fFjv93ACGo8", "N1cdUjctpG8"], 1)
    ]
    write_parquet(folder / "videomme/test-00000-of-00001.parquet", rows)
    clip(folder / "data/fFjv93ACGo8.mp4")
    clip(folder / "data/N1cdUjctpG8.MP4")


def pack(folder, archive):
    """Move what a folder holds into a .zip beside it, as the hub's repositories have it."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(archive.parent))
                path.unlink()


SETS = {
    "videodetailcaption": video_detail_caption,
    "mvbench": mvbench,
    "mlvu": mlvu,
    "longvideobench": long_video_bench,
    "video-mme": video_mme,
}
