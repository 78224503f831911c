"""Messages in the ecosystem's forms: what a part sets holds for itself, and what nothing reads is refused by name."""

import base64
import io
import json
import shutil
from pathlib import Path

import media
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from specvlm import ConfigError, SpecVLM
from specvlm.engine import sources
from specvlm.families import Limits, family_for


@pytest.fixture(scope="module")
def model():
    return SpecVLM.from_pretrained(tiny.checkpoint("qwen2_5_vl"), max_new_tokens=4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """60 numbered frames of 96 x 64, ten seconds."""
    return str(media.make_video(tmp_path_factory.mktemp("messages") / "clip.mp4", 60))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        Image.fromarray(media.picture(number)).save(path)
    return [str(path) for path in paths]


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def seen(model, *parts, **settings):
    """Return the loaded media of a request, and the inputs."""
    request = model.load(user(*parts, {"type": "text", "text": "Hi"}), **settings)
    return request.loaded.media, model.read(request)


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"fps": 1.0}, {"fps": 1.0}),
        ({"fps": "0.5"}, {"fps": 0.5}),
        ({"nframes": 6}, {"num_frames": 6}),
        ({"num_frames": 5}, {"num_frames": 5}),
        ({"video_start": 2, "video_end": 5.0}, {"start": 2.0, "end": 5.0}),
        ({"start": 2, "end": 5.0, "fps": 4}, {"start": 2.0, "end": 5.0, "fps": 4.0}),
        ({"fps": 0.1, "min_frames": 6}, {"num_frames": 6}),
        ({"fps": 3, "max_frames": 10}, {"num_frames": 10}),
        ({"max_pixels": 4 * 784}, {"fps": 2.0, "max_pixels": 4 * 784}),
        ({"total_pixels": 40 * 784}, {"fps": 2.0, "total_pixels": 40 * 784}),
        ({"min_pixels": 9 * 784}, {"fps": 2.0, "min_pixels": 9 * 784}),
        ({"resized_height": 60, "resized_width": 80}, {"fps": 2.0, "resized_height": 60, "resized_width": 80}),
        ({"fps": None, "image": None}, {"fps": 2.0}),
    ],
)
def test_a_part_has_its_own_settings(model, clip, settings, same):
    """They are those of the call for this part, and leave the other parts alone."""
    plain = {"type": "video", "video": clip}
    (own, other), inputs = seen(model, plain | settings, plain, fps=2.0)
    (alone,), wanted = seen(model, plain, **same)
    (usual,), _ = seen(model, plain, fps=2.0)
    assert torch.equal(own.pixels, alone.pixels)
    assert torch.equal(own.seconds, alone.seconds)
    assert torch.equal(other.pixels, usual.pixels)
    assert inputs.visuals[0] == wanted.visuals[0]
    count = len(wanted.model_kwargs["pixel_values_videos"])
    assert torch.equal(inputs.model_kwargs["pixel_values_videos"][:count], wanted.model_kwargs["pixel_values_videos"])


def test_exact_sizes_are_whole_cells_and_bounds_hold(model, clip):
    part = {"type": "video", "video": clip, "nframes": 4}
    for more, cells in (({"resized_height": 60, "resized_width": 80}, (2, 3)), ({"max_pixels": 4 * 784}, (1, 2))):
        _, inputs = seen(model, part | more)
        assert inputs.visuals[0].grid[1:] == cells
    picture = {"type": "image", "image": np.zeros((60, 60, 3), np.uint8), "resized_height": 84, "resized_width": 28}
    _, inputs = seen(model, picture)
    assert inputs.visuals[0].grid[1:] == (4, 2)  # 3 cells: fewer than 4 grow, as in qwen-vl-utils
    low, high = 7 * 784, 8 * 784
    for height, width in ((60, 60), (28, 300), (300, 40)):
        frames = tiny.video(2, height, width)
        family = model.target.family
        (visual,) = family.inputs(tiny.messages("video"), [frames], limits=[Limits(high, None, low)]).visuals
        assert visual.grid[1] * visual.grid[2] * 784 <= high


