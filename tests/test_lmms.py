"""lmms-eval runs specvlm as a model: the entry point, the translation of its requests, and its command on a local task.

Needs lmms-eval, installed as `make test` does.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import distribution, entry_points
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import media
import pytest
import tiny
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: see the Makefile")

import lmms_eval.models
from lmms_eval.api.instance import Instance
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history
from lmms_eval.utils import simple_parse_args_string
from loguru import logger

from specvlm import CapacityError, ConfigError, EngineConfig, MediaError, SpecVLM, UnsupportedModel
from specvlm.core.config import VideoConfig
from specvlm.engine.account import Speculation, Usage
from specvlm.families import parse
from specvlm.integrations.lmms import model as adapter
from specvlm.integrations.lmms.model import LmmsModel, to_settings
from specvlm.media import load as load_media

ROOT = Path(__file__).parent.parent
TASK = ROOT / "tests" / "lmms_task"
PAIR = {"target": tiny.checkpoint("qwen2_5_vl", "target"), "draft": tiny.checkpoint("qwen2_5_vl", "near")}


class Seconds(dict):
    time_to_first_token = 0.5


class FakePair:
    """Answers "1", "2", ... or raises what stands in its place in `errors`, and remembers what it was asked."""

    def __init__(self, errors=()):
        self.asked = []
        self.config = EngineConfig()
        self.target = SimpleNamespace(device="cpu")
        self._errors = dict(errors)

    def generate(self, messages, **settings):
        self.asked.append((messages, settings))
        number = len(self.asked)
        if number in self._errors:
            raise self._errors[number]
        return SimpleNamespace(
            text=str(number),
            usage=Usage(prompt_tokens=100 + number, completion_tokens=6),
            speculation=Speculation(rounds=2, target_passes=3, drafted_tokens=10, accepted_tokens=2 + number),
            seconds=Seconds(decode=0.25),
        )


@pytest.fixture
def load(monkeypatch):
    """Return a function that makes a model of model_args as they are written, and what its pair was loaded with."""

    def load(model_args="", pair=None, **options):
        loaded = {}

        def from_pretrained(target, **settings):
            loaded.update(target=target, **settings)
            return pair or FakePair()

        monkeypatch.setattr(SpecVLM, "from_pretrained", from_pretrained)
        return LmmsModel.create_from_arg_string(model_args, {"batch_size": 1, **options}), loaded

    return load


@pytest.fixture
def log():
    """Return the warnings and errors that are logged."""
    lines = []
    handler = logger.add(lambda line: lines.append(str(line).strip()), level="WARNING", format="{message}")
    yield lines
    logger.remove(handler)


def requests(model, messages_of, num=1, **generation_kwargs):
    """Return requests for the documents 0, 1, ... of a task, as lmms-eval makes them."""
    model.task_dict["task"] = {"test": list(range(num))}
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    return [
        Instance("generate_until", ("", messages_of, dict(generation_kwargs), doc, "task", "test"), 0, metadata)
        for doc in range(num)
    ]


def user(*content):
    return [{"role": "user", "content": list(content)}]


def say(text):
    return {"type": "text", "text": text}


# The entry point


def test_the_entry_point_leads_to_the_model():
    (entry,) = [entry for entry in entry_points(group="lmms_eval.models") if entry.name == "specvlm"]
    assert entry.value == "specvlm.integrations.lmms:manifest"
    assert entry.load()().model_id == "specvlm"
    assert lmms_eval.models.get_model("specvlm") is LmmsModel


@pytest.mark.parametrize(
    ("imported", "absent"), [("specvlm.cli.main, specvlm.engine.api", "lmms_eval"), ("lmms_eval.models", "torch")]
)
def test_neither_imports_the_other_before_it_is_chosen(imported, absent):
    code = f"import {imported}, sys; assert {absent!r} not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# model_args


@pytest.mark.parametrize(
    ("written", "arrives"),
    [
        ("", {"target": None, "draft": None, "device": "auto", "dtype": "auto"}),
        ("target=a,draft=b,draft_quant=int4,draft_device=cpu", {"draft": "b", "draft_quant": "int4"}),
        ("keep_ratio=0.2,num_frames=32,tree=chain:5,eager=true,drafter=none", {
            "keep_ratio": 0.2, "num_frames": 32, "tree": "chain:5", "eager": True, "drafter": "none"}),
        ('tree="0,1,00",stop=["A, B","C"]', {"tree": "0,1,00", "stop": ("A, B", "C")}),
        ('tree=["0","1"],stop=END', {"tree": ["0", "1"], "stop": ("END",)}),
    ],
)  # fmt: skip
def test_model_args_arrive_as_their_fields_take_them(load, written, arrives):
    _, loaded = load(written)
    assert {name: loaded[name] for name in arrives} == arrives
    settings = loaded.keys() - {*adapter.MODEL_OPTIONS, "watch"}
    assert settings == simple_parse_args_string(written).keys() - set(adapter.MODEL_OPTIONS)
    EngineConfig().replace(**{name: loaded[name] for name in settings})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "pretrained=x",
            "unknown model_args 'pretrained': known are target, draft, device, .*, keep_ratio, .*, window$",
        ),
        ("tree=[0", r"tree=\[0 is not allowed: give a list or quoted text as JSON"),
        ("keep_ratio=2", "keep_ratio=2.0 is not allowed: above 0 and at most 1"),
    ],
)
def test_wrong_model_args_are_an_error(written, message):
    with pytest.raises(ConfigError, match=message):
        LmmsModel.create_from_arg_string(written, {"batch_size": 1})


def test_one_request_is_answered_at_a_time(load):
    for size in (1, "1"):
        load(batch_size=size, max_batch_size=8)
    with pytest.raises(ConfigError, match="batch_size='4' is not allowed: requests are answered one at a time"):
        load(batch_size="4")


@pytest.mark.parametrize(
    ("world_size", "given", "own"),
    [("1", "cuda", "cuda"), ("4", "cuda", "cuda:3"), ("4", "auto", "cuda:3"), ("4", "cpu", "cpu")],
)
def test_each_of_several_processes_takes_its_own_gpu(load, monkeypatch, world_size, given, own):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert load(device=given)[1]["device"] == own


# generation_kwargs


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"max_new_tokens": 16, "do_sample": False, "until": ["\n\n"]}, {"max_new_tokens": 16, "temperature": 0.0}),
        ({"temperature": 0, "top_p": 0, "top_k": 1, "num_beams": 1, "until": None}, {"temperature": 0}),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 20}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}),
        ({"do_sample": True, "top_p": None}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.9}, {"temperature": 0.2, "top_p": 0.9}),
        ({"until": "Q:"}, {"stop": ("Q:",)}),
        ({"until": ["Q:", "\n\n"]}, {"stop": ("Q:", "\n\n")}),
        ({"until": [], "keep_ratio": 0.2}, {"keep_ratio": 0.2}),
        ({"image_aspect_ratio": "pad"}, {"image_aspect_ratio": "pad"}),
    ],
)
def test_generation_kwargs_become_settings(given, settings):
    before = dict(given)
    assert to_settings(given) == settings
    assert given == before


def test_beam_search_is_refused():
    with pytest.raises(ConfigError, match="num_beams=3 is not allowed"):
        to_settings({"num_beams": 3})


def test_what_means_nothing_is_left_out_and_said_once(load, log):
    pair = FakePair()
    model, _ = load(pair=pair)
    asked = requests(model, lambda doc: user(say("?")), num=2, max_new_tokens=8, image_aspect_ratio="pad")
    model.generate_until(asked)
    assert [settings for _, settings in pair.asked] == [{"max_new_tokens": 8}] * 2
    assert log == ["generation_kwargs image_aspect_ratio='pad' has no meaning here and is left out"]


# Requests


def test_answers_come_in_the_order_of_the_requests_with_their_account(load):
    pair = FakePair()
    model, _ = load(pair=pair)
    results = model.generate_until(requests(model, lambda doc: user(say(f"question {doc}")), num=3))
    assert [messages[0]["content"][0]["text"] for messages, _ in pair.asked] == [f"question {doc}" for doc in range(3)]
    counts = [(each.text, each.token_counts.input_tokens, each.token_counts.output_tokens) for each in results]
    assert counts == [("1", 101, 6), ("2", 102, 6), ("3", 103, 6)]
    metrics = get_logged_metrics_history()[-1]
    assert metrics.pop("avg_speed") == pytest.approx(18 / metrics.pop("total_elapsed_time"))
    assert metrics == {
        "total_gen_tokens": 18, "total_requests": 3, "failed_requests": 0, "time_to_first_token": 0.5,
        "decode_seconds": 0.75, "target_passes": 9, "drafted_tokens": 30, "accepted_tokens": 12,
        "mean_accepted_length": 2.0, "acceptance_length": 3.0,
    }  # fmt: skip


def test_a_request_that_cannot_be_read_fails_alone(load, log):
    pair = FakePair({1: MediaError("a.mp4 holds text"), 3: CapacityError("too long")})
    model, _ = load(pair=pair)
    results = model.generate_until(requests(model, lambda doc: user(say("?")), num=4))
    assert [each.text for each in results] == ["", "2", "", "4"]
    assert log == [
        "task, document 0 gets an empty answer: a.mp4 holds text",
        "task, document 2 gets an empty answer: too long",
    ]
    metrics = get_logged_metrics_history()[-1]
    assert (metrics["failed_requests"], metrics["total_requests"], metrics["target_passes"]) == (2, 2, 6)


def test_any_other_error_ends_the_run(load):
    model, _ = load(pair=FakePair({1: UnsupportedModel("no")}))
    with pytest.raises(UnsupportedModel):
        model.generate_until(requests(model, lambda doc: user(say("?"))))


def test_rounds_go_on_until_the_task_ends_them(load):
    calls = []

    def messages_of(doc, **state):
        calls.append(state)
        if not state:
            return user(say("first"))
        if state["round_idx"] == 3:
            return None, True, [*state["previous_output"], None], None
        return user(say("next")), False, state["previous_output"], f"after {state['round_idx']}"

    model, _ = load()
    assert model.generate_until_multi_round(requests(model, messages_of)) == [["1", "2", "3", ""]]
    assert calls[1:] == [
        {"round_idx": 1, "previous_output": ["1"], "previous_round_info": None},
        {"round_idx": 2, "previous_output": ["1", "2"], "previous_round_info": "after 1"},
        {"round_idx": 3, "previous_output": ["1", "2", "3"], "previous_round_info": "after 2"},
    ]


def test_likelihoods_are_refused(load):
    model, _ = load()
    with pytest.raises(NotImplementedError, match=r"serves tasks of output_type generate_until, .* not loglikelihood"):
        model.loglikelihood([])


@pytest.mark.parametrize(
    ("part", "seconds"),
    [
        ({"url": {"path": "PATH", "video_start": 1, "video_end": 3.0}}, [1.0, 1.5, 2.0, 2.5]),
        ({"url": "PATH", "start_time": 2.5}, [2.5, 3.0, 3.5]),
        ({"url": "PATH", "end_time": 1.0}, [0.0, 0.5]),
    ],
)
def test_a_video_may_have_a_beginning_and_an_end_of_its_own(load, tmp_path, part, seconds):
    path = str(media.make_video(tmp_path / "clip.mp4", 40, rate=10))
    written = json.loads(json.dumps(part).replace("PATH", path))
    pair = FakePair()
    model, _ = load(pair=pair)
    content = [{"type": "video", "url": path}, {"type": "video", **written}, say("?")]
    model.generate_until(requests(model, lambda doc: user(*content), fps=2.0))
    whole, cut, text = pair.asked[0][0][0]["content"]
    assert (whole, text) == (content[0], content[2])
    _, (_, medium) = parse(user(content[0], cut, text))
    assert load_media(medium.source, medium.config(VideoConfig(fps=2.0))).seconds.tolist() == seconds


def test_any_media_give_the_text_that_the_pair_gives(tmp_path):
    path = str(media.make_video(tmp_path / "clip.mp4", 12, rate=2))
    image = Image.effect_mandelbrot((84, 56), (-2, -1, 1, 1), 20).convert("RGB")
    turns = [
        user(
            {"type": "video", "url": path},
            {"type": "video", "url": path, "start_time": 2.0},
            say("How do they differ?"),
        ),
        user({"type": "image", "url": image}, {"type": "image", "url": image.rotate(90)}, say("And these?")),
        user(say("Count to five.")),
        [{"role": "system", "content": "Be brief."}, *user(say("Hello"))],
    ]
    model = LmmsModel(**PAIR, device="cpu", tree="paper")
    results = model.generate_until(requests(model, turns.__getitem__, num=4, max_new_tokens=9, do_sample=False))
    pair = SpecVLM.from_pretrained(**PAIR, device="cpu")
    cut = {"type": "video", "video": path, "video_start": 2.0}
    turns[0][0]["content"][1] = cut
    assert [each.text for each in results] == [pair.generate(turn, max_new_tokens=9).text for turn in turns]
    assert all(each.text for each in results)
    model.clean()
    assert not hasattr(model, "_model")


# The whole


def test_lmms_eval_scores_a_local_task_and_logs_acceptance_and_speed(tmp_path):
    program, *options = documented_command()
    replaced = {
        "--model_args": "tree=paper,device=cpu",
        "--tasks": "specvlm_clips,specvlm_rounds",
        "--output_path": str(tmp_path / "out"),
    }
    options = [replaced.get(before, word) for before, word in pairwise(["", *options])]
    command = [str(Path(sys.executable).parent / program), *options, "--include_path", str(TASK), "--limit", "2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (tmp_path / "out").exists(), done.stdout + done.stderr
    (file,) = (tmp_path / "out").glob("*_results.json")
    content = json.loads(file.read_text())

    pair = SpecVLM.from_pretrained(device="cpu", tree="paper", max_new_tokens=96)
    documents = [json.loads(line) for line in (TASK / "questions.jsonl").read_text().splitlines()[:2]]
    clips = Path(adapter.__file__).parents[2] / "bundled" / "clips"
    answers = [
        [pair.generate(str(clips / document["video"]), question) for question in document["questions"]]
        for document in documents
    ]
    texts = [[answer.text for answer in each] for each in answers]
    assert samples(tmp_path, "clips") == [each[0] for each in texts]
    assert samples(tmp_path, "rounds") == texts
    assert texts[0][0].startswith("On a light spotted background there are 2 objects.")
    scores = [each["right,none"] for each in content["results"].values()]
    assert scores == [0.5, 0.75]  # "What colour is the star?" is answered wrongly

    kinds = [[answer for each in answers for answer in each], [each[0] for each in answers]]
    throughput = content["throughput"]
    assert throughput["total_gen_tokens"] == sum(answer.usage.completion_tokens for kind in kinds for answer in kind)
    passes = [sum(answer.speculation.target_passes for answer in kind) for kind in kinds]
    assert throughput["avg_target_passes"] == sum(passes) / 2 < throughput["total_gen_tokens"] / 4
    for passed in passes:
        assert f"target_passes: {passed}," in done.stdout
    lengths = [
        sum(answer.speculation.accepted_tokens for answer in kind) / sum(answer.speculation.rounds for answer in kind)
        for kind in kinds
    ]
    assert throughput["avg_mean_accepted_length"] == pytest.approx(sum(lengths) / 2)
    assert throughput["avg_acceptance_length"] == pytest.approx(1 + sum(lengths) / 2)
    assert throughput["avg_speed"] > 0
    assert "avg_mean_accepted_length" in done.stdout.partition("Throughput Summary")[2]


def documented_command():
    """Return the words of the command of docs/evaluation.md."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").replace("\\\n", "")
    (command,) = re.findall(r"^(\S+ --model specvlm .*)$", text, re.M)
    return shlex.split(command)


@pytest.mark.parametrize("name", ["CHANGELOG.md", "docs/evaluation.md"])
def test_the_documented_program_is_one_that_lmms_eval_installs(name):
    programs = set(re.findall(r"(\S*lmms\S*) --model", (ROOT / name).read_text(encoding="utf-8").replace("`", " ")))
    installed = {script.name for script in distribution("lmms_eval").entry_points.select(group="console_scripts")}
    assert programs <= installed
    assert programs == {documented_command()[0]}


def samples(folder, kind):
    """Return what lmms-eval wrote of each document: the text, or those of several rounds."""
    (file,) = (folder / "out").glob(f"*_samples_specvlm_{kind}.jsonl")
    return [json.loads(line)["filtered_resps"] for line in file.read_text().splitlines()]
