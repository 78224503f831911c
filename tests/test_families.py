"""Inputs against Hugging Face's own processors, and merged prompts against its own forward pass: both to the bit."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import load
from transformers import AutoConfig, AutoTokenizer

from specvlm import SpecVLM
from specvlm.check import reference
from specvlm.core.errors import ConfigError, MediaError, UnsupportedModel
from specvlm.families import family_for
from specvlm.families.base import Inputs, Prompt
from specvlm.families.pixels import Budget, Limits, fit
from specvlm.media import Frames
from specvlm.runtime.model import VideoLM

ORACLE = Path(sys.prefix) / "oracle"
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE, VIDEO, PROCESSOR = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"

# ---------------------------------------------------------------- inputs = Hugging Face's processors


@dataclass(frozen=True)
class Case:
    family: str
    messages: list[dict[str, Any]]
    media: list[Frames]
    files: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # changed keys a file; None removes the file


def sampled(indices: list[int], file_fps: float, total: int, height: int, width: int, seed: int = 0) -> Frames:
    """Frames of a longer file, at the times and the rate that HF's VideoMetadata gives them."""
    frames = tiny.video(len(indices), height, width, seed=seed)
    seconds = torch.tensor([index / file_fps for index in indices], dtype=torch.float64)
    return replace(frames, seconds=seconds, fps=len(indices) / total * file_fps)


def turns() -> list[dict[str, Any]]:
    """Two images and a video over two turns."""
    return [
        *tiny.messages("image", "and", "video", "Describe the video.", system="You are a helpful assistant."),
        {"role": "assistant", "content": "The red ball rolls."},
        {"role": "user", "content": [{"type": "text", "text": "Then "}, {"type": "image"}]},
    ]


def cases() -> dict[str, Case]:
    one, found = tiny.messages("video", "Describe the video."), {}
    for family in tiny.FAMILIES:
        found |= {
            f"{family}/video": Case(family, one, [tiny.video(6)]),
            f"{family}/odd": Case(family, one, [sampled([0, 3, 7, 10, 13], 7.0, 17, 56, 84)]),
            f"{family}/large": Case(family, one, [tiny.video(4, 311, 523)]),
            f"{family}/tiny": Case(family, one, [tiny.video(4, 9, 14)]),
            f"{family}/thin": Case(family, one, [tiny.video(4, 20, 300)]),
            f"{family}/rounded": Case(family, one, [tiny.video(3, 170, 180)]),
            f"{family}/wide": Case(family, one, [tiny.video(2, 20, 1900)]),
            f"{family}/image": Case(family, tiny.messages("image", "What?"), [tiny.image(97, 60)]),
            f"{family}/wide image": Case(family, tiny.messages("What?", "image"), [tiny.image(30, 400)]),
            f"{family}/large image": Case(family, tiny.messages("image"), [tiny.image(700, 600)]),
            f"{family}/turns": Case(family, turns(), [tiny.image(50, 99), tiny.video(4), tiny.image(120, 61, 1)]),
            f"{family}/videos": Case(
                family, tiny.messages("video", "video", "Two."), [tiny.video(4), tiny.video(4, 90, 70, 3.0, 1)]
            ),
            f"{family}/text": Case(family, tiny.messages("Hello.", system="You are"), []),
            f"{family}/nearest": Case(family, one, [tiny.video(4, 100, 90)], {VIDEO: {"resample": 0}}),
            f"{family}/other means": Case(
                family, one, [tiny.video(4)], {VIDEO: {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]}}
            ),
            f"{family}/bilinear": Case(family, one, [tiny.video(4, 100, 90)], {VIDEO: {"resample": 2}}),
            f"{family}/raw": Case(family, one, [tiny.video(4)], {VIDEO: {"do_normalize": False, "do_rescale": False}}),
            f"{family}/rescaled": Case(family, one, [tiny.video(4)], {VIDEO: {"do_normalize": False}}),
            f"{family}/normalized": Case(
                family,
                one,
                [tiny.video(4)],
                {VIDEO: {"do_rescale": False, "image_mean": [90.0, 110.0, 130.0], "image_std": [60.0, 50.0, 40.0]}},
            ),
            f"{family}/nested": Case(
                family, turns(), [tiny.image(50, 99), tiny.video(4), tiny.image(120, 61, 1)], nested(family)
            ),
        }
    for family in QWEN:
        patch = 32 if family == "qwen3_vl" else 28
        found |= {
            f"{family}/unresized": Case(
                family, one, [tiny.video(3, 2 * patch, 3 * patch)], {VIDEO: {"do_resize": False}}
            ),
            f"{family}/silent": Case(family, one, [tiny.video(4, 800, 900)], {VIDEO: {"size": None}}),
            f"{family}/capped": Case(
                family,
                one,
                [tiny.video(6, 300, 300)],
                {VIDEO: {"cap_pixels_per_frame": True, "max_video_tokens": 9 if family == "qwen3_vl" else 20}},
            ),
            f"{family}/several lengths": Case(
                family, tiny.messages("video", "video", "Two."), [tiny.video(4), tiny.video(7, 90, 70, 3.0, 1)]
            ),
        }
    for family in QWEN:
        image, most = tiny.processors(family)[IMAGE]["size"], {"min_pixels": 3136, "max_pixels": 9 * 1024}
        found |= {
            f"{family}/nearest image": Case(
                family, tiny.messages("image"), [tiny.image(100, 90)], {IMAGE: {"resample": 0}}
            ),
            f"{family}/no video file": Case(family, one, [tiny.video(6, 200, 280)], {VIDEO: None}),
            f"{family}/no video file, no class": Case(
                family, one, [tiny.video(6, 200, 280)], {VIDEO: None, IMAGE: {"image_processor_type": None}}
            ),
            f"{family}/no video file, fast": Case(
                family, one, [tiny.video(6, 200, 280)],
                {VIDEO: None, IMAGE: {"image_processor_type": "Qwen2VLImageProcessorFast"}},
            ),
            f"{family}/other video class": Case(
                family, one, [tiny.video(6, 200, 280)], {VIDEO: {"video_processor_type": "Qwen2VLVideoProcessor"}}
            ),
            f"{family}/pixels beside size": Case(
                family, tiny.messages("image"), [tiny.image(300, 280)], {IMAGE: most | {"size": image}}
            ),
            f"{family}/one edge and a bound": Case(
                family, tiny.messages("image"), [tiny.image(300, 280)],
                {IMAGE: {"size": {"shortest_edge": 3136}, "max_pixels": 9 * 1024}},
            ),
        }  # fmt: skip
    for family in ("qwen2_vl", "qwen2_5_vl"):  # as released: one file, pixel bounds outside `size`
        old = {VIDEO: None, IMAGE: {"size": None, "min_pixels": 3136, "max_pixels": 9 * 784}}
        media = [tiny.image(300, 99), tiny.video(4, 99, 200), tiny.image()]
        found[f"{family}/old files"] = Case(family, turns(), media, old)
    return found


