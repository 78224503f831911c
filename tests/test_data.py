"""The data of a quality run: what each source gives, and that what is malformed is named and left out."""

import fnmatch
import json
import shutil
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import data_fixtures as fixtures
import media
import pytest

from specvlm import ConfigError
from specvlm.core.config import EngineConfig, VideoConfig
from specvlm.media import load
from specvlm_bench import data
from specvlm_bench.data import hub
from specvlm_bench.presets import PRESETS, preset

needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason='needs pip install "specvlm[bench]"')
GOOD = {"id": "a", "video": "one.mp4", "prompt": "What happens?"}


def write(folder, *lines):
    """Write a JSONL beside one.mp4; a line is bytes, or what becomes JSON."""
    fixtures.clip(folder / "one.mp4")
    file = folder / "questions.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


def ids(found):
    return [sample.id for sample in found.samples]


# JSONL


MALFORMED = {
    "broken": (b'{"id": "b", "video": ', "it is no JSON"),
    "not UTF-8": (b'{"id": "b", "video": "one.mp4", "prompt": "\xff"}', "it is no JSON"),
    "deeply nested": (b"[" * 100_000, "it is no JSON"),
    "a list": (["b", "one.mp4"], "no object but list"),
    "no id": ({"video": "one.mp4", "prompt": "What?"}, "it has no id"),
    "true as id": ({**GOOD, "id": True}, "id is True: give a text"),
    "half a letter": ({**GOOD, "prompt": "\ud800"}, "prompt holds half of a surrogate pair"),
    "no video": ({"id": "b", "prompt": "What?"}, "it has no video"),
    "no prompt": ({"id": "b", "video": "one.mp4"}, "it has no prompt"),
    "an empty prompt": ({**GOOD, "id": "b", "prompt": " \n"}, "prompt is empty"),
    "a list as prompt": ({**GOOD, "id": "b", "prompt": ["What?"]}, "prompt is ['What?']"),
    "a missing video": ({**GOOD, "id": "b", "video": "two.mp4"}, "two.mp4': give its path from"),
    "a folder as video": ({**GOOD, "id": "b", "video": "."}, "there is no video"),
    "no path at all": ({**GOOD, "id": "b", "video": "a\0b"}, "there is no video"),
    "a line break in the path": ({**GOOD, "id": "b", "video": "a\nb"}, "there is no video"),
    "a second of its id": ({**GOOD, "prompt": "Again?"}, "id 'a' is that of questions.jsonl, line 1"),
    "a part that ends before it starts": ({**GOOD, "id": "b", "start": 2, "end": 1}, "end=1.0 is not allowed"),
    "a setting of the run": ({**GOOD, "id": "b", "num_frames": 4}, "num_frames is a setting of the whole run"),
    "a key twice": (b'{"id": "b", "id": "c", "video": "one.mp4", "prompt": "What?"}', "key 'id' stands there twice"),
    "a time that is text": ({**GOOD, "id": "b", "start": "0:10"}, "start='0:10' is not allowed"),
}


def test_an_id_may_be_a_number_and_a_path_is_one_video_however_it_is_written(tmp_path):
    lines = [{**GOOD, "id": 7}, {**GOOD, "id": 8, "video": f"./{GOOD['video']}"}]
    found = data.read(str(write(tmp_path, *lines)))
    assert ids(found) == ["7", "8"]
    assert len({sample.group for sample in found.samples}) == 1


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_named_and_the_rest_is_read(tmp_path, name):
    line, text = MALFORMED[name]
    found = data.read(str(write(tmp_path, GOOD, b"", line, {**GOOD, "id": "z"})))
    assert ids(found) == ["a", "z"]
    assert found.samples[0].prompt == GOOD["prompt"]
    [problem] = found.problems
    assert problem.where == "questions.jsonl, line 3"
    assert text in problem.text
    assert "\n" not in problem.text


def test_a_line_says_the_video_from_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = {"id": "b", "video": "one.mp4", "prompt": "Q", "start": 0.5, "end": None, "note": "else", "scene_seed": [1]}
    file = write(tmp_path / "deep", GOOD, part)
    found = data.read(str(file.relative_to(tmp_path)))
    assert found.name == "deep/questions.jsonl"
    first, second = found.samples
    assert (first.video, first.group, first.settings) == ("deep/one.mp4", "one.mp4", {})
    assert second.settings == {"start": 0.5}
    assert second.group == first.group
    assert load(second.video, VideoConfig(**second.settings)).pixels.shape[0] == 3


