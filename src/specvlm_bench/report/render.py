"""A table, and how it is written: Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specvlm_bench.report.stats import Estimate

_LATEX_COLUMNS = 8  # side by side on a page, the first one included
_LATEX_HEAD, _LATEX_LONG = 11, 30  # letters a line of a head; those from which on a text is broken into lines


@dataclass(frozen=True)
class Count:
    """So many of so many."""

    value: int
    of: int


Cell = str | float | Estimate | Count | None


@dataclass(frozen=True)
class Column:
    """What stands above a column, and how its numbers are written; without a form its cells are text."""

    name: str
    form: str = ""


@dataclass(frozen=True)
class Text:
    """A cell as it is read: its value, and the interval of that or nothing."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        slug: its name in a file's.
        title: what it shows.
        columns: two or more, their names all different.
        rows: cells, a row as many as there are columns.
        notes: how its figures were counted, a sentence or more each.
    """

    slug: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[list[Text]]:
        """The cells as they are read, row by row."""
        return [[_text(cell, column) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows]


def _text(cell: Cell, column: Column) -> Text:
    if cell is None:
        return Text("")
    if isinstance(cell, str):
        return Text(cell)
    if isinstance(cell, Count):
        return Text(f"{cell.value} of {cell.of}")
    if not isinstance(cell, Estimate):
        return Text(format(cell, column.form))
    interval = "" if cell.low is None else f"{cell.low:{column.form}} to {cell.high:{column.form}}"
    return Text(format(cell.value, column.form), interval)


# Markdown


def markdown(table: Table) -> str:
    """Return a heading, the table and its notes."""
    head = [escaped(column.name) for column in table.columns]
    rows = [head, *([_one_line(text) for text in texts] for texts in table.texts)]
    written = [f"| {' | '.join(row)} |" for row in rows]
    lines = [f"### {escaped(table.title)}", ""]
    lines += [written[0], "|" + "---|" * len(head), *written[1:], ""] if table.rows else []
    for note in table.notes:
        lines += [escaped(note), ""]
    return "\n".join(lines)


def _one_line(text: Text) -> str:
    return escaped(f"{text.value} ({text.interval})" if text.interval else text.value)


def escaped(text: str) -> str:
    """Return a text that stays in its cell and is read as it is."""
    return re.sub(r"([\\`*_<|\[])", r"\\\1", " ".join(text.split("\n")))


# CSV


def comma_separated(table: Table) -> str:
    """Return plain numbers; an estimate takes three columns (value, low, high), a count two (value, of)."""
    found = io.StringIO()
    writer = csv.writer(found, lineterminator="\n")
    kinds = [_kind([row[place] for row in table.rows]) for place in range(len(table.columns))]
    writer.writerow(
        name for column, kind in zip(table.columns, kinds, strict=True) for name in _names(column.name, kind)
    )
    for row in table.rows:
        writer.writerow(value for cell, kind in zip(row, kinds, strict=True) for value in _values(cell, kind))
    return found.getvalue()


def _kind(cells: Sequence[Cell]) -> type[Estimate | Count] | None:
    return next((type(cell) for cell in cells if isinstance(cell, Estimate | Count)), None)


def _names(name: str, kind: type[Estimate | Count] | None) -> tuple[str, ...]:
    if kind is None:
        return (name,)
    return (name, f"{name}, of") if kind is Count else (name, f"{name}, low", f"{name}, high")


def _values(cell: Cell, kind: type[Estimate | Count] | None) -> tuple[str | float | None, ...]:
    if cell is None:
        return (None,) * len(_names("", kind))
    if isinstance(cell, Estimate):
        return tuple(_rounded(value) for value in (cell.value, cell.low, cell.high))
    return (cell.value, cell.of) if isinstance(cell, Count) else (_rounded(cell),)


def _rounded(value: str | float | None) -> str | float | None:
    return float(f"{value:.6g}") if isinstance(value, float) else value


# LaTeX

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\n": " ",
} | {character: f"\\{character}" for character in "{}$&#_%"}


def latex(table: Table) -> str:
    """Return floats that need the package booktabs: several of a wide table, the first column in each.

    A table without rows is a paragraph, of its title and notes.
    """
    notes = " ".join(_latex(text) for text in (f"{table.title}.", *table.notes))
    if not table.rows:
        return notes + "\n"
    count = len(table.columns) - 1
    width = math.ceil(count / math.ceil(count / (_LATEX_COLUMNS - 1)))
    parts = [[0, *range(begin, min(begin + width, count + 1))] for begin in range(1, count + 1, width)]
    captions = [notes, *[f"{_latex(table.title)}, continued."] * (len(parts) - 1)]
    return "\n".join(_float(caption, _tabular(table, part)) for caption, part in zip(captions, parts, strict=True))


def _float(caption: str, tabular: str) -> str:
    head = [r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{4pt}"]
    return "\n".join([*head, rf"\caption{{{caption}}}", tabular, r"\end{table}"]) + "\n"


def _tabular(table: Table, part: Sequence[int]) -> str:
    texts = [[row[place] for place in part] for row in table.texts]
    columns = [table.columns[place] for place in part]
    kinds = "".join(_latex_kind(column, [row[at] for row in texts]) for at, column in enumerate(columns))
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", _latex_row(map(_latex_head, columns)), r"\midrule"]
    for row in texts:
        lines.append(_latex_row(_latex(text.value) for text in row))
        if any(text.interval for text in row):
            lines.append(_latex_row(rf"{{\scriptsize {_latex(text.interval)}}}" for text in row))
            lines.append(r"\addlinespace[2pt]")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_kind(column: Column, cells: Sequence[Text]) -> str:
    if column.form:
        return "r"
    return r"p{0.45\linewidth}" if any(len(cell.value) > _LATEX_LONG for cell in cells) else "l"


def _latex_head(column: Column) -> str:
    lines = r"\\".join(map(_latex, textwrap.wrap(column.name, _LATEX_HEAD)))
    return rf"\shortstack[{'r' if column.form else 'l'}]{{{lines}}}"


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex(text: str) -> str:
    """Return a text that is read as it is; letters that are not Latin are named, as pdflatex has no font for them."""
    escaped = (_LATEX.get(letter, letter if letter.isprintable() and letter < "\u0180" else f"U+{ord(letter):04X}")
               for letter in text)  # fmt: skip
    return "".join(escaped).replace("--", "-{}-")  # which would become one long dash
