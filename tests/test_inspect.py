"""The picture of what pruning keeps: its heat, its layout, its words. The command that draws it is in test_cli.py."""

import numpy as np
import pytest
import torch

from specvlm import EngineConfig, SpecVLM, VideoConfig
from specvlm.check import inspect as inspection
from specvlm.check.inspect import Inspection, lay_out
from specvlm.engine.pair import bundled
from specvlm.media import load

PROMPT = "Which shapes touch?"


def inspected(scores, shape=(1, 2, 2), *, keep=(1, 3), name="clip.mp4", prompt=PROMPT):
    grid = torch.cartesian_prod(*(torch.arange(count) for count in shape))
    steps, rows, columns = shape
    frames = load(np.full((2 * steps, 28 * rows, 28 * columns, 3), 90, np.uint8), VideoConfig(fps=2))
    return Inspection(name, prompt, EngineConfig(), frames, grid, torch.as_tensor(scores), torch.tensor(keep))


def flat(shape):
    """Return scores near each other, as those of a real clip are: most within a fifth of the least one."""
    dice = np.random.default_rng(0)
    scores = torch.from_numpy(1 + 0.2 * dice.random(np.prod(shape)) + dice.pareto(4, np.prod(shape)))
    return (scores / scores.sum()).float()


def test_mass_and_summary():
    found = inspected([0.0, 0.1, 0.2, 0.7])
    assert found.mass == pytest.approx(0.8)
    assert found.summary() == "verifier keeps 2 of 4 visual tokens (50.0%) with 80% of the attention"


# Heat


def test_heat_starts_at_the_least_score_and_ends_where_few_exceed_it():
    scores = torch.linspace(0.5, 1.5, 101)[None].repeat(2, 1).flatten()[:200]
    found = inspected(scores, (1, 10, 20))
    low, high = inspection.scale(found)
    assert low == 0.5
    assert high == pytest.approx(float(scores.quantile(0.99)))
    heat = inspection._cells(found)[1].flatten()
    assert heat[0] == 0
    assert heat[50] == pytest.approx((1 - 0.5) / (high - 0.5))
    assert heat.max() == 1


def test_most_of_a_flat_clip_is_dark():
    heat = inspection._cells(inspected(flat((4, 6, 6)), (4, 6, 6)))[1]
    assert np.median(heat) < 0.35  # 0.6 if the colours began at a score of 0, which is orange
    assert (heat > 0.9).mean() < 0.1


def test_equal_scores_are_all_dark():
    assert inspection._cells(inspected([0.25] * 4))[1].max() == 0


def test_heat_is_drawn_by_score():
    found = inspected([0.0, 0.1, 0.2, 0.7])
    sheet = np.asarray(inspection.draw(found)).astype(int)
    layout = lay_out(1, 2, 2)
    x, y = layout.heat
    top, left = sheet.shape[0] - inspection.MARGIN - layout.height + y, inspection.MARGIN + x
    half = layout.cell // 2
    middles = [sheet[top + row * layout.cell + half, left + column * layout.cell + half].sum()
               for row in range(2) for column in range(2)]  # fmt: skip
    assert middles == sorted(set(middles))


# Layout


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 12, 16])
@pytest.mark.parametrize("grid", [(6, 6), (18, 32), (32, 18)])
def test_frames_fill_the_page(count, grid):
    layout = lay_out(count, *grid)
    width, height = inspection.PAGE
    assert layout.width <= width
    assert layout.height <= height
    drawn = 2 * count * layout.frame[0] * layout.frame[1]
    assert drawn > 0.4 * width * height
    corners = [layout.corner(place) for place in range(count)]
    assert len(set(corners)) == count
    assert max(x for x, _ in corners) + layout.tile[0] == layout.width
    assert max(y for _, y in corners) + layout.tile[1] == layout.height


def test_one_frame_stands_beside_its_heat():
    layout = lay_out(1, 6, 6)
    assert layout.is_beside
    assert layout.frame == (798, 798)  # half of the page's width, but for the seam
    assert not lay_out(3, 6, 6).is_beside


@pytest.mark.parametrize("shape", [(40, 4, 6), (16, 60, 100), (1, 1, 40), (3, 40, 1)])
def test_the_page_stays_a_page(shape):
    total = int(np.prod(shape))
    sheet = inspection.draw(inspected(torch.full((total,), 1 / total), shape, keep=(0,)))
    assert sheet.width <= 2000
    assert sheet.height <= 2600
    assert sheet.width >= inspection.MIN_WIDTH


# Words


def words(found, width=1200):
    return [line for line, _ in inspection._headings(found, width)]


def test_the_picture_names_video_and_question():
    assert words(inspected([0.25] * 4)) == ["clip.mp4", f"\u201c{PROMPT}\u201d"]
    first, other, third = (
        np.asarray(inspection.draw(inspected([0.25] * 4, name=name, prompt=prompt)))
        for name, prompt in (("clip.mp4", PROMPT), ("other.mp4", PROMPT), ("clip.mp4", "Which shapes part?"))
    )
    rows = [sorted({*np.nonzero((first != one).any((1, 2)))[0].tolist()}) for one in (other, third)]
    assert rows[0]
    assert rows[1]
    assert rows[0][-1] < rows[1][0]  # the name stands above the question


def test_names_of_sources(tmp_path):
    assert inspection._name(tmp_path / "a clip.mp4") == "a clip.mp4"
    assert inspection._name("https://user:secret@host/films/a.mp4?token=secret") == "a.mp4"
    with open(__file__, "rb") as file:
        assert inspection._name(file) == "test_inspect.py"
    assert inspection._name(b"bytes") == inspection._name(np.zeros(1)) == ""
    assert inspection._name("data:video/mp4;base64,AAAA") == ""


def test_a_long_question_takes_three_lines_and_an_ellipsis():
    lines = words(inspected([0.25] * 4, prompt="many words " * 5000))[1:]
    assert len(lines) == 3
    assert lines[0].startswith("\u201cmany words many")
    assert lines[0].endswith(("many", "words"))  # broken between words
    assert lines[2].endswith("\u2026")
    unbroken = words(inspected([0.25] * 4, name="x" * 5000))[0]
    assert unbroken.endswith("x\u2026")


@pytest.mark.parametrize(
    ("prompt", "drawn"),
    [
        ("caf\u00e9", "caf\\xe9"),
        ("one\n\ttwo", "one two"),
        ("\u4e2d?", "\\u4e2d?"),
        ("\udcff", "\\udcff"),
        ("", ""),
    ],
)
def test_letters_that_no_font_has_are_escapes(monkeypatch, prompt, drawn):
    monkeypatch.setattr(inspection, "SYSTEM_FONTS", ("nowhere.ttf",))
    found = inspected([0.25] * 4, prompt=prompt, name=f"{prompt}.mp4")
    assert words(found)[1] == f"\u201c{drawn}\u201d"
    inspection.draw(found)


def test_a_video_in_messages_is_named_too(tmp_path):
    clip = f"{bundled('clips')}/example.mp4"
    content = [{"type": "video", "video": clip}, {"type": "text", "text": PROMPT}]
    model = SpecVLM.from_pretrained(drafter="none", num_frames=2)
    found = inspection.inspect(model, [{"role": "user", "content": content}])
    assert (found.name, found.prompt) == ("example.mp4", PROMPT)