@pytest.mark.parametrize(
    "url", ["https://example.com/a.mp4", "file:///no/where.mp4", "HTTP://x/y", "data:;base64,AA=="]
)
def test_a_url_is_not_looked_for(tmp_path, url):
    assert data.read(str(write(tmp_path, {**GOOD, "video": url}))).samples[0].video == url


def test_only_a_line_feed_ends_a_line(tmp_path):
    text = "What\u2028happens\x0b\x85here?"
    line = json.dumps({**GOOD, "prompt": text}, ensure_ascii=False).encode()
    found = data.read(str(write(tmp_path, b"\xef\xbb\xbf" + line + b"\r", {**GOOD, "id": "b"}, b"")))
    assert found.samples[0].prompt == text
    assert ids(found) == ["a", "b"]
    assert not found.problems


def test_lines_without_a_prompt_ask_for_a_description_where_that_is_wanted(tmp_path):
    file = str(write(tmp_path, GOOD, {"id": "b", "video": "one.mp4"}, {**GOOD, "id": "c", "prompt": ""}))
    found = data.read(file, ask="describe")
    assert [sample.prompt for sample in found.samples] == ["What happens?", data.DESCRIBE]
    assert [problem.where for problem in found.problems] == ["questions.jsonl, line 3"]


def test_data_without_a_sample_are_an_error_that_names_the_first_problem(tmp_path):
    file = write(tmp_path, {**GOOD, "video": "two.mp4"}, {**GOOD, "id": "b", "video": "two.mp4"})
    with pytest.raises(ConfigError, match=r"no sample \(2 problems\); questions.jsonl, line 1: there is no video"):
        data.read(str(file))
    file.write_bytes(b"\n")
    with pytest.raises(ConfigError, match="it is empty"):
        data.read(str(file))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "mvbanch"}, "data='mvbanch' is unknown: give bundled, videodetailcaption, mvbench"),
        ({"name": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
        ({"ask": "shout"}, "ask='shout' is not allowed: question or describe"),
        ({"limit": 0}, "limit=0 is not allowed: at least 1"),
        ({"directory": "here"}, "directory='here' is not allowed here: it is for videodetailcaption"),
    ],
)
def test_a_wrong_argument_is_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        data.read(**arguments)


# The bundled clips


def test_the_bundled_clips_are_the_default():
    found = data.read()
    assert (found.name, len(found.samples), found.problems) == ("bundled", 40, ())
    assert found == data.read("bundled")
    assert len({sample.group for sample in found.samples}) == 40
    assert (found.samples[0].id, found.samples[0].prompt) == ("clip00", "Describe the video in detail.")
    assert load(found.samples[39].video, VideoConfig(num_frames=2)).pixels.shape[0] == 2


def test_a_limit_spreads_over_the_data():
    assert ids(data.read(limit=4)) == ["clip00", "clip10", "clip20", "clip30"]
    assert len(data.read(limit=39).samples) == 39
    assert len(data.read(limit=1000).samples) == 40


# Published sets


@pytest.fixture
def folder(tmp_path, request):
    """A set's folder, as published."""
    fixtures.SETS[request.param](tmp_path / request.param)
    return tmp_path / request.param


def of(name):
    return pytest.mark.parametrize("folder", [name], indirect=True)


QUESTIONS = {  # id -> prompt, group
    "videodetailcaption": {
        "v_one": ("Please describe it.", "v_one"),
        "v_two": ("Describe the scene.", "v_two"),
    },
    "mvbench": {
        "action_sequence-1": (
            "Question: What came first?\nOptions:\n(A) a red kite\n(B) a blue kite\nOnly give the best option.",
            "star/Charades_v1_480/ZS9XR.mp4",
        ),
        "action_sequence-2": (
            "Question: What came last?\nOptions:\n(A) a red kite\n(B) a blue kite\nOnly give the best option.",
            "star/Charades_v1_480/ZS9XR.mp4",
        ),
        "episodic_reasoning-1": (
            "Question: Who?\nOptions:\n(A) a red kite\n(B) a blue kite\nOnly give the best option.",
            "tvqa/frames_fps3_hq/castle_s01",
        ),
        "moving_count-1": (
            "Question: How many?\nOptions:\n(A) 1\n(B) 2\nOnly give the best option.",
            "clevrer/video_validation/video_1.mp4",
        ),
    },
    "mlvu": {
        "1_plotQA-1": (
            "Question: Which?\nOptions:\n(A) a red kite\n(B) a blue kite\nOnly give the best option.",
            "1_plotQA/8.mp4",
        ),
        "9_summary-1": ("Summarize it.", "9_summary/217.mp4"),
    },
    "longvideobench": {
        f"86Cxy_{number}": (
            "Which kite?\nA. a red kite\nB. a blue kite\n"
            "Answer with the option's letter from the given choices directly.",
            "86Cxy.mp4",
        )
        for number in range(2)
    },
    "video-mme": {
        f"001-{number}": (
            "Select the best answer to the following multiple-choice question based on the video. Respond with only "
            "the letter (A, B, C, or D) of the correct option.\nWhich?\nA. Apples.\nB. Candles.\nThe best answer is:",
            name,
        )
        for number, name in enumerate(["fFjv93ACGo8", "fFjv93ACGo8", "N1cdUjctpG8"], 1)
    },
}