@pytest.mark.parametrize("frame", ["paths", "arrays", "pil"])
def test_sample_fps_tells_the_seconds_of_a_list_of_frames(model, pictures, frame):
    frames = {
        "paths": pictures,
        "arrays": [media.picture(number) for number in range(4)],
        "pil": [Image.fromarray(media.picture(number)) for number in range(4)],
    }[frame]
    (found,), inputs = seen(model, {"type": "video", "video": frames, "sample_fps": "0.5", "raw_fps": 30})
    assert found.seconds.tolist() == [0, 2, 4, 6]
    assert media.numbers(found.pixels) == [0, 1, 2, 3]
    assert inputs.model_kwargs["second_per_grid_ts"].tolist() == [4.0]


FORMS = {
    "image": lambda path, data: {"type": "image", "image": path},
    "url": lambda path, data: {"type": "image", "url": path},
    "base64": lambda path, data: {"type": "image", "base64": data},
    "untyped": lambda path, data: {"image": path},
    "openai": lambda path, data: {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    "detail": lambda path, data: {"type": "image_url", "image_url": {"url": path, "detail": "auto"}},
    "plain": lambda path, data: {"type": "image_url", "image_url": path},
    "responses": lambda path, data: {"type": "input_image", "image_url": f"data:image/png;base64,{data}"},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_an_image(model, pictures, form):
    with open(pictures[3], "rb") as file:
        data = base64.b64encode(file.read()).decode()
    request = model.load(user(FORMS[form](pictures[3], data), {"type": "input_text", "text": "Hi"}))
    assert media.numbers(request.loaded.media[0].pixels) == [3]
    assert request.messages == user({"type": "image"}, {"type": "text", "text": "Hi"})


def test_forms_of_a_video(model, clip):
    wanted, _ = seen(model, {"type": "video", "video": clip})
    for part in ({"type": "video_url", "video_url": {"url": clip}}, {"type": "video_url", "video_url": clip},
                 {"type": "video", "path": clip}, {"video": clip}):  # fmt: skip
        assert torch.equal(seen(model, part)[0][0].pixels, wanted[0].pixels)


VIDEO = {"type": "video", "video": "x.mp4"}
IMAGE = {"type": "image", "image": "x.png"}
WRONG = [
    (user(VIDEO | {"fsp": 1}), r"messages\[0\].content\[0\]: unknown key 'fsp': known are end, fps, .*video_start"),
    (user(IMAGE | {"fps": 1}), r"unknown key 'fps': known are .*resized_width"),
    (user({"type": "text", "text": "Hi", "cache_control": {}}), r"unknown key 'cache_control': known are text, type"),
    (user({"type": "image_url", "image_url": {"url": "x", "size": 3}}), r"image_url: unknown key 'size'"),
    (user({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}), r"detail='low' is not allowed"),
    ([{"role": "user", "content": "Hi", "name": "Ann"}], r"messages\[0\]: unknown key 'name': known are content, role"),
    ([{"role": "asistant", "content": "Hi"}], r"role='asistant' is not allowed: known are system, .*assistant"),
    ([{"role": "user", "content": None}], r"content=None is not allowed"),
    ([{"role": "user", "content": []}], r"content=\[\] is not allowed: give at least one part"),
    ([[{"role": "user", "content": "Hi"}], {}], r"messages\[0\] is a list: give one conversation"),
    ([[{"role": "user", "content": "Hi"}]] * 2, r"a list of conversations is not allowed: give one"),
    ({"role": "user", "content": "Hi"}, r"put it into a list"),
    (user("Hi"), r"messages\[0\].content\[0\]='Hi' is not allowed"),
    (user(["Hi"]), r"content\[0\]=\['Hi'\] is not allowed"),
    (user({"type": "text", "text": 3}), r"text=3 is not allowed: give a string"),
    (user({"type": "audio", "audio": "x"}), r"part of type 'audio' is not allowed"),
    (user({"type": "video"}), r"names no video: add 'video', 'path' or 'url'"),
    (user(VIDEO | {"url": "y.mp4"}), r"by 'video' and by 'url': leave one of them out"),
    (user(VIDEO | {"fps": 0}), r"messages\[0\].content\[0\]: fps=0.0 is not allowed: above 0"),
    (user(VIDEO | {"fps": "fast"}), r"content\[0\]: fps='fast' is not allowed"),
    (user(VIDEO | {"fps": True}), r"content\[0\]: fps=True is not allowed"),
    (user(VIDEO | {"fps": 1, "nframes": 3}), r"give num_frames or fps, not both"),
    (user(VIDEO | {"nframes": 4, "num_frames": 3}), r"num_frames is given twice"),
    (user(VIDEO | {"video_start": 3, "video_end": 2}), r"end=2.0 is not allowed: later than start"),
    (user(VIDEO | {"sample_fps": 1}), r"sample_fps=1 is not allowed for a file .* give fps"),
    (user({"type": "video", "video": Path("x.mp4"), "sample_fps": 1}), r"sample_fps=1 is not allowed for a file"),
    (user({"type": "video", "video": io.BytesIO(), "raw_fps": 1}), r"raw_fps=1 is not allowed for a file"),
    (user({"type": "video", "video": tiny.video(2), "sample_fps": 4}), r"not allowed for a file or Frames, which have"),
    (user({"type": "video", "video": ["a.png"], "raw_fps": 3}), r"raw_fps=3 is not allowed without sample_fps"),
    (user(VIDEO | {"resized_height": 56}), r"give both resized_height and resized_width"),
    (user(VIDEO | {"resized_height": 56, "resized_width": 56, "max_pixels": 784}), r"exact size; leave max_pixels out"),
    (user(VIDEO | {"min_pixels": 9000, "max_pixels": 8000}), r"min_pixels=9000 .* to max_pixels \(8000\)"),
    (user(VIDEO | {"min_frames": 9, "max_frames": 8}), r"min_frames=9 .* to max_frames \(8\)"),
    (user({"type": "image", "base64": "?"}), r"base64 does not hold base64"),
    (user({"type": "text", "text": "Look: <|video_pad|>"}), r"the text holds '<\|video_pad\|>'"),
    ([{"role": "user", "content": "<|image_pad|>"}], r"the text holds '<\|image_pad\|>'"),
    (["a.mp4", "b.png"], r"both pictures \(b.png\) and videos \(a.mp4\)"),
]


@pytest.mark.parametrize(("messages", "says"), WRONG)
def test_what_nothing_reads_is_refused(model, messages, says):
    with pytest.raises(ConfigError, match=says) as caught:
        model.request(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"min_pixels": 100}, {"resized_height": 56, "resized_width": 56}])