def nested(family: str) -> dict[str, dict[str, Any] | None]:
    """The same settings in processor_config.json alone, as transformers 5 saves them."""
    if family == "llava_onevision":
        return {}
    files = tiny.processors(family)
    return {
        PROCESSOR: {"image_processor": files[IMAGE], "video_processor": files[VIDEO]},
        IMAGE: None,
        VIDEO: None,
    }


CASES = cases()


def write(case: Case, directory: Path) -> str:
    """Copy the checkpoint's small files, changed as the case says."""
    shutil.copytree(tiny.checkpoint(case.family), directory, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, changes in case.files.items():
        path = directory / name
        if changes is None:
            path.unlink(missing_ok=True)
        elif case.family == "llava_onevision" and name == VIDEO:
            whole = json.loads((directory / PROCESSOR).read_text())
            whole["video_processor"] |= changes
            (directory / PROCESSOR).write_text(json.dumps(whole))
        else:
            content = json.loads(path.read_text()) | changes
            path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(directory)


def request(case: Case, directory: str) -> dict[str, Any]:
    videos = [frames for frames in case.media if frames.kind == "video"]
    images = [frames.pixels[0] for frames in case.media if frames.kind == "image"]
    metadata = []
    for frames in videos:
        file_fps = 7.0 if len(frames.pixels) == 5 else frames.fps
        indices = [round(second * file_fps) for second in frames.seconds.tolist()]
        total = round(len(indices) * file_fps / frames.fps)
        metadata.append({"fps": file_fps, "total_num_frames": total, "frames_indices": indices, "duration": 1.0})
    wrapper = "<|vision_start|><|video_pad|><|vision_end|>"  # see Qwen3VL: HF keeps it around the whole video
    return {
        "directory": directory,
        "messages": case.messages,
        "images": images,
        "videos": [frames.pixels for frames in videos],
        "metadata": metadata,
        "nested": case.family == "llava_onevision",
        "replace": [(wrapper, "<|video_pad|>")] if case.family == "qwen3_vl" else [],
    }


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each case its directory and what HF's processor makes of it."""
    if not (ORACLE / "torchvision").is_dir():
        pytest.skip(f"no oracle: pip install --no-deps --target {ORACLE} torchvision==0.28.0")
    root = tmp_path_factory.mktemp("oracle")
    directories = {name: write(case, root / str(number)) for number, (name, case) in enumerate(CASES.items())}
    torch.save({name: request(case, directories[name]) for name, case in CASES.items()}, root / "requests")
    command = [sys.executable, str(Path(__file__).with_name("hf_oracle.py")), str(ORACLE)]
    subprocess.run([*command, str(root / "requests"), str(root / "answers")], check=True, capture_output=True)
    answers = torch.load(root / "answers", weights_only=False)
    return {name: (directories[name], answers[name]) for name in CASES}


def family_at(name: str, directory: str) -> Any:
    return family_for(name)(directory, AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory))


@pytest.mark.parametrize("name", CASES)
def test_inputs_equal_hf_processors(name: str, oracle: dict[str, tuple[str, dict[str, Any]]]) -> None:
    case, (directory, expected) = CASES[name], oracle[name]
    inputs = family_at(case.family, directory).inputs(case.messages, case.media)
    found = {"input_ids": inputs.input_ids[None], **inputs.model_kwargs}
    expected = {key: value for key, value in expected.items() if key not in ("attention_mask", "video_metadata")}
    assert set(found) == set(expected)
    for key, value in expected.items():
        value = torch.as_tensor(value)
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(found[key], value), key