@needs_datasets
@pytest.mark.parametrize("folder", fixtures.SETS, indirect=True)
def test_a_published_set_is_read_as_it_lies(folder):
    found = data.read(folder.name.upper(), str(folder))
    assert found.name == folder.name
    assert {sample.id: (sample.prompt, sample.group) for sample in found.samples} == QUESTIONS[folder.name]
    assert not found.problems
    for sample in found.samples:
        assert len(load(sample.video, VideoConfig(fps=6, **sample.settings)).pixels)


@needs_datasets
@pytest.mark.parametrize("folder", fixtures.SETS, indirect=True)
def test_a_description_is_asked_once_a_video(folder):
    found = data.read(folder.name, str(folder), ask="describe")
    groups = list(dict.fromkeys(group for _, group in QUESTIONS[folder.name].values()))
    assert [sample.group for sample in found.samples] == ids(found) == groups
    assert all(sample.settings == {} for sample in found.samples)
    own = [prompt for prompt, _ in QUESTIONS[folder.name].values()]
    expected = own if folder.name == "videodetailcaption" else [data.DESCRIBE] * len(groups)
    assert [sample.prompt for sample in found.samples] == expected
    assert not found.problems


@needs_datasets
@of("mvbench")
def test_mvbench_asks_about_parts(folder):
    part, *_, frames, count = data.read("mvbench", str(folder)).samples
    assert part.settings == {"start": 0.5, "end": 1}
    assert media.numbers(load(part.video, VideoConfig(fps=6, **part.settings)).pixels) == [3, 4, 5]
    assert (frames.settings, count.settings) == ({}, {})
    assert [Path(name).name for name in frames.video] == [f"{number:05}.jpg" for number in (4, 5, 6, 7)]
    whole = data.read("mvbench", str(folder), ask="describe").samples[1]
    assert len(whole.video) == 12


@needs_datasets
def test_longvideobench_comes_as_json_too(tmp_path):
    fixtures.long_video_bench(tmp_path, is_json=True)
    found = data.read("longvideobench", str(tmp_path))
    assert {sample.id: (sample.prompt, sample.group) for sample in found.samples} == QUESTIONS["longvideobench"]


@needs_datasets
def test_malformed_rows_are_named_and_the_rest_is_read(tmp_path):
    good = {"video": "ZS9XR.mp4", "question": "What?", "candidates": ["x", "y"], "start": 0, "end": 1}
    rows = [
        good,
        good | {"video": "gone.mp4"},
        good | {"question": ""},
        good | {"candidates": []},
        good | {"candidates": ["x", None]},
        good | {"candidates": ["x"] * 11},
        good | {"end": 0},
        {name: value for name, value in good.items() if name != "video"},
        good,
    ]
    late = [{"video": "castle_s01", "question": "Who?", "candidates": ["x"], "start": 9, "end": 12}]
    fixtures.mvbench(tmp_path, {"action_sequence": rows, "episodic_reasoning": late, "karaoke": [good]})
    found = data.read("mvbench", str(tmp_path))
    assert ids(found) == ["action_sequence-1", "action_sequence-9"]
    texts = {problem.where: problem.text for problem in found.problems}
    expected = {
        "json/action_sequence.json, row 2": "gone.mp4': unpack the archives of OpenGVLab/MVBench",
        "json/action_sequence.json, row 3": "question is empty",
        "json/action_sequence.json, row 4": "its options are []",
        "json/action_sequence.json, row 5": "its options are ['x', None]",
        "json/action_sequence.json, row 6": "it has 11 options",
        "json/action_sequence.json, row 7": "end=0.0 is not allowed",
        "json/action_sequence.json, row 8": "it has no video",
        "json/episodic_reasoning.json, row 1": "no frame to show (12 frames at 3 a second end before 9 s)",
        "json/karaoke.json, row 1": "karaoke is no task of MVBench",
    }
    assert texts.keys() == expected.keys()
    assert all(expected[where] in text for where, text in texts.items())