def test_a_size_that_a_family_cannot_give_is_refused(setting, clip):
    model = SpecVLM.from_pretrained(tiny.checkpoint("llava_onevision"))
    with pytest.raises(ConfigError, match=rf"{next(iter(setting))}=\d+ is not allowed for this model: its frames"):
        seen(model, {"type": "video", "video": clip} | setting)


def test_a_size_is_refused_where_nothing_is_resized(tmp_path):
    model, family = tiny.load("qwen2_5_vl")
    settings = {"do_resize": False}
    bare = type(family)(tiny.checkpoint("qwen2_5_vl"), model.config, family.tokenizer)
    bare._processors = {kind: old | settings for kind, old in bare._processors.items()}
    with pytest.raises(ConfigError, match=r"max_pixels=9000 is not allowed: .*do_resize is false"):
        bare.inputs(tiny.messages("video"), [tiny.video(2, 56, 84)], limits=[Limits(9000)])


def test_pixels_below_the_models_most_are_refused_as_least(model, clip):
    with pytest.raises(ConfigError, match=r"min_pixels=99999 is not allowed for this model: at most 9408 a frame"):
        seen(model, {"type": "video", "video": clip, "min_pixels": 99999})


# Several videos, and frames


def test_a_list_of_paths_is_several_videos(model, clip, pictures):
    two = model.load([clip, clip], "Compare them.")
    assert [frames.kind for frames in two.loaded.media] == ["video", "video"]
    assert [part["type"] for part in two.messages[0]["content"]] == ["video", "video", "text"]
    assert len(model.load([clip]).loaded.media) == 1
    frames = media.numbers(model.load(pictures).loaded.media[0].pixels)
    assert frames == [0, 1, 2, 3]


