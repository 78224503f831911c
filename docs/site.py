"""What `make docs` adds to the pages: those that stand elsewhere in the repository, and those made from the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import specvlm
from specvlm.core.config import EngineConfig

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file of docs/ holds."""
    from mkdocs.structure.files import File

    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in ELSEWHERE.items()}
    pages["index.md"] = pages["index.md"].replace("](docs/plots/", "](plots/")
    pages |= {"examples.md": examples(), "reference.md": reference(), "settings.md": settings()}
    for name, text in pages.items():
        folder = ROOT if name in ELSEWHERE.values() else ROOT / "docs"
        files.append(File.generated(config, name, content=within_site(text, folder)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links stay within the site."""
    return within_site(markdown, ROOT / "docs")


def within_site(markdown: str, folder: Path) -> str:
    """Return a page with links between pages kept, and links to other files of the repository as the files' names.

    Args:
        markdown: the page.
        folder: where it stands in the repository.
    """

    def replaced(match: re.Match[str]) -> str:
        label, link, anchor = match.groups()
        target = (folder / link).resolve()
        if not target.exists() or target.is_relative_to(ROOT / "docs" / "plots"):
            return match[0]
        name = target.relative_to(ROOT).as_posix()
        if name in ELSEWHERE:
            return f"[{label}]({ELSEWHERE[name]}{anchor or ''})"
        if name.startswith("docs/") and name.endswith(".md"):
            return f"[{label.removeprefix('docs/')}]({name.removeprefix('docs/')}{anchor or ''})"
        return f"`{name}`" if label.strip("`") in name else f"{label} (`{name}`)"

    return LINK.sub(replaced, markdown)


def examples() -> str:
    """Return the page of all examples."""
    parts = [
        "# Examples",
        "Each is a program of `examples/` that runs on a CPU in seconds, with the bundled pair and clip.",
    ]
    for file in sorted((ROOT / "examples").glob("*.py")):
        title = file.stem.replace("_", " ").capitalize()
        parts.append(f"## {title}\n\n```python\n{file.read_text(encoding='utf-8').strip()}\n```")
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """Return the page of everything that `specvlm` exports, from its docstrings."""
    return "# Reference\n\n" + "\n\n".join(f"::: specvlm.{name}" for name in specvlm.__all__) + "\n"


def settings() -> str:
    """Return the page of all settings."""
    head = "A keyword of every call, and an option of the command (`keep_ratio`: `--keep-ratio`)."
    return (
        "\n".join(["# Settings", "", head, "", "| name | default | what it does |", "|---|---|---|", *_rows()]) + "\n"
    )


def _rows() -> Iterator[str]:
    config = EngineConfig()
    for part in fields(config):
        for setting in fields(getattr(config, part.name)):
            words = str(setting.metadata.get("help", "")).replace("|", "\\|")
            yield f"| `{setting.name}` | `{setting.default}` | {words} |"
