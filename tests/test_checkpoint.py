"""Checkpoints that are damaged, partial, quantised or none: refused in one line, before weights are read."""

import io
import json
import logging
import random
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import modeling_utils

from specvlm import CapacityError, SpecVLM, SpecVLMError, UnsupportedModel
from specvlm.runtime import checkpoint
from specvlm.runtime.model import VideoLM

SOURCE = Path(tiny.checkpoint("qwen2_5_vl"))
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def copy(tmp_path):
    """A checkpoint of links to the tiny one's files, fit to be changed."""

    def copy(family="qwen2_5_vl"):
        folder = tmp_path / family
        folder.mkdir()
        for file in Path(tiny.checkpoint(family)).iterdir():
            (folder / file.name).symlink_to(file)
        return folder

    return copy


def put(folder, name, content):
    """Replace a file: bytes, text, a JSON value, or None for no file."""
    path = folder / name
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def load(folder):
    return VideoLM.from_pretrained(folder, device="cpu")


@pytest.fixture
def refused(monkeypatch):
    """Load what must be refused, in one line of bounded length, before any weight is read; return the line."""
    for function in ("safe_open", "load_state_dict"):  # by which transformers reads them
        monkeypatch.delattr(modeling_utils, function)

    def refused(folder):
        with pytest.raises(UnsupportedModel) as caught:
            load(folder)
        line = str(caught.value)
        assert "\n" not in line
        assert len(line) < 900
        return line

    return refused


# Weights


def without(part):
    return lambda weights: {key: weight for key, weight in weights.items() if part not in key}


def prefixed(weights):
    return {f"base_model.model.{key}": weight for key, weight in weights.items()}


def widened(weights):
    return {**weights, "lm_head.weight": torch.zeros(17, 64)}


OTHER_WEIGHTS = {
    "a layer's MLP": (without("layers.1.mlp"), ["3 weights are missing", "layers.1.mlp.down_proj.weight"]),
    "the head": (without("lm_head"), ["1 weights are missing (lm_head.weight)"]),
    "the tower": (without("visual."), ["weights are missing", "visual.blocks.0"]),
    "all": (lambda weights: {"a": torch.zeros(1)}, ["weights are missing", "1 are none of a qwen2_5_vl (a)"]),
    "a name too many": (lambda weights: {**weights, "score.weight": torch.zeros(2)}, ["1 are none", "score.weight"]),
    "PEFT's prefix": (prefixed, ["weights are missing", "base_model.model.", "merge_and_unload"]),
    "another size": (widened, ["1 are of another size", "lm_head.weight is [17, 64], not [336, 64]"]),
}


@pytest.mark.parametrize("kind", OTHER_WEIGHTS)
def test_other_weights_than_the_model_has(copy, refused, kind):
    change, wanted = OTHER_WEIGHTS[kind]
    folder = copy()
    weights = change(load_file(SOURCE / WEIGHTS))
    put(folder, WEIGHTS, None)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    line = refused(folder)
    assert str(folder) in line
    for words in wanted:
        assert words in line


@pytest.mark.parametrize("size", [2**31, 10**18])
def test_absurd_sizes_ask_for_no_memory(copy, refused, size):
    folder, config = copy(), json.loads((SOURCE / "config.json").read_text())
    for part, key in (("text_config", "num_hidden_layers"), ("text_config", "vocab_size"), ("vision_config", "depth")):
        put(folder, "config.json", {**config, part: {**config[part], key: size}})
        assert str(size) in refused(folder)


def sharded(folder, parts):
    """Write weights as files of an index."""
    weights = load_file(SOURCE / WEIGHTS)
    put(folder, WEIGHTS, None)
    shards = {f"model-{part}.safetensors": sorted(weights)[part::parts] for part in range(parts)}
    for file, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
    put(folder, INDEX, {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}})


def equals(model, other=None):
    wanted = (other or load(SOURCE)).hf.state_dict()
    found = model.hf.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_shards(copy):
    folder = copy()
    sharded(folder, 3)
    assert equals(load(folder))


