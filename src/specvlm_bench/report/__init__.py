"""Runs of `specvlm bench quality` as tables, plots and one HTML page.

    specvlm report DIR            # one run
    specvlm report DIR DIR -o OUT # several, each also beside the first

OUT/report.html holds everything and needs nothing beside it. The tables are also in tables.md, tables.tex (booktabs)
and tables/*.csv (plain numbers: value, low, high), the plots in plots/*.png.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specvlm.core.errors import ConfigError
from specvlm_bench import style
from specvlm_bench.report import figures, page, protocol, render, results, tables
from specvlm_bench.report.page import Section
from specvlm_bench.report.render import Table


@dataclass(frozen=True)
class Report:
    """What was written.

    Args:
        markdown: the tables, to be printed.
        paths: of all files, the page first.
    """

    markdown: str
    paths: tuple[Path, ...]


def build(directories: Sequence[Path], out: Path) -> Report:
    """Read runs and write their report.

    Args:
        directories: one or more folders of `bench quality --out`; unfinished runs too.
        out: a folder, made where there is none.

    Raises:
        ConfigError: matplotlib is missing, a folder holds no run, or `out` cannot be written.
    """
    style.require_matplotlib("a report needs")
    runs = results.load(directories)
    sections = [Section(run, tables.of_run(run), figures.of_run(run)) for run in runs]
    comparisons = [table for run in runs[1:] for table in tables.of_two(runs[0], run)]
    markdown = _markdown(sections, comparisons)
    try:
        paths = tuple(_write(out, sections, comparisons, markdown))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): give another folder") from error
    return Report(markdown, paths)


def _write(out: Path, sections: Sequence[Section], comparisons: Sequence[Table], markdown: str) -> Iterator[Path]:
    """Write all files; yield each."""
    for folder in ("tables", "plots"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    named = list(_named(sections, comparisons))
    texts = {
        "report.html": page.html(sections, comparisons),
        "tables.md": markdown,
        "tables.tex": "\n".join(render.latex(table) for _, table in named),
        **{f"tables/{name}.csv": render.comma_separated(table) for name, table in named},
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
        yield out / name
    for section in sections:
        for drawing in section.drawings:
            if drawing.figure is not None:
                file = out / "plots" / f"{section.results.prefix}{drawing.slug}.png"
                drawing.figure.savefig(file, dpi=style.DPI, facecolor="white")
                yield file


def _named(sections: Sequence[Section], comparisons: Sequence[Table]) -> Iterator[tuple[str, Table]]:
    """Yield all tables with the names of their files."""
    for section in sections:
        for table in section.tables:
            yield f"{section.results.prefix}{table.slug}", table
    for table in comparisons:
        yield table.slug, table


def _markdown(sections: Sequence[Section], comparisons: Sequence[Table]) -> str:
    parts = []
    for section in sections:
        found = section.results
        facts = "\n".join(f"- {name}: {render.escaped(value)}" for name, value in protocol.facts(found))
        parts += [f"## {render.escaped(found.name)}\n", f"{render.escaped(protocol.headline(found))}\n"]
        parts += [f"{told}\n" for told in [protocol.progress(found)] if told]
        parts += [f"{facts}\n", *map(render.markdown, section.tables)]
    return "\n".join([*parts, *map(render.markdown, comparisons)])
