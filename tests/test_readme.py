"""The README's Python blocks run, in order, in one namespace."""

import re
from pathlib import Path

import pytest

from specvlm import prune
from specvlm.draft import DRAFTERS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def restored_registries():
    yield
    prune.PRUNERS.pop("recent", None)
    DRAFTERS.pop("repeat", None)


def test_python_blocks_run(monkeypatch, capsys, restored_registries):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "of" in capsys.readouterr().out
    assert len(blocks[0].strip().splitlines()) <= 8


def test_links_lead_to_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
