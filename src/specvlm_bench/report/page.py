"""The report as one HTML page that needs nothing from outside."""

from __future__ import annotations

import base64
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from specvlm_bench import style
from specvlm_bench.journal import Line
from specvlm_bench.report import protocol
from specvlm_bench.report.figures import Drawing
from specvlm_bench.report.render import Table
from specvlm_bench.report.results import Results

_SHOWN = 3  # samples of a run without pictures
_PICTURE = (1200, 2400)  # pixels, at most
_QUALITY = 80  # of JPEG


@dataclass(frozen=True)
class Section:
    """One run with all that is shown of it."""

    results: Results
    tables: Sequence[Table]
    drawings: Sequence[Drawing]


def html(sections: Sequence[Section], comparisons: Sequence[Table]) -> str:
    """Return the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    names = ", ".join(section.results.name for section in sections)
    here = files("specvlm_bench.report")
    return environment.from_string((here / "page.html.j2").read_text(encoding="utf-8")).render(
        title=f"Speculative decoding, {names}",
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        runs=[_run(section, number) for number, section in enumerate(sections, 1)],
        comparisons=comparisons,
    )


def _run(section: Section, number: int) -> dict[str, Any]:
    results = section.results
    pictured = dict.fromkeys(sample for sample, _ in results.overlays if sample in results.samples)
    shown = list(pictured) or results.samples[:_SHOWN]
    note = None if pictured else f"No pictures of kept tokens were made; the first {len(shown)} samples are shown."
    return {
        "name": results.name,
        "headline": protocol.headline(results),
        "progress": protocol.progress(results),
        "facts": protocol.facts(results),
        "tables": section.tables,
        "drawings": [
            {"title": one.title, "note": one.note, "svg": one.figure and _svg(one.figure, f"run-{number}-{one.slug}-")}
            for one in section.drawings
        ],
        "samples_note": note,
        "samples": [_sample(results, sample) for sample in shown],
    }


# Pictures


def _svg(figure: Any, prefix: str) -> Markup:
    """Return a figure as an element whose ids begin with a prefix, in the ink of the page."""
    encoded = io.BytesIO()
    figure.savefig(encoded, format="svg", transparent=True, metadata={"Date": None})
    text = encoded.getvalue().decode()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    for colour, variable in ((style.INK, "currentColor"), ("#000000", "currentColor"), (style.PALE, "var(--line)")):
        text = text.replace(colour, variable)
    return Markup(text)


def _picture(path: Path) -> str | None:
    """Return a picture as a data URI, no larger than a page needs; None where there is none."""
    encoded = io.BytesIO()
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail(_PICTURE)
            small.save(encoded, "JPEG", quality=_QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for broken files
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


# Samples


def _sample(results: Results, sample: str) -> dict[str, Any]:
    """Return a sample's texts, those that are alike together, and its pictures."""
    lines = [line for method in results.methods if (line := results.answers.get((sample, method)))]
    visual = next((f", {line['visual_tokens']:,} visual tokens" for line in lines if line["visual_tokens"]), "")
    pictures = [line for (name, _), line in results.overlays.items() if name == sample]
    return {
        "name": sample,
        "prompt": lines[0]["prompt"],
        "about": f"{lines[0]['video']}{visual}.",
        "answers": list(_answers(lines, results.plain(sample))),
        "pictures": [_overlay(results, line) for line in pictures],
    }


def _overlay(results: Results, line: Line) -> dict[str, str | None]:
    data = _picture(results.run.directory / line["file"])
    caption = f"{line['method']}: {line['summary']}"
    return {"data": data, "caption": caption if data else f"{caption} ({line['file']} cannot be read)"}


def _answers(lines: Sequence[Line], plain: Line | None) -> Iterator[dict[str, Any]]:
    """Yield each method's text: plain decoding's as it is, of the others where they differ, or that they do not."""
    for line in lines:
        told = {"method": line["method"], "account": _account(line), "same": None, "pieces": [(line["text"], False)]}
        if plain is not None and line is not plain:
            told |= {"same": _same(plain, line), "pieces": list(_pieces(plain["text"], line["text"]))}
        yield told


def _same(plain: Line, line: Line) -> str | None:
    if plain["text"] != line["text"]:
        return None
    return "the same words" if plain["token_ids"] == line["token_ids"] else "the same words, of other tokens"


def _account(line: Line) -> str:
    """Return what an answer took, in a few words."""
    parts = [f"{line['new_tokens_with_eos']} tokens in {line['target_passes']} passes"]
    if line["rounds"]:
        parts.append(f"MAT {line['mean_accepted_length']:.2f}")
    if line["kept_visual_tokens"] is not None:
        parts.append(f"{line['kept_visual_tokens']:,} kept")
    return ", ".join(parts)


def _pieces(plain: str, other: str) -> Iterator[tuple[str, bool]]:
    """Yield the other text in pieces, each with whether plain decoding's has other words there."""
    words, others = (re.findall(r"\s*\S+|\s+", text) for text in (plain, other))
    for kind, _, _, begin, end in difflib.SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        if begin < end:
            yield "".join(others[begin:end]), kind != "equal"
