"""The bundled pair's recipe: pictures, captions and positions agree with the facts, and a tiny model trains."""

import dataclasses

import pytest
import torch

from training import models, render
from training.data import Clips, Curriculum, Encoder, chat
from training.heldout import LENGTHS, held_out
from training.language import Turn, caption, parse, score
from training.tokenizer import build as build_tokenizer
from training.train import Learner, likely, optimiser, thinned, total
from training.world import COLOURS, FRAME, SAMPLED_FPS, Scene

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_scenes=100)


@pytest.fixture(scope="module")
def sample(tokenizer):
    return Clips(Encoder(tokenizer), Curriculum(steps_a_batch=16, warm_steps=10), stream=0).sample(0)


def colour_at(frame: torch.Tensor, x: float, y: float) -> str:
    """The name of the colour that the pixel at (x, y) is nearest to."""
    pixel = frame[int(y), int(x)]
    return min(COLOURS, key=lambda name: (pixel - torch.tensor(COLOURS[name])).norm().item())


def test_objects_are_drawn_where_their_paths_say():
    seen = 0
    for number in range(6):
        scene = held_out(number)
        for thing in scene.things:
            if thing.shape not in ("circle", "square", "diamond") or thing.digit is not None:
                continue
            alone = dataclasses.replace(scene, things=(thing,))
            frames = render.render(render.pack([alone]), generator=torch.Generator().manual_seed(0))[0]
            seconds = torch.arange(len(frames)).numpy() / SAMPLED_FPS
            inside = thing.path.visible(seconds)
            for frame, (x, y), shown in zip(frames, thing.path.centres(seconds), inside, strict=True):
                if shown and 0 <= x < FRAME and 0 <= y < FRAME:
                    assert colour_at(frame, x, y) == thing.colour
                    seen += 1
    assert seen > 50


@pytest.mark.parametrize("number", range(0, 60, 7))
def test_captions_state_the_facts_and_nothing_else(number):
    scene = held_out(number)
    assert parse(caption(scene)) == scene.facts()


def test_a_wrong_word_costs_one_fact():
    scene = held_out(0)
    size = scene.things[0].size
    wrong = caption(scene).replace(size, {"small": "large", "large": "small"}[size], 1)
    lost = {slot: asked - right for slot, (right, asked) in score(wrong, scene.facts()).items()}
    assert lost.pop("size") == 1
    assert lost.pop("digit", 0) <= 1  # only large objects are asked for one
    assert not any(lost.values())


@pytest.mark.parametrize("num_frames", LENGTHS)
def test_every_ending_is_over_before_the_clip_is(num_frames):
    scenes = [held_out(number) for number in range(200) if LENGTHS[number % len(LENGTHS)] == num_frames]
    assert all(_ends_as_told(scene) for scene in scenes)


def _ends_as_told(scene: Scene) -> bool:
    """Whether each object is inside the frame at the end exactly if its facts say that it remains."""
    end = torch.tensor([(scene.num_frames - 1) / SAMPLED_FPS]).numpy()
    for thing in scene.things:
        x, y = thing.path.centres(end)[0]
        inside = bool(thing.path.visible(end)[0]) and 0 < x < FRAME and 0 < y < FRAME
        if inside != thing.remains:
            return False
    return True


@pytest.mark.parametrize("before", [[], [Turn("Who enters at the top, and where does it go then?", "A ring.")]])
def test_positions_are_those_of_transformers(tokenizer, before):
    model, encode = models.build("tiny", tokenizer), Encoder(tokenizer)
    assert model.config.text_positions == "transformers"  # what specvlm reads
    ids, answers, positions = encode(chat([*before, Turn("What happens?", "It stays.")]), num_steps=32)
    start = len(ids) - len(tokenizer("It stays.<|im_end|>\n").input_ids)
    prompt = torch.tensor(ids[:start])[None]
    wanted, delta = model.model.get_rope_index(
        prompt,
        mm_token_type_ids=(prompt == encode.video).int() * 2,
        video_grid_thw=torch.tensor([[32, 12, 12]]),
        second_per_grid_ts=torch.tensor([1.0]),
        attention_mask=torch.ones_like(prompt),
    )
    assert torch.equal(torch.tensor(positions[:, :start]), wanted[:, 0])
    assert positions[0, start:].tolist() == [place + delta.item() for place in range(start, len(ids))]
    assert (
        tokenizer.decode(ids[answers]) == "".join(turn.answer + "<|im_end|>" for turn in before) + "It stays.<|im_end|>"
    )


def test_the_framewise_tower_equals_the_stock_one(tokenizer):
    model = models.build("tiny", tokenizer)
    patches = torch.randn(3 * models.PATCHES, 1176, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = model.model.visual(patches, grid_thw=torch.tensor([[3, 12, 12]])).pooler_output
        model.model.visual.set_attn_implementation("framewise")
        torch.testing.assert_close(models.visual_tokens(model, patches), stock)


def test_thinning_drops_visual_tokens_and_nothing_else(sample, tokenizer):
    video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    kept = likely(render.cell_labels(sample.batch)["colour"], 0.25)
    thin = thinned(sample, kept, video)
    assert torch.equal(thin.ids[thin.ids != video], sample.ids[sample.ids != video])
    assert (thin.ids == video).sum() == kept.sum() == round(0.25 * kept.shape[1]) * len(kept)
    assert torch.equal(thin.ids.flatten()[thin.where + 1], sample.targets)
    assert torch.equal(
        thin.positions[:, thin.ids == video], sample.positions[:, sample.ids == video][:, kept.flatten()]
    )


def test_two_steps_lower_the_losses(sample, tokenizer):
    torch.manual_seed(0)
    learner = Learner(models.build("tiny", tokenizer), teacher=None, keep=1.0)
    learner.model.model.visual.set_attn_implementation("framewise")
    patches = render.patchify(render.clip_pixels(sample.batch, generator=torch.Generator().manual_seed(0)))
    adam, losses = optimiser(learner, 1e-3, torch.device("cpu")), []
    for _ in range(3):
        found = learner(sample, patches)
        total(found, progress=0.0).backward()
        adam.step()
        adam.zero_grad()
        losses.append({name: loss.item() for name, loss in found.items()})
    for name in ("text", "colour", "rank"):  # the answers, a head on the tower, a head on the text model
        assert losses[2][name] < losses[0][name]
