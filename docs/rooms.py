"""Draw docs/rooms.svg, the picture of the rooms and what they import, from the imports themselves.

python docs/rooms.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
PICTURE = ROOT / "docs" / "rooms.svg"
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 150, 40, 30, 34, 20


def rooms() -> dict[str, set[str]]:
    """Return every room with the rooms that it imports from."""
    found: dict[str, set[str]] = {}
    for package in ("specvlm", "specvlm_bench"):
        for file in sorted((SRC / package).rglob("*.py")):
            own = _room(".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"))
            if own and own != "__main__":
                found.setdefault(own, set()).update(_imported(file) - {own})
    return {own: others & found.keys() for own, others in found.items()}


def _room(module: str) -> str:
    top, _, rest = module.partition(".")
    return top if top == "specvlm_bench" else rest.partition(".")[0] if top == "specvlm" else ""


def _imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {_room(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {_room(f"{node.module}.{alias.name}") for alias in node.names}
    return found


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the rooms by floor, the ground first: a room stands just above the highest that it imports from."""
    found: list[list[str]] = []
    left = {room: set(others) for room, others in graph.items()}
    while left:
        floor = sorted(room for room, others in left.items() if not others)
        if not floor:
            raise ValueError(f"a circle of imports among {sorted(left)}")
        found.append(floor)
        left = {room: others - set(floor) for room, others in left.items() if room not in floor}
    return found


def picture() -> str:
    """Return the SVG: a box a room, and a line to every room that it imports from and no other leads to."""
    graph = rooms()
    rows = floors(graph)[::-1]
    widest = max(len(row) for row in rows)
    width = 2 * MARGIN + widest * (WIDTH + GAP_X) - GAP_X
    height = 2 * MARGIN + len(rows) * (HEIGHT + GAP_Y) - GAP_Y
    corners = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * (WIDTH + GAP_X) + GAP_X) // 2
        corners |= {
            room: (left + place * (WIDTH + GAP_X), MARGIN + number * (HEIGHT + GAP_Y)) for place, room in enumerate(row)
        }
    lines = [_line(corners[room], corners[other]) for room in sorted(graph) for other in sorted(_direct(room, graph))]
    boxes = [_box(room, *corners[room]) for room in sorted(corners)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *lines, *boxes, "</svg>"]) + "\n"


def _direct(room: str, graph: dict[str, set[str]]) -> set[str]:
    return graph[room] - {far for near in graph[room] for far in _reached(near, graph)}


def _reached(room: str, graph: dict[str, set[str]]) -> set[str]:
    return graph[room] | {far for near in graph[room] for far in _reached(near, graph)}


def _line(above: tuple[int, int], below: tuple[int, int]) -> str:
    half = WIDTH // 2
    ends = f'x1="{above[0] + half}" y1="{above[1] + HEIGHT}" x2="{below[0] + half}" y2="{below[1]}"'
    return f'<line {ends} stroke="#90a4ae" stroke-width="1.5"/>'


def _box(room: str, x: int, y: int) -> str:
    place = f'x="{x + WIDTH // 2}" y="{y + HEIGHT // 2 + 5}" text-anchor="middle"'
    shape = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#e8eaf6" stroke="#3f51b5"/>'
    return f'{shape}<text {place} font-family="sans-serif" font-size="15" fill="#1a237e">{room}</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