def test_shards_that_are_not_there(copy, refused):
    folder = copy()
    sharded(folder, 3)
    put(folder, "model-1.safetensors", None)
    assert "1 of 3 files of weights are missing (model-1.safetensors)" in refused(folder)
    put(folder, INDEX, {"weight_map": []})
    assert "weight_map" in refused(folder)


def test_pickled_weights(copy):
    folder = copy()
    put(folder, WEIGHTS, None)
    torch.save(load_file(SOURCE / WEIGHTS), folder / "pytorch_model.bin")
    assert equals(load(folder))


def test_pickled_weights_that_are_not_there(copy, refused):
    folder = copy()
    put(folder, WEIGHTS, None)
    torch.save(without("layers.1.mlp")(load_file(SOURCE / WEIGHTS)), folder / "pytorch_model.bin")
    assert "3 weights are missing" in refused(folder)
    put(folder, "pytorch_model.bin", b"\x80\x02cos\nsystem\nq\x00")
    assert "pytorch_model.bin cannot be read" in refused(folder)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava_onevision"])
def test_names_of_every_age(copy, family):
    """Published checkpoints have the older names; transformers saves these or its own."""
    older = {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
             "visual.": "model.visual.", "model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
             "multi_modal_projector.": "model.multi_modal_projector.",
             "image_newline": "model.image_newline"}  # fmt: skip

    def newer(key):
        old = next((old for old in older if key.startswith(old)), "")
        return older.get(old, "") + key.removeprefix(old)

    folder = copy(family)
    weights = load_file(folder / WEIGHTS)
    renamed = {newer(key): weight for key, weight in weights.items()}
    assert renamed.keys() != weights.keys()
    put(folder, WEIGHTS, None)
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    assert equals(load(folder), load(tiny.checkpoint(family)))


def test_integers_without_a_quantisation_are_refused(copy, refused):
    folder = copy()
    weights = load_file(SOURCE / WEIGHTS)
    key = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
    put(folder, WEIGHTS, None)
    save_file(weights | {key: weights[key].to(torch.int8)}, folder / WEIGHTS, metadata={"format": "pt"})
    line = refused(folder)
    assert f"1 weights are integers ({key})" in line
    assert "no quantization_config" in line