@needs_datasets
def test_an_id_that_comes_twice_is_a_problem_of_the_second(tmp_path):
    row = {"video_name": "v_one", "question": "What?", "answer": "..."}
    fixtures.video_detail_caption(tmp_path, [row, row | {"question": "Again?"}])
    found = data.read("videodetailcaption", str(tmp_path))
    assert [sample.prompt for sample in found.samples] == ["What?"]
    [problem] = found.problems
    assert problem.where == "data/test-00000-of-00001.parquet, row 2"
    assert "is that of data/test-00000-of-00001.parquet, row 1" in problem.text


@needs_datasets
@of("mlvu")
def test_nothing_is_shown_and_nothing_is_left(folder, tmp_path, capfd, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data.read("mlvu", str(folder))
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "cache").exists()
    assert not datasets.are_progress_bars_disabled()


@needs_datasets
@pytest.mark.parametrize("content", ["", "[{]", '"text"'])
@of("mlvu")
def test_damaged_annotations_are_an_error(folder, content):
    file = folder / "MLVU/json/9_summary.json"
    file.write_text(content)
    with pytest.raises(
        ConfigError, match=r"9_summary.json is damaged and cannot be read \(.+\): fetch it again"
    ) as info:
        data.read("mlvu", str(folder))
    assert "\n" not in str(info.value)


def test_a_folder_of_another_layout_is_an_error(tmp_path):
    with pytest.raises(
        ConfigError, match=r"holds no validation-\*.parquet or lvb_val.json: give a folder in the layout"
    ):
        data.read("longvideobench", str(tmp_path))


