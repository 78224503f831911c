"""Five published sets, in the layout of their hub repositories: a folder of annotations, and the unpacked videos.

    videodetailcaption  data/test-*.parquet (video_name, question), Test_Videos/NAME.mp4 from videos.zip
    mvbench             json/TASK.json (video, question, candidates; of five tasks start, end), video/ from video/*.zip
    mlvu                MLVU/json/TASK.json (video, question; of seven tasks candidates), MLVU/video/TASK/NAME
    longvideobench      validation-*.parquet or lvb_val.json (id, video_path, question, option0 to option4 or
                        candidates), videos/NAME from videos.tar.part.*
    video-mme           videomme/test-*.parquet (question_id, videoID, question, options), data/ID.mp4 from
                        videos_chunked_*.zip

Of MVBench's videos, nturgbd (fine_grained_pose) must be had from their makers, and tvqa (episodic_reasoning) are
folders of pictures, three a second, which are read as any list of pictures is: as if they were two a second.
"""

from __future__ import annotations

import glob
import importlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specvlm.core.errors import ConfigError, one_line
from specvlm_bench.data.samples import DESCRIBE, Claim, Data, Malformed, Placed, Row, claimed, found, spread

_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")
_LETTERS = "ABCDEFGHIJ"
_MVBENCH = {  # task -> where its videos lie below video/
    "action_antonym": "ssv2_video",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
_MVBENCH_CUT = ("sta", "star", "tvqa")  # whose questions are about a part of the video
_MVBENCH_FRAME_RATE = 3.0


@dataclass(frozen=True)
class Layout:
    """How a set is published."""

    repository: str  # on the hub
    annotations: tuple[str, ...]  # patterns, of which the first that matches counts
    parse: Callable[[Row], Claim]
    is_descriptive: bool = False  # its own questions ask for a description


def read_set(name: str, directory: str | None, *, ask: str, limit: int | None) -> Data:
    """Return the samples of a set of SETS, as bench.data.read says.

    Raises:
        ConfigError: `datasets` or the annotations are missing, the hub does not answer, or no sample is left.
    """
    layout = SETS[name]
    folder = _fetched(name, layout, layout.annotations) if directory is None else Path(directory)
    claims, problems = claimed(_rows(folder, layout), layout.parse)
    if ask == "describe" and not layout.is_descriptive:
        claims = list(_describing(claims))
    remedy = f"unpack the archives of {layout.repository} in {folder}, as its card says"
    if directory is None:
        claims = list(spread(claims, limit))
        _fetch_videos(name, layout, folder, claims, remedy)
    samples, missing = found(claims, str(folder), remedy)
    return Data.of(name, samples, [*problems, *missing], limit)


def _describing(claims: Iterable[Placed[Claim]]) -> Iterator[Placed[Claim]]:
    """Yield the first claim of each video, asking for a description of the whole video."""
    seen = set()
    for where, claim in claims:
        if claim.group not in seen:
            seen.add(claim.group)
            yield where, replace(claim, id=claim.group, prompt=DESCRIBE, cut={})


def _fetch_videos(name: str, layout: Layout, folder: Path, claims: Sequence[Placed[Claim]], remedy: str) -> None:
    """Fetch the files that hold the claims' videos, and unpack them where a video is not there yet."""
    patterns = {pattern for _, claim in claims for pattern in claim.archives}
    if found(claims, str(folder), remedy)[1]:
        from specvlm_bench.data import hub

        hub.unpack(_fetched(name, layout, patterns), sorted(patterns))


def _fetched(name: str, layout: Layout, patterns: Iterable[str]) -> Path:
    from specvlm_bench.data import hub  # imports huggingface_hub, which no wrong name need wait for

    return hub.fetch(name, layout.repository, patterns)


# Annotations


def _rows(folder: Path, layout: Layout) -> Iterator[Row]:
    """Yield every row of a set's annotations."""
    matches = (sorted(folder.glob(pattern)) for pattern in layout.annotations)
    files = next((files for files in matches if files), None)
    if files is None:
        raise ConfigError(
            f"{folder} holds no {' or '.join(layout.annotations)}: give a folder in the layout of {layout.repository}"
        )
    for file in files:
        place = file.relative_to(folder)
        for number, fields in enumerate(_table(file), 1):
            yield Row(f"{place}, row {number}", number, file.stem, fields)


def _table(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a parquet or JSON file. They are kept in memory: nothing is left in the user's cache."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(f'published sets need datasets ({error}): pip install "specvlm[bench]"') from error
    kind = "parquet" if file.suffix == ".parquet" else "json"
    with tempfile.TemporaryDirectory() as cache, _quiet(datasets):
        try:
            return list(
                datasets.load_dataset(
                    kind, data_files=glob.escape(str(file)), split="train", cache_dir=cache, keep_in_memory=True
                )
            )
        except Exception as error:  # what its readers raise is not documented
            reason = one_line(error.__cause__ or error)
            raise ConfigError(f"{file} is damaged and cannot be read ({reason}): fetch it again") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Show no progress of `datasets` meanwhile."""
    was_silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_silent:
            datasets.enable_progress_bars()


# What the rows of each set say


def _options(row: Row, value: object) -> list[str]:
    """Return the options of a multiple-choice question, as their text alone."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
        raise Malformed(f"its options are {value!r}: give a list of texts"[:200])
    if len(value) > len(_LETTERS):
        raise Malformed(f"it has {len(value)} options: give {len(_LETTERS)} at most")
    return value


def _bracketed(row: Row, options: Sequence[str]) -> str:
    """Return a question as MVBench and MLVU ask it."""
    lettered = "".join(f"({letter}) {option}\n" for letter, option in zip(_LETTERS, options, strict=False))
    return f"Question: {row.text('question')}\nOptions:\n{lettered}Only give the best option."


def _video_detail_caption(row: Row) -> Claim:
    name = row.text("video_name")
    videos = tuple(f"Test_Videos/{name}{suffix}" for suffix in _SUFFIXES)
    return Claim(name, row.text("question"), name, videos, archives=("videos.zip",))


def _mvbench(row: Row) -> Claim:
    folder = _MVBENCH.get(row.task)
    if folder is None:
        raise Malformed(f"{row.task} is no task of MVBench: remove the file, or rename it")
    group, top = f"{folder}/{row.text('video')}", folder.split("/")[0]
    return Claim(
        id=f"{row.task}-{row.number}",
        prompt=_bracketed(row, _options(row, row.fields.get("candidates"))),
        group=group,
        videos=(f"video/{group}", f"video/data0613/{group}"),  # data0613.zip replaces some of star and clevrer
        cut=row.cut() if top in _MVBENCH_CUT else {},
        frame_rate=_MVBENCH_FRAME_RATE if top == "tvqa" else None,
        archives=(f"video/{top}.zip", "video/data0613.zip"),
    )


def _mlvu(row: Row) -> Claim:
    group, options = f"{row.task}/{row.text('video')}", row.fields.get("candidates")
    return Claim(
        id=f"{row.task}-{row.number}",
        prompt=row.text("question") if options is None else _bracketed(row, _options(row, options)),
        group=group,
        videos=(f"MLVU/video/{group}",),
        archives=(f"MLVU/video/{glob.escape(group)}",),
    )


def _long_video_bench(row: Row) -> Claim:
    named = [row.fields.get(f"option{place}") for place in range(5)]
    given = row.fields.get("candidates") or [option for option in named if option not in (None, "N/A")]
    lettered = "".join(f"{letter}. {text}\n" for letter, text in zip(_LETTERS, _options(row, given), strict=False))
    path = row.text("video_path")
    return Claim(
        id=row.text("id"),
        prompt=f"{row.text('question')}\n{lettered}Answer with the option's letter from the given choices directly.",
        group=path,
        videos=(f"videos/{path}",),
        archives=("videos.tar.part.*",),
    )


def _video_mme(row: Row) -> Claim:
    name, options = row.text("videoID"), "\n".join(_options(row, row.fields.get("options")))  # "A. Apples."
    return Claim(
        id=row.text("question_id"),
        prompt=(
            "Select the best answer to the following multiple-choice question based on the video. Respond with only "
            f"the letter (A, B, C, or D) of the correct option.\n{row.text('question')}\n{options}\nThe best answer is:"
        ),
        group=name,
        videos=tuple(f"data/{name}{suffix}" for suffix in _SUFFIXES),
        archives=("videos_chunked_*.zip",),
    )


SETS = {
    "videodetailcaption": Layout(
        "lmms-lab/VideoDetailCaption", ("data/test-*.parquet",), _video_detail_caption, is_descriptive=True
    ),
    "mvbench": Layout("OpenGVLab/MVBench", ("json/*.json",), _mvbench),
    "mlvu": Layout("MLVU/MVLU", ("MLVU/json/*.json",), _mlvu),
    "longvideobench": Layout(
        "longvideobench/LongVideoBench", ("validation-*.parquet", "lvb_val.json"), _long_video_bench
    ),
    "video-mme": Layout("lmms-lab/Video-MME", ("videomme/test-*.parquet",), _video_mme),
}