def test_tied_weights_may_be_left_out(copy):
    folder, config = copy(), json.loads((SOURCE / "config.json").read_text())
    put(folder, WEIGHTS, None)
    save_file(without("lm_head")(load_file(SOURCE / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"1 weights are missing \(lm_head\.weight\)"):
        load(folder)
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    put(folder, "config.json", config)
    model = VideoLM.from_pretrained(folder, device="cpu")
    assert model.hf.lm_head.weight is model.hf.get_input_embeddings().weight


# Files


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3957900840\n"
CONFIG = json.loads((SOURCE / "config.json").read_text())


def config(**changes):
    return {key: value for key, value in (CONFIG | changes).items() if value is not ...}


def text(**changes):
    return config(text_config=CONFIG["text_config"] | changes)


def quantised(method, **more):
    return config(quantization_config={"quant_method": method, **more})


FILES = {
    "weights of Git LFS": (WEIGHTS, LFS, ["model.safetensors is a Git LFS pointer", "git lfs pull"]),
    "a tokenizer of Git LFS": ("tokenizer.json", LFS, ["tokenizer.json is a Git LFS pointer", "git lfs pull"]),
    "cut weights": (WEIGHTS, (SOURCE / WEIGHTS).read_bytes()[:-1000], ["model.safetensors cannot be read"]),
    "a cut header": (WEIGHTS, (SOURCE / WEIGHTS).read_bytes()[:100], ["model.safetensors cannot be read"]),
    "empty weights": (WEIGHTS, b"", ["model.safetensors cannot be read"]),
    "no weights": (WEIGHTS, None, ["it has no weights", "model.safetensors"]),
    "an adapter": ("adapter_config.json", {"base_model_name_or_path": "a/b"}, ["LoRA", "a/b", "merge_and_unload"]),
    "no tokenizer": ("tokenizer.json", None, ["it has no tokenizer"]),
    "another tokenizer": ("tokenizer.json", "{}", ["cannot load"]),
    "no config": ("config.json", None, ["no config.json"]),
    "a cut config": ("config.json", '{"model_type": "qwen2_5', ["config.json holds no JSON"]),
    "an empty config": ("config.json", "", ["config.json holds no JSON"]),
    "bytes as config": ("config.json", b"\xff\xfe\x00", ["config.json holds no JSON"]),
    "a deep config": ("config.json", "[" * 100_000, ["config.json holds no JSON"]),
    "a list as config": ("config.json", [CONFIG], ["config.json holds a JSON list"]),
    "no model type": ("config.json", config(model_type=None), ["has no model_type"]),
    "an unknown model type": ("config.json", config(model_type="foo"), ["'foo' is not supported", "qwen2_5_vl"]),
    "no tower": ("config.json", config(vision_config=...), ["vision_config=None"]),
    "no text model": ("config.json", config(text_config=None), ["text_config=None"]),
    "an unknown activation": ("config.json", text(hidden_act="foo"), ["hidden_act='foo'", "text_config"]),
    "a smaller vocabulary": ("config.json", text(vocab_size=300), ["300"]),
    "a larger vocabulary": ("config.json", text(vocab_size=352), ["[336, 64], not [352, 64]"]),
    "a placeholder beyond": ("config.json", config(image_token_id=100_000), ["image_token_id=100000"]),
    "a placeholder of text": ("config.json", config(video_token_id=5), ["video_token_id=5", "tokenizer"]),
    "AWQ": ("config.json", quantised("awq", bits=4, group_size=128, zero_point=True), ["cannot load"]),
    "GPTQ": ("config.json", quantised("gptq", bits=4, group_size=128), ["cannot load"]),
    "bitsandbytes": ("config.json", quantised("bitsandbytes", load_in_4bit=True), ["bitsandbytes"]),
    "compressed-tensors": ("config.json", quantised("compressed-tensors", format="int-quantized"), ["compressed"]),
    "torchao": ("config.json", quantised("torchao", quant_type="int8"), ["cannot load"]),
    "an unknown quantisation": ("config.json", quantised("foo"), ["cannot load"]),
    "a broken generation config": ("generation_config.json", "{", ["generation_config.json"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files_that_cannot_be_served(copy, refused, kind):
    name, content, wanted = FILES[kind]
    folder = copy()
    put(folder, name, content)
    line = refused(folder)
    assert str(folder) in line
    for words in wanted:
        assert words in line


def test_a_tokenizer_of_a_larger_vocabulary(copy, refused):
    folder, tokens = copy(), json.loads((SOURCE / "tokenizer.json").read_text())
    last = tokens["added_tokens"][-1]
    more = [{**last, "id": last["id"] + extra, "content": f"<|{extra}|>"} for extra in range(1, 21)]
    put(folder, "tokenizer.json", {**tokens, "added_tokens": tokens["added_tokens"] + more})
    assert "'<|20|>'" in refused(folder)


def test_weights_that_a_gpu_has_no_room_for(monkeypatch):
    for name, value in {"memory_reserved": 3 << 30, "memory_allocated": 2 << 30, "mem_get_info": (4 << 30, 9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda place, value=value: value)
    place, weights = torch.device("cuda:0"), {"a": torch.empty(3 << 30, device="meta")}
    with pytest.raises(CapacityError, match=r"x does not fit on cuda:0: its weights take 6\.4 GB, 5\.4 GB are free"):
        checkpoint._check_room("x", weights, place, torch.bfloat16)
    weights["a"] = torch.empty(2 << 30, device="meta")
    checkpoint._check_room("x", weights, place, torch.bfloat16)


# Hostile values: each of a file's in turn, a sample of all


VALUES = (None, "", -1, [], {}, 2**31, 10**18, float("nan"), 0, True, "x", 0.5)


def places(node, at=()):
    """Yield the path of every value within a JSON value."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*at, key)
        yield from places(value, (*at, key))


def replaced(content, path, value):
    content = deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


def hostile(count):
    files = ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json",
             "video_preprocessor_config.json", "processor_config.json")  # fmt: skip
    contents = {file: json.loads((SOURCE / file).read_text()) for file in files}
    every = [(file, path, value) for file in files for path in places(contents[file]) for value in VALUES]
    for file, path, value in random.Random(11).sample(every, count):
        yield pytest.param(file, replaced(contents[file], path, value), id=f"{file}:{path}={value!r}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("file", "content"), list(hostile(30)))
def test_a_hostile_value_is_refused_or_works(copy, file, content):
    folder = copy()
    put(folder, file, content)
    line = ""
    try:
        model = SpecVLM(load(folder))
        model.generate(tiny.video(2), "What?", max_new_tokens=2, drafter="none")
    except SpecVLMError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 900


@pytest.mark.parametrize("value", ["", True, [], [2, 3, -3], [2, 3, "3"], [2, 3, 4]])
def test_sections_of_a_rotary_embedding_that_do_not_fit(copy, value):
    folder = copy()
    rope = CONFIG["text_config"]["rope_parameters"] | {"mrope_section": value}
    put(folder, "config.json", text(rope_parameters=rope))
    with pytest.raises(UnsupportedModel, match="mrope_section"):
        load(folder)


def test_what_libraries_log_about_a_refused_checkpoint_is_not_told(copy):
    folder = copy()
    rope = CONFIG["text_config"]["rope_parameters"] | {"rope_type": "foo"}
    put(folder, "config.json", text(rope_parameters=rope))
    handler = logging.StreamHandler(told := io.StringIO())
    logging.getLogger("transformers").addHandler(handler)
    try:
        with pytest.raises(UnsupportedModel, match="foo"):
            load(folder)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert told.getvalue() == ""


# Names


def test_names_that_are_no_checkpoint(tmp_path, monkeypatch, refused):
    def snapshot_download(name, **_):
        asked.append(name)
        raise OSError("no network")

    asked = []
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SOURCE, "trained/checkpoint-5")
    Path("file").touch()
    Path("loop").symlink_to("loop")
    for name, wanted in {
        "": "there is no directory",
        "qwen": "no directory qwen",
        "./qwen": "no directory ./qwen",
        "a/b/c": "no directory a/b/c",
        "~/qwen": "no directory ~/qwen",
        "a\0b": "no directory",
        "file": "file is no directory",
        "loop": "loop is no directory",
        "trained": "did you mean trained/checkpoint-5?",
    }.items():
        assert wanted in refused(name)
    assert not asked
    line = refused("models/qwen")
    assert "no directory models/qwen" in line
    assert "no network" in line
    assert asked == ["models/qwen"]


def test_a_hub_id_is_fetched_and_read_as_a_directory(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / "c0ffee"
    patterns = []

    def snapshot_download(name, *, allow_patterns, revision=None):
        assert (name, revision) in (("owner/model", None), ("owner/model", "c0ffee"))
        patterns.append(allow_patterns)
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in SOURCE.glob(pattern):
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    model = VideoLM.from_pretrained("owner/model", device="cpu")
    assert model.name == "owner/model"
    assert equals(model)
    assert len(patterns) == 2
    assert not any("safetensors" in pattern for pattern in patterns[0])
    assert "*.json" in patterns[0]


def test_a_tokenizer_that_truncates_and_pads_does_so_no_more(tmp_path):
    """transformers lifts both in a tokenizer's first call, which two threads must not do at once."""
    directory = Path(shutil.copytree(tiny.checkpoint("qwen2_5_vl"), tmp_path / "model"))
    told = json.loads((directory / "tokenizer.json").read_text())
    told["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    told["padding"] = {
        "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(told))
    tokenizer = checkpoint.Checkpoint.open(str(directory)).tokenizer
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None