def test_raises_no_pixel_bound() -> None:
    """The model's own bounds are lowered to the caller's, never raised."""
    _, family = tiny.load("qwen2_5_vl")
    free = family.inputs(tiny.messages("video"), [tiny.video(4, 300, 300)])
    same = family.inputs(tiny.messages("video"), [tiny.video(4, 300, 300)], limits=[Limits(10**9, 10**9)])
    assert torch.equal(free.model_kwargs["pixel_values_videos"], same.model_kwargs["pixel_values_videos"])


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("num_frames", [3, 4])
@pytest.mark.parametrize(("limits", "most"), [({"max_pixels": 6 * 32 * 32}, 6), ({"total_pixels": 16 * 32 * 32}, 4)])
def test_limits_bound_the_frames(name: str, limits: dict[str, int], most: int, num_frames: int) -> None:
    _, family = tiny.load(name)
    bound = most * 32 * 32 * (4 / num_frames if "total_pixels" in limits else 1)
    for height, width in ((300, 300), (64, 500), (100, 80)):
        (visual,) = family.inputs(
            tiny.messages("video"), [tiny.video(num_frames, height, width)], limits=[Limits(**limits)]
        ).visuals
        side = 32 if name == "qwen3_vl" else 28
        assert visual.grid[0] == 2
        assert visual.grid[1] * visual.grid[2] * side**2 <= bound
        assert visual.grid[1] * visual.grid[2] >= 2  # and not needlessly few


def test_a_limit_on_the_frame_always_holds() -> None:
    for frames, height, width in itertools.product((1, 2, 3, 5), (10, 64, 97, 300), (20, 96, 131, 500)):
        padded = max(2, round(frames / 2) * 2)
        budget = Budget(32, 4 * 32 * 32, 96 * 32 * 32, frames, padded, grows=True).lowered(7 * 32 * 32)
        rows, columns = fit(height, width, budget)
        assert rows % 32 == columns % 32 == 0
        assert 0 < rows * columns <= 7 * 32 * 32


def test_limits_too_small_are_refused() -> None:
    _, family = tiny.load("qwen2_5_vl")
    with pytest.raises(ConfigError, match=r"total_pixels=3000 .* at least 3136 \(4 x 784\), or fewer frames"):
        family.inputs(tiny.messages("video"), [tiny.video(4)], limits=[Limits(total_pixels=3000)])
    _, family = tiny.load("llava_onevision")
    with pytest.raises(ConfigError, match=r"max_pixels=1000 .* at least 1225 \(1 x 1225\)"):
        family.inputs(tiny.messages("video"), [tiny.video(4)], limits=[Limits(1000)])


def test_max_pixels_shrinks_llava_images_first() -> None:
    _, family = tiny.load("llava_onevision")
    free = family.inputs(tiny.messages("image"), [tiny.image(140, 140)])
    bound = family.inputs(tiny.messages("image"), [tiny.image(140, 140)], limits=[Limits(70 * 70)])
    assert bound.model_kwargs["image_sizes"].tolist() == [[70, 70]]
    assert len(bound.input_ids) < len(free.input_ids)


@pytest.mark.parametrize("name", QWEN)
def test_extreme_aspect_is_refused(name: str) -> None:
    _, family = tiny.load(name)
    with pytest.raises(MediaError, match=r"700 x 3 pixels .* 200 times"):
        family.inputs(tiny.messages("video"), [tiny.video(2, 3, 700)])


def test_odd_size_is_refused_where_nothing_is_resized(tmp_path: Path) -> None:
    directory = write(Case("qwen2_5_vl", [], [], {VIDEO: {"do_resize": False}}), tmp_path / "copy")
    with pytest.raises(MediaError, match=r"84 x 50 pixels is no multiple of 28"):
        family_at("qwen2_5_vl", directory).inputs(tiny.messages("video"), [tiny.video(2, 50, 84)])


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_corrupt_file_names_itself(content: str, tmp_path: Path) -> None:
    directory = write(Case("qwen2_5_vl", [], []), tmp_path / "copy")
    (Path(directory) / VIDEO).write_text(content)
    with pytest.raises(UnsupportedModel, match=r"video_preprocessor_config.json does not hold a JSON object"):
        family_at("qwen2_5_vl", directory)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_no_processor_files_are_refused(name: str, tmp_path: Path) -> None:
    """AutoProcessor refuses them, too: the defaults of a class are seldom what the model was trained with."""
    directory = write(Case(name, [], [], {PROCESSOR: None, IMAGE: None, VIDEO: None}), tmp_path / "copy")
    with pytest.raises(UnsupportedModel, match=r"has no preprocessor_config.json, which says how pixels are prepared"):
        VideoLM.from_pretrained(directory, device="cpu")


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("file", [IMAGE, VIDEO])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_size": 15}, "patch_size=15 of its .* does not fit the model's patch_size=1[46]"),
        ({"merge_size": 4}, "merge_size=4 of its .* the model's spatial_merge_size=2"),
        ({"temporal_patch_size": 1}, "temporal_patch_size=1 of its .* the model's temporal_patch_size=2"),
        ({"size": {"shortest_edge": 3136}}, r"size=\{'shortest_edge': 3136\} of its processor has no longest_edge"),
        ({"size": {"longest_edge": 9408}}, r"has no shortest_edge"),
        ({"size": {"height": 56, "width": 56}}, r"has no shortest_edge"),
    ],
)
def test_another_model_s_processor_is_refused(name: str, file: str, changes: Any, says: str, tmp_path: Path) -> None:
    directory = write(Case(name, [], [], {file: changes}), tmp_path / "copy")
    with pytest.raises(UnsupportedModel, match=says):
        VideoLM.from_pretrained(directory, device="cpu")  # the folder has no weights: they are not looked at


