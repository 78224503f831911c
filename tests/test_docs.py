"""The site of `make docs`: every page is in its menu, every name on its page, and no link leads out of it."""

import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

import specvlm
from specvlm import EngineConfig

ROOT = Path(__file__).parent.parent
SITE = runpy.run_path(str(ROOT / "docs/site.py"))


def test_every_page_is_in_the_menu():
    menu = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    made = {*SITE["ELSEWHERE"].values(), "examples.md", "settings.md", "reference.md"}
    assert menu == made | {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize(
    ("link", "within"),
    [
        ("[speed](speed.md)", "[speed](speed.md)"),
        ("[a](https://a.org/b)", "[a](https://a.org/b)"),
        ("![plot](plots/pruners-mat.png)", "![plot](plots/pruners-mat.png)"),
        ("[the page](../README.md#licence)", "[the page](index.md#licence)"),
        ("[families/base.py](../src/specvlm/families/base.py)", "`src/specvlm/families/base.py`"),
        ("[rooms.py](rooms.py)", "`docs/rooms.py`"),
        ("[the tests](../tests/tiny.py)", "the tests (`tests/tiny.py`)"),
    ],
)
def test_links_stay_within_the_site(link, within):
    assert SITE["within_site"](link, ROOT / "docs") == within


def test_the_readme_leads_to_the_pages():
    assert SITE["within_site"]("[docs/speed.md](docs/speed.md)", ROOT) == "[speed.md](speed.md)"


def test_every_name_has_its_place():
    assert {name for name in specvlm.__all__ if f"::: specvlm.{name}\n" not in SITE["reference"]()} == set()
    config, page = EngineConfig(), SITE["settings"]()
    names = {own.name for part in fields(config) for own in fields(getattr(config, part.name))}
    assert {name for name in names if f"| `{name}` |" not in page} == set()
    assert all(f"```python\n{file.read_text()}" in SITE["examples"]() for file in (ROOT / "examples").glob("*.py"))


def test_the_picture_of_the_rooms_is_of_these_imports():
    found = runpy.run_path(str(ROOT / "docs/rooms.py"))
    assert found["PICTURE"].read_text(encoding="utf-8") == found["picture"](), "run: python docs/rooms.py"
    assert found["floors"]({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [["c"], ["b"], ["a"]]
    with pytest.raises(ValueError, match="a circle of imports"):
        found["floors"]({"a": {"b"}, "b": {"a"}})


def test_every_room_is_explained():
    rooms = runpy.run_path(str(ROOT / "docs/rooms.py"))["rooms"]()
    table = re.findall(r"^\| `(\w+)/?` \|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.M)
    assert rooms.keys() <= set(table)


def test_the_oldest_transformers_runs_the_same_tests_everywhere():
    makefile, workflow = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", ".github/workflows/test.yml")
    )
    line = re.search(r"-n 2 (tests/test_families.*)$", makefile, re.M)[1]
    assert line in workflow