def test_where_datasets_is_missing_its_install_is_named(tmp_path, monkeypatch):
    fixtures.mlvu(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "specvlm\[bench\]"'):
        data.read("mlvu", str(tmp_path))


# The hub


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Stands for the hub: hands out the files of tmp_path/published; yields what was asked of it."""
    published, calls = tmp_path / "published", []

    def snapshot_download(repository, *, repo_type, allow_patterns, local_dir):
        calls.append((repository, repo_type, allow_patterns))
        for path in published.rglob("*"):
            name = path.relative_to(published).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local_dir / name)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub.constants, "HF_HOME", str(tmp_path / "home"))
    return calls


@needs_datasets
def test_from_the_hub_only_what_the_samples_need(tmp_path, asked):
    published = tmp_path / "published"
    fixtures.mvbench(published)
    fixtures.pack(published / "video/star", published / "video/star.zip")
    fixtures.pack(published / "video/tvqa", published / "video/tvqa.zip")
    found = data.read("mvbench", limit=2)
    assert ids(found) == ["action_sequence-1", "episodic_reasoning-1"]
    assert found.samples[0].video == str(tmp_path / "home/specvlm/mvbench/video/star/Charades_v1_480/ZS9XR.mp4")
    assert asked == [
        ("OpenGVLab/MVBench", "dataset", ["json/*.json"]),
        ("OpenGVLab/MVBench", "dataset", ["video/data0613.zip", "video/star.zip", "video/tvqa.zip"]),
    ]
    assert data.read("mvbench", limit=2) == found
    assert len(asked) == 3, "videos that are there are not fetched again"


@needs_datasets
def test_single_videos_are_fetched_singly(tmp_path, asked):
    fixtures.mlvu(tmp_path / "published")
    found = data.read("mlvu", limit=1)
    assert (ids(found), found.problems) == (["1_plotQA-1"], ())
    assert asked[1:] == [("MLVU/MVLU", "dataset", ["MLVU/video/1_plotQA/8.mp4"])]


def tarred(folder, num_parts=3):
    """Replace videos/ by the parts of an archive."""
    with tarfile.open(folder / "videos.tar", "w") as archive:
        archive.add(folder / "videos", "videos")
    shutil.rmtree(folder / "videos")
    content = (folder / "videos.tar").read_bytes()
    (folder / "videos.tar").unlink()
    size = len(content) // num_parts + 1
    for place in range(num_parts):
        (folder / f"videos.tar.part.a{'abc'[place]}").write_bytes(content[place * size : (place + 1) * size])


@needs_datasets
def test_the_parts_of_an_archive_are_joined(tmp_path, asked):
    fixtures.long_video_bench(tmp_path / "published")
    tarred(tmp_path / "published")
    [first, _] = data.read("longvideobench").samples
    assert len(load(first.video, VideoConfig(fps=6)).pixels) == 12


@needs_datasets
def test_a_video_is_there_as_a_whole_or_not_at_all(tmp_path, asked):
    published, home = tmp_path / "published", tmp_path / "home/specvlm/longvideobench"
    fixtures.long_video_bench(published)
    tarred(published)
    (published / "videos.tar.part.ac").rename(tmp_path / "last")
    second = published / "videos.tar.part.ab"
    content = second.read_bytes()
    second.write_bytes(content[:100])
    with pytest.raises(ConfigError, match=r"videos.tar.part.\* cannot be unpacked \(.+\): free space, or remove it"):
        data.read("longvideobench")
    assert not [path for path in home.rglob("*") if path.suffix == ".mp4"]
    second.write_bytes(content)
    (tmp_path / "last").rename(published / "videos.tar.part.ac")
    assert len(data.read("longvideobench").samples) == 2


def test_an_archive_cannot_write_beside_its_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    with zipfile.ZipFile(tmp_path / "deep/videos.zip", "w") as archive:
        archive.writestr("../out.mp4", b"")
    with pytest.raises(ConfigError, match=r"it holds '../out.mp4'"):
        hub.unpack(tmp_path / "deep", ["videos.zip"])


def test_what_is_unpacked_already_is_left_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "videos.zip", "w") as archive:
        archive.writestr("data/one.mp4", b"packed")
        archive.writestr("data/two.mp4", b"packed")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/one.mp4").write_bytes(b"here")
    hub.unpack(tmp_path, ["videos.zip"])
    assert [(tmp_path / f"data/{name}.mp4").read_bytes() for name in ("one", "two")] == [b"here", b"packed"]


@needs_datasets
def test_what_the_hub_does_not_have_is_a_problem(tmp_path, asked):
    fixtures.video_detail_caption(tmp_path / "published")
    fixtures.pack(tmp_path / "published/Test_Videos", tmp_path / "published/videos.zip")
    rows = [{"video_name": name, "question": "What?", "answer": "..."} for name in ("v_one", "v_gone")]
    fixtures.write_parquet(tmp_path / "published/data/test-00000-of-00001.parquet", rows)
    found = data.read("videodetailcaption")
    assert ids(found) == ["v_one"]
    assert [problem.where for problem in found.problems] == ["data/test-00000-of-00001.parquet, row 2"]


def test_a_hub_that_does_not_answer_is_an_error(tmp_path, monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub.constants, "HF_HOME", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"mlvu cannot be fetched from the hub \(no route to host\): .*MLVU/MVLU"
    ) as info:
        data.read("mlvu")
    assert "\n" not in str(info.value)


@needs_datasets
def test_a_damaged_archive_is_an_error(tmp_path, asked):
    fixtures.video_detail_caption(tmp_path / "published")
    shutil.rmtree(tmp_path / "published/Test_Videos")
    (tmp_path / "published/videos.zip").write_bytes(b"PK half")
    with pytest.raises(ConfigError, match=r"videos.zip cannot be unpacked \(.+\): free space, or remove it"):
        data.read("videodetailcaption")


# Presets


@pytest.mark.parametrize(("name", "num_frames"), [("paper-7b", 128), ("paper-32b", 64), ("paper-72b", 64)])
def test_a_preset_is_the_papers_setting(name, num_frames):
    chosen = preset(name)
    assert (chosen.data, chosen.ask) == ("videodetailcaption", "describe")
    assert chosen.data in data.NAMES
    assert chosen.ask in data.ASK
    assert "2508.16201" in chosen.source
    config = EngineConfig().replace(**chosen.settings)
    assert (config.video.num_frames, config.video.max_pixels) == (num_frames, 200_704)
    assert (config.sampling.max_new_tokens, config.sampling.temperature) == (256, 0)
    assert (config.draft.tree, config.draft.is_adaptive) == ("paper", False)
    prune = config.prune
    assert (prune.pruner, prune.keep_ratio, prune.mass, prune.focus) == ("verifier", 0.1, 0.4, 1)
    assert (prune.spacing, prune.score_rows) == ("sequence", "text")


def test_an_unknown_preset_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match="preset='paper-3b' is unknown: give paper-7b, paper-32b, paper-72b"):
        preset("paper-3b")
    with pytest.raises(TypeError):
        PRESETS["paper-7b"].settings["mass"] = 0.5