@pytest.mark.parametrize("size", [{"height": tiny.TILE}, {"shortest_edge": tiny.TILE}])
def test_llava_takes_whole_tiles_alone(size: dict[str, int], tmp_path: Path) -> None:
    directory = write(Case("llava_onevision", [], [], {VIDEO: {"size": size}}), tmp_path / "copy")
    with pytest.raises(UnsupportedModel, match="only 35 x 35 without cropping"):
        family_at("llava_onevision", directory)


def test_one_frame_makes_a_video() -> None:
    """HF refuses a single frame for Qwen3-VL; here it counts as a still time step."""
    _, family = tiny.load("qwen3_vl")
    once = tiny.video(1, 300, 300)
    inputs = family.inputs(tiny.messages("video"), [once])
    twice = replace(once, pixels=once.pixels.repeat(2, 1, 1, 1), seconds=torch.zeros(2).double())
    expected = family.inputs(tiny.messages("video"), [twice])
    assert torch.equal(inputs.input_ids, expected.input_ids)
    assert torch.equal(inputs.model_kwargs["pixel_values_videos"], expected.model_kwargs["pixel_values_videos"])


# ---------------------------------------------------------------- messages and media


def test_media_payload_never_reaches_the_template(tmp_path: Path) -> None:
    directory = write(Case("qwen2_5_vl", [], []), tmp_path / "copy")
    (Path(directory) / "chat_template.jinja").write_text("{{ messages[0]['content'] | tojson }}")
    family = family_at("qwen2_5_vl", directory)
    content = [{"type": "video", "video": "clip.mp4", "fps": 2}, {"type": "text", "text": "Hi"}]
    inputs = family.inputs([{"role": "user", "content": content}], [])
    assert json.loads(family.tokenizer.decode(inputs.input_ids)) == [{"type": "video"}, {"type": "text", "text": "Hi"}]


def test_placeholder_in_plain_text_stands_for_a_medium() -> None:
    _, family = tiny.load("llava_onevision")
    found = family.inputs([{"role": "user", "content": "<video>\nHi"}], [tiny.video(4)])
    assert (found.input_ids == family.tokenizer.convert_tokens_to_ids("<video>")).sum() == 4 * 9 + 1


@pytest.mark.parametrize(
    ("messages", "media", "says"),
    [
        (tiny.messages("video", "Hi"), [], "0 videos are given but the messages have 1"),
        (tiny.messages("Hi"), [tiny.video(4)], "1 videos are given but the messages have 0"),
        (tiny.messages("video", "image"), [tiny.video(4), tiny.video(4)], "0 images are given but the messages have 1"),
        (tiny.messages("Hi <|video_pad|>"), [], "0 videos are given but the messages have 1"),
        ([{"role": "user", "content": [{"type": "audio"}]}], [], "type 'audio'"),
        ([{"role": "user", "content": None}], [], "content=None"),
        ([{"role": "user", "content": [{"type": "text"}]}], [], "text"),
        ([{"content": "Hi"}], [], "message=.* a role"),
        (["Hi"], [], "message='Hi'"),
    ],
)
def test_wrong_messages_are_config_errors(messages: list[Any], media: list[Frames], says: str) -> None:
    _, family = tiny.load("qwen2_5_vl")
    with pytest.raises(ConfigError, match=says):
        family.inputs(messages, media)


def test_visuals_stand_in_order_of_the_prompt() -> None:
    _, family = tiny.load("llava_onevision")
    inputs = family.inputs(turns(), [tiny.image(), tiny.video(4), tiny.image()])
    assert [visual.kind for visual in inputs.visuals] == ["image", "video", "image"]


