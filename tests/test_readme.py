"""The README and the pages of docs: their Python blocks run, their links lead somewhere, their commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from specvlm import prune
from specvlm.cli import main as cli
from specvlm.speculate.drafters import DRAFTERS
from specvlm.speculate.policy import POLICIES

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.M | re.S)
    return [block for own, block in found if own == language]


@pytest.fixture
def restored_registries():
    yield
    prune.PRUNERS.pop("recent", None)
    DRAFTERS.pop("repeat", None)
    POLICIES.pop("short", None)


def test_python_blocks_run(monkeypatch, capsys, restored_registries):
    monkeypatch.chdir(ROOT)
    found = {page.name: blocks(page, "python") for page in PAGES}
    assert {name: len(own) for name, own in found.items() if own} == {"README.md": 1, "extending.md": 3}
    for name, own in found.items():
        namespace = {}
        for block in own:
            exec(compile(block, name, "exec"), namespace)
    kept, visual = map(int, re.search(r"^(\d+) of (\d+)$", capsys.readouterr().out, re.M).groups())
    assert 0 < kept == round(0.1 * visual)
    assert len(found["README.md"][0].strip().splitlines()) <= 8


def test_links_lead_to_files():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page)):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_plot_is_on_a_page():
    shown = {Path(link).name for page in PAGES for link in re.findall(r"\]\(([^)]+)\.png\)", text_of(page))}
    assert {f"{name}.png" for name in shown} == {file.name for file in (ROOT / "docs/plots").iterdir()}


def test_the_readme_is_short_and_explains_its_words():
    words = text_of(ROOT / "README.md").split()
    assert len(words) < 1200
    text = " ".join(words)
    for word, explained in (("MAT", "how many drafted tokens a round has accepted"), ("planted", "full-size random")):
        first = text.index(word)
        assert explained in text[first - 150 : first + 150], word


def commands():
    """Yield (page, words) of every specvlm command in a block; what the shell would put into it is filled in."""
    for page in PAGES:
        for block in blocks(page, ""):
            joined = block.replace("\\\n", " ")
            for line in joined.splitlines():
                if line.startswith("specvlm "):
                    filled = line.replace("$PAIR", "--target T --draft D").split(" #")[0]
                    yield pytest.param(shlex.split(filled)[1:], id=f"{page.stem}: {line[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_parsed(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recent.py").touch()
    assert cli._parse(words).run