def test_what_a_list_holds_is_told_by_name_or_first_bytes(clip, pictures, tmp_path):
    still, film, array = Path(pictures[0]).read_bytes(), Path(clip).read_bytes(), media.picture(0)
    (tmp_path / "still").write_bytes(still)
    (tmp_path / "film").write_bytes(film)
    stills = [str(tmp_path / "still"), tmp_path / "still", still, array, Image.fromarray(array),
              "http://host/a.JPG?x=1", "data:image/png;base64,x", "missing.jpeg", tiny.image()]  # fmt: skip
    films = [str(tmp_path / "film"), tmp_path / "film", film, array[None], "http://host/watch?v=a.jpg",
             "data:video/mp4;base64,x", "missing.mp4", "a.gif", [array, array], tiny.video()]  # fmt: skip
    assert [sources.is_picture(item) for item in stills] == [True] * len(stills)
    assert [sources.is_picture(item) for item in films] == [False] * len(films)
    assert sources.videos_in(stills) == [stills]
    assert sources.videos_in(films) == films


# What the text holds


def test_lone_surrogates_become_replacement_characters(model):
    request = model.request(None, "a\udcff\ud83d\ude00b")
    assert request.messages[0]["content"][0]["text"] == "a\ufffd\U0001f600b"
    assert model.generate(None, "\ud800").token_ids == model.generate(None, "\ufffd").token_ids
    assert model.request([{"role": "user", "content": "\udfff"}]).messages[0]["content"] == "\ufffd"
    json.dumps(model.generate(None, "\udcff").to_dict())


def test_a_last_message_of_the_assistant_is_continued(model):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The red"}]
    decode = model.target.tokenizer.decode
    assert decode(model.read(model.request(talk)).input_ids).endswith("<|im_start|>assistant\nThe red")
    talk[1]["content"] = [{"type": "text", "text": "The red "}]
    assert decode(model.read(model.request(talk)).input_ids).endswith("<|im_start|>assistant\nThe red ")
    with pytest.raises(ConfigError, match="could not find any text to continue"):
        model.target.family.inputs([talk[0], {"role": "assistant", "content": [{"type": "image"}]}], [tiny.image()])


TEMPLATES = {
    "strings only": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}",
    "text only": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    "lists only": "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ p.text }}{% endfor %}{% endfor %}",
}


def family_of(template, tmp_path):
    directory = shutil.copytree(tiny.checkpoint("qwen2_5_vl"), tmp_path / "copy")
    (directory / "chat_template.jinja").write_text(template)
    model, family = tiny.load("qwen2_5_vl")
    return family_for("qwen2_5_vl")(str(directory), model.config, family.tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["Hello", [{"type": "text", "text": "Hello"}]])
def test_text_reaches_every_template_in_the_form_that_it_takes(name, content, tmp_path):
    family = family_of(TEMPLATES[name], tmp_path)
    text = family.tokenizer.decode(family.inputs([{"role": "user", "content": content}], []).input_ids)
    assert text.endswith("Hello")
    assert "{" not in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_for_text_alone_refuses_a_video_on_one_line(name, tmp_path):
    family = family_of(TEMPLATES[name], tmp_path)
    with pytest.raises(ConfigError, match=r"chat template .*(text alone|refuses)") as caught:
        family.inputs(tiny.messages("video", "Hi"), [tiny.video()])
    assert "\n" not in str(caught.value)