TEMPLATES = {
    "chat_template.jinja": "JINJA",
    "chat_template.json": json.dumps({"chat_template": "JSON"}),
    "processor_config.json": json.dumps({"chat_template": "PROCESSOR"}),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_of_the_processor_wins(name: str, tmp_path: Path) -> None:
    directory = write(Case("qwen2_5_vl", [], []), tmp_path / "copy")
    config, tokenizer = AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    for other in TEMPLATES:
        (Path(directory) / other).unlink(missing_ok=True)
    (Path(directory) / name).write_text(TEMPLATES[name])
    family = family_for("qwen2_5_vl")(directory, config, tokenizer)
    rendered = family.tokenizer.decode(family.inputs(tiny.messages("Hi"), []).input_ids)
    assert rendered in TEMPLATES[name]
    assert rendered.isupper()


def test_refusal_of_the_template_is_a_config_error(tmp_path: Path) -> None:
    directory = write(Case("qwen2_5_vl", [], []), tmp_path / "copy")
    (Path(directory) / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="refuses these messages: roles must alternate"):
        family_at("qwen2_5_vl", directory).inputs(tiny.messages("Hi"), [])


def test_no_template_is_unsupported(tmp_path: Path) -> None:
    directory = write(Case("qwen2_5_vl", [], []), tmp_path / "copy")
    config, tokenizer = AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = None
    (Path(directory) / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModel, match="no chat template: save"):
        family_for("qwen2_5_vl")(directory, config, tokenizer)


def test_unknown_model_type_lists_the_known() -> None:
    with pytest.raises(UnsupportedModel, match=r"'llama' .* known are llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl"):
        family_for("llama")


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_equal_settings_mean_equal_inputs(name: str, tmp_path: Path) -> None:
    target, draft = tiny.load(name)[1], tiny.load(name, "draft")[1]
    assert target.settings == draft.settings
    media = [tiny.image(50, 99), tiny.video(4), tiny.image(120, 61, 1)]
    one, two = target.inputs(turns(), media), draft.inputs(turns(), media)
    assert torch.equal(one.input_ids, two.input_ids)
    other = write(Case(name, [], [], {VIDEO: {"resample": 2}}), tmp_path / "copy")
    assert family_at(name, other).settings != target.settings


# ---------------------------------------------------------------- merged prompts = the model's own forward pass

PROMPTS: dict[str, tuple[list[dict[str, Any]], list[Frames]]] = {
    "video": (tiny.messages("video", "Describe the video."), [tiny.video(6)]),
    "odd": (tiny.messages("video", "Describe the video."), [tiny.video(5, 60, 90, 0.7)]),
    "long": (tiny.messages("video", "What?"), [tiny.video(16, 56, 56, 0.5)]),
    "image": (tiny.messages("image", "What?"), [tiny.image(97, 60)]),
    "large image": (tiny.messages("image", "What?"), [tiny.image(600, 700)]),
    "turns": (turns(), [tiny.image(50, 99), tiny.video(4), tiny.image(120, 61, 1)]),
    "videos": (tiny.messages("video", "video", "Two."), [tiny.video(4), tiny.video(4, 90, 70, 3.0, 1)]),
    "text": (tiny.messages("Hello there."), []),
}


def prompt_of(family: str, name: str, text_positions: str = "qwen") -> tuple[Any, Inputs, Prompt]:
    model, tools = tiny.load(family)
    inputs = replace(tools.inputs(*PROMPTS[name]), text_positions=text_positions)
    return model, inputs, tiny.encode(tools, model, inputs)


def deepstack_of(prompt: Prompt) -> dict[str, Any]:
    """The language model's keyword arguments for Qwen3-VL's deepstack features."""
    if not prompt.deepstack:
        return {}
    mask = torch.zeros_like(prompt.input_ids, dtype=torch.bool)
    mask[prompt.visual_index] = True
    return {"visual_pos_masks": mask[None], "deepstack_visual_embeds": list(prompt.deepstack)}


@torch.no_grad()
def logits_of(model: Any, prompt: Prompt, **kwargs: Any) -> torch.Tensor:
    """Logits [S, vocab] of the language model on a prompt."""
    kwargs |= {"inputs_embeds": prompt.embeds, "position_ids": prompt.positions, **deepstack_of(prompt)}
    # without a cache, transformers takes gaps in 1-D positions for several packed sequences
    out = model.model.language_model(**kwargs, use_cache=True)
    return model.lm_head(out.last_hidden_state)[0]


WHOSE = ("qwen", "transformers")


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompt_equals_forward(family: str, name: str, whose: str) -> None:
    model, inputs, prompt = prompt_of(family, name, whose)
    given = {"position_ids": prompt.positions} if family in QWEN and whose == "qwen" else {}
    with torch.no_grad():
        expected = model(input_ids=inputs.input_ids[None], **given, **inputs.model_kwargs).logits[0]
    assert torch.equal(logits_of(model, prompt), expected)
    assert torch.equal(prompt.input_ids, inputs.input_ids)
    assert prompt.positions.shape == ((3, 1, len(prompt)) if family in QWEN else (1, len(prompt)))


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generate_stands_where_the_prompt_says(family: str, name: str, whose: str) -> None:
    """generate() takes the positions that it is handed for the prompt, and counts on from them for every token."""
    target = load(family, "target")
    inputs = replace(target.family.inputs(*PROMPTS[name]), text_positions=whose)
    prompt = target.encode(inputs)
    seen = []
    handle = target.hf.model.language_model.register_forward_pre_hook(  # the oracle is a copy, hooks included
        lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        reference.generate(target, inputs, max_new_tokens=4)
    finally:
        handle.remove()
    first, *later = (positions[-3:] if family in QWEN else positions for positions in seen)
    assert torch.equal(prompt.positions, first)
    assert [positions.unique().tolist() for positions in later] == [
        [prompt.next_position + place] for place in range(3)
    ]


# ---------------------------------------------------------------- positions as the weights were trained


Span = int | tuple[str, int, int, int, float]  # words, or kind, times, rows, columns and seconds a time step


def plain_positions(spans: list[Span], tokens_per_second: float | None) -> list[tuple[int, int, int]]:
    """The rule itself, a token at a time: text starts one behind the largest position before it, on any axis."""
    found: list[tuple[int, int, int]] = []
    for span in spans:
        start = 1 + max((max(cell) for cell in found), default=-1)
        if isinstance(span, int):
            found += [(start + word,) * 3 for word in range(span)]
            continue
        kind, times, rows, columns, seconds = span
        for time, row, column in itertools.product(range(times), range(rows), range(columns)):
            if kind == "video" and tokens_per_second is not None:
                time = int(time * seconds * tokens_per_second)
            found.append((start + time, start + row, start + column))
    return found


# Media (a rate for a video of 56 x 84 pixels, so 2 x 3 tokens a step of two frames; "image": 3 x 5 tokens), frames of
# each video, and where the text between and behind them begins: in Qwen2.5-VL, which counts 2 positions a second, and
# in Qwen2-VL, which counts time steps. Worked out by hand; the first visual begins at 5, behind 5 words.
GOLDEN: dict[str, tuple[list[Any], int, list[int], list[int]]] = {
    "0.3 fps": ([0.3], 8, [46], [9]),  # 5 + 3 * 6.667 s * 2 + 1
    "1 fps": ([1.0], 8, [18], [9]),
    "2 fps": ([2.0], 8, [12], [9]),
    "23.976 fps": ([23.976], 64, [11], [37]),  # 5 + int(31 * 0.0834 s * 2) + 1
    "30 fps": ([30.0], 64, [10], [37]),
    "two videos": ([0.5, 4.0], 8, [30, 36], [9, 15]),
    "an image between": ([0.5, "image", 4.0], 8, [30, 37, 43], [9, 16, 22]),
    "an image first": (["image", 1.0, 1.0], 8, [10, 25, 40], [10, 16, 22]),
    "an image": (["image"], 8, [10], [10]),
}


def spans_of(inputs: Inputs, seconds: list[float]) -> list[Span]:
    """Words and visuals of a prompt, in order."""
    kinds = [int(kind) for kind in inputs.model_kwargs["mm_token_type_ids"][0]]
    visuals, steps, spans, place = iter(inputs.visuals), iter(seconds), [], 0
    while place < len(kinds):
        if kinds[place] == 0:
            words = next((n for n, kind in enumerate(kinds[place:]) if kind), len(kinds) - place)
            spans.append(words)
            place += words
            continue
        visual = next(visuals)
        spans.append((visual.kind, *visual.grid, next(steps) if visual.kind == "video" else 1.0))
        place += math.prod(visual.grid)
    return spans


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_positions_are_those_of_the_training(family: str, name: str) -> None:
    kinds, frames, *golden = GOLDEN[name]
    media = [tiny.image(84, 140) if kind == "image" else tiny.video(frames, 56, 84, kind) for kind in kinds]
    model, tools = tiny.load(family)
    inputs = tools.inputs(tiny.messages(*(one.kind for one in media), "What?"), media)
    spans = spans_of(inputs, [2 / kind for kind in kinds if kind != "image"])
    prompt = tiny.encode(tools, model, inputs)
    expected = plain_positions(spans, 2.0 if family == "qwen2_5_vl" else None)
    assert [tuple(cell) for cell in prompt.positions[:, 0].T.tolist()] == expected
    sizes = [span if isinstance(span, int) else math.prod(span[1:4]) for span in spans]
    texts = [sum(sizes[:number]) for number, span in enumerate(spans) if isinstance(span, int)]
    assert [expected[place] for place in texts[1:]] == [(start,) * 3 for start in golden[family == "qwen2_vl"]]
    assert prompt.next_position == expected[-1][0] + 1
    assert prompt.behind is None


def test_the_installed_version_counts_otherwise() -> None:
    """Behind 5 words and 64 steps of 1 s, text goes on at 132 as Qwen trained it; transformers 5 leaves time out."""
    model, tools = tiny.load("qwen2_5_vl")
    video = tiny.video(128, 28, 28)
    inputs = tools.inputs(tiny.messages("video", "What?"), [video])
    steps, rows, columns = inputs.visuals[0].grid
    starts = {}
    for whose in WHOSE:
        positions = tools.positions(model, replace(inputs, text_positions=whose))
        starts[whose] = int(positions[0, 0, 5 + steps * rows * columns])
    assert starts == {"qwen": 5 + 63 * 2 + 1, "transformers": 5 + max(rows, columns)}


def test_a_checkpoint_says_how_it_was_trained(tmp_path: Path) -> None:
    """Each of a pair counts as its own config says, unless the request says how; generate() agrees."""
    directory = Path(shutil.copytree(tiny.checkpoint("qwen2_5_vl"), tmp_path / "model"))
    told = json.loads((directory / "config.json").read_text()) | {"text_positions": "transformers"}
    (directory / "config.json").write_text(json.dumps(told))
    own, usual = VideoLM.from_pretrained(str(directory), device="cpu"), load("qwen2_5_vl", "target")
    inputs = own.family.inputs(tiny.messages("video", "What?"), [tiny.video(16, 56, 84)])
    ways = {whose: own.encode(replace(inputs, text_positions=whose)) for whose in ("trained", *WHOSE)}
    assert torch.equal(ways["trained"].positions, ways["transformers"].positions)
    assert not torch.equal(ways["trained"].positions, ways["qwen"].positions)
    assert torch.equal(usual.encode(inputs).positions, ways["qwen"].positions)
    assert reference.positions(own, inputs) == {}
    assert reference.positions(usual, inputs).keys() == {"position_ids"}
    (directory / "config.json").write_text(json.dumps(told | {"text_positions": "all"}))
    with pytest.raises(UnsupportedModel, match=r"text_positions='all' in its config.json is not known: qwen or "):
        VideoLM.from_pretrained(str(directory), device="cpu")


def test_a_prompt_that_ends_in_a_visual_token(tmp_path: Path) -> None:
    """Each axis counts on from its own last position, as generate() does."""
    for family in QWEN:
        directory = write(Case(family, [], []), tmp_path / family)
        shutil.copy(Path(tiny.checkpoint(family)) / "model.safetensors", directory)
        (Path(directory) / "chat_template.jinja").write_text("Look: <|vision_start|><|image_pad|>")
        model = SpecVLM(VideoLM.from_pretrained(directory, device="cpu"))
        frames = tiny.image(97, 160)
        messages = [{"role": "user", "content": [{"type": "image", "image": frames}]}]
        start = model.prefill(model.request(messages))
        assert start.prompt.visual_index[-1] == len(start.prompt) - 1
        assert start.prompt.behind is not None
        answer = model.generate(messages, max_new_tokens=24)
        target = model.target
        expected = reference.generate(target, start.inputs, max_new_tokens=24)
        own = reference.generate(target, replace(start.inputs, text_positions="transformers"), max_new_tokens=24)
        assert answer.token_ids == expected.token_ids == own.token_ids
        drafted = SpecVLM(target, target).generate(messages, max_new_tokens=24, tree="paper", keep_ratio=0.5)
        assert drafted.token_ids == answer.token_ids


@pytest.mark.parametrize("name", [name for name in PROMPTS if name != "text"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pruned_prompt_equals_masked_forward(family: str, name: str) -> None:
    model, _, prompt = prompt_of(family, name)
    num = prompt.num_visual
    keep = torch.randperm(num, generator=torch.Generator().manual_seed(0))[: num // 3].sort().values
    pruned = prompt.select(keep)
    rows = torch.ones(len(prompt), dtype=torch.bool)
    rows[prompt.visual_index] = False
    rows[prompt.visual_index[keep]] = True
    mask = torch.ones(len(prompt), len(prompt), dtype=torch.bool).tril() & rows
    mask |= torch.eye(len(prompt), dtype=torch.bool)  # a pruned row sees itself: softmax over nothing is NaN
    expected = logits_of(model, prompt, attention_mask=mask[None, None])[rows]
    assert torch.allclose(logits_of(model, pruned), expected, atol=1e-4, rtol=0)  # 1e-5 of the largest logit
    assert (logits_of(model, prompt)[-1] - expected[-1]).abs().max() > 1e-2  # pruning does change the logits
    assert torch.equal(pruned.positions, prompt.positions[..., rows])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_text_after_video_starts_at_zero(family: str) -> None:
    """A model's state of an earlier request never reaches the next one."""
    prompt_of(family, "long")
    _, inputs, prompt = prompt_of(family, "text")
    assert prompt.num_visual == 0
    assert prompt.next_position == len(inputs.input_ids)
    assert torch.equal(prompt.positions.view(-1, len(prompt))[0], torch.arange(len(prompt)))


def test_no_hook_stays_behind() -> None:
    model, inputs, _ = prompt_of("qwen2_5_vl", "video")
    assert not model.model.language_model._forward_pre_hooks
    broken = replace(inputs, model_kwargs={**inputs.model_kwargs, "pixel_values_videos": torch.zeros(3, 5)})
    with pytest.raises(RuntimeError):
        tiny.encode(tiny.load("qwen2_5_vl")[1], model, broken)
    assert not model.model.language_model._forward_pre_hooks


# ---------------------------------------------------------------- which tokens are visual, and where they lie


@pytest.mark.parametrize("family", QWEN)
def test_qwen_grid_matches_its_positions(family: str) -> None:
    """Row and column of a visual token are its M-RoPE height and width from where its time step starts."""
    _, inputs, prompt = prompt_of(family, "turns")
    ids = inputs.model_kwargs["mm_token_type_ids"][0]
    assert prompt.visual_index.tolist() == ids.nonzero().squeeze(1).tolist()
    where = prompt.positions[1:, 0, prompt.visual_index].T
    for number, visual in enumerate(inputs.visuals):
        mine = prompt.visual_id == number
        grid = prompt.grid[mine]
        assert (grid.amax(0) + 1).tolist() == list(visual.grid)
        for step in range(visual.grid[0]):
            place = where[mine][grid[:, 0] == step]
            assert torch.equal(place - place.amin(0), grid[grid[:, 0] == step][:, 1:])
    assert prompt.visual_id.tolist() == sorted(prompt.visual_id.tolist())


def newline_places(prompt: Prompt, model: Any) -> list[int]:
    return (prompt.embeds[0] == model.model.image_newline).all(-1).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("name", [name for name in PROMPTS if name != "text"])
def test_llava_newline_is_never_visual(name: str) -> None:
    model, inputs, prompt = prompt_of("llava_onevision", name)
    newlines = newline_places(prompt, model)
    is_placeholder = sum(inputs.input_ids == token for token in tiny.load("llava_onevision")[1]._ids.values()).bool()
    assert newlines
    assert not set(newlines) & set(prompt.visual_index.tolist())
    assert set(newlines) | set(prompt.visual_index.tolist()) == set(is_placeholder.nonzero().squeeze(1).tolist())


def test_llava_video_grid() -> None:
    _, inputs, prompt = prompt_of("llava_onevision", "video")
    assert inputs.visuals[0].grid == (6, 3, 3)
    assert torch.equal(prompt.grid, torch.cartesian_prod(torch.arange(6), torch.arange(3), torch.arange(3)))


def test_llava_image_grid() -> None:
    """97 x 60 pixels: the base view (5 x 5), then the best tiles without their padding, a newline after each row."""
    model, inputs, prompt = prompt_of("llava_onevision", "image")
    base, tiles = prompt.grid[:25], prompt.grid[25:]
    assert torch.equal(base, torch.cartesian_prod(torch.tensor([0]), torch.arange(5), torch.arange(5)))
    rows, columns = tiles[:, 1].max() + 1, tiles[:, 2].max() + 1
    assert torch.equal(tiles, torch.cartesian_prod(torch.tensor([1]), torch.arange(rows), torch.arange(columns)))
    assert inputs.visuals[0].grid == (2, max(5, rows), max(5, columns))
    start = int(prompt.visual_index[25])
    assert newline_places(prompt, model) == [start + int(columns) + int(columns + 1) * row for row in range(rows)]


def test_llava_videos_of_different_lengths() -> None:
    """HF's model stacks the videos of a prompt, so each is encoded by itself: as it is when it is alone."""
    model, tools = tiny.load("llava_onevision")
    videos = [tiny.video(4), tiny.video(7, seed=1)]
    inputs = tools.inputs(tiny.messages("video", "and", "image", "and", "video"), [videos[0], tiny.image(), videos[1]])
    prompt = tiny.encode(tools, model, inputs)
    for number, video in ((0, videos[0]), (2, videos[1])):
        alone = tiny.encode(tools, model, tools.inputs(tiny.messages("video"), [video]))
        mine = prompt.visual_index[prompt.visual_id == number]
        assert torch.equal(prompt.embeds[0, mine], alone.embeds[0, alone.visual_index])
        assert torch.equal(prompt.grid[prompt.visual_id == number], alone.grid)
        assert torch.equal(prompt.embeds[0, mine[-1] + 1], model.model.image_newline)
    image = tiny.encode(tools, model, tools.inputs(tiny.messages("image"), [tiny.image()]))
    mine = prompt.visual_index[prompt.visual_id == 1]
    assert torch.equal(prompt.embeds[0, mine], image.embeds[0, image.visual_index])


def test_qwen3_deepstack_is_pruned_with_its_tokens() -> None:
    _, _, prompt = prompt_of("qwen3_vl", "turns")
    keep = torch.tensor([1, 4, prompt.num_visual - 1])
    pruned = prompt.select(keep)
    assert [layer.shape for layer in prompt.deepstack] == [(prompt.num_visual, 64)] * 2
    for before, after in zip(prompt.deepstack, pruned.deepstack, strict=True):
        assert torch.equal(before[keep], after)


def test_qwen3_timestamps_are_text() -> None:
    _, _, prompt = prompt_of("qwen3_vl", "video")
    tokenizer = tiny.load("qwen3_vl")[1].tokenizer
    mask = torch.ones(len(prompt), dtype=torch.bool)
    mask[prompt.visual_index] = False
    steps = "".join(f"<{second} seconds><|vision_start|><|vision_end|>" for second in ("0.2", "1.2", "2.2"))
    assert f"user\n{steps}Describe" in tokenizer.decode(prompt.input_ids[mask])


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_inputs_and_prompt_on_a_gpu(family: str) -> None:
    tools = tiny.load(family)[1]
    model = type(tiny.load(family)[0]).from_pretrained(tiny.checkpoint(family), dtype=torch.float32).cuda().eval()
    here, there = (tools.inputs(turns(), PROMPTS["turns"][1], device=device) for device in ("cpu", "cuda"))
    assert torch.equal(there.input_ids.cpu(), here.input_ids)
    for key, value in there.model_kwargs.items():
        assert value.is_cuda, key
        wanted = here.model_kwargs[key]
        close = torch.allclose(value.cpu(), wanted, atol=0.04) if "pixel" in key else torch.equal(value.cpu(), wanted)
        assert close, key  # resizing through float32 moves a pixel by up to two of 255 levels
    prompt = tiny.encode(tools, model, there)
    new = model.generate(there.input_ids[None], **there.model_kwargs, max_new_tokens=1, do_sample=False)
    assert logits_of(model, prompt)[-1].argmax() == new[0, -1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gpu_pixels_equal_hf_processors(family: str) -> None:
    pytest.importorskip("torchvision")
    from transformers import AutoVideoProcessor

    processor = AutoVideoProcessor.from_pretrained(tiny.checkpoint(family))
    video = tiny.video(4, 311, 523)
    expected = processor(videos=[video.pixels], do_sample_frames=False, device="cuda", return_tensors="pt")
    inputs = tiny.load(family)[1].inputs(tiny.messages("video"), [video], device="cuda")
    assert torch.equal(inputs.model_kwargs["pixel_values_videos"], expected["pixel_values_videos"])
