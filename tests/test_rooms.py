"""Imports point one way, between rooms and within them, and the runtime knows nothing of the bench."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
# from the ground up; a room imports from its own floor's own room and from lower floors
FLOORS = (
    {"core"},
    {"media", "kernels", "prune"},
    {"families"},
    {"runtime"},
    {"speculate"},
    {"engine"},
    {"check"},
    {"cli"},
    {"integrations"},
    {"specvlm_bench"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = {
    ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("specvlm", "specvlm_bench")
    for file in (SRC / package).rglob("*.py")
}


def imports(module):
    """Return the modules of ours that a module names in an import anywhere, under TYPE_CHECKING as well."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & FILES.keys() or {node.module}
    return {name for name in found if name in FILES} - {module}


GRAPH = {module: imports(module) for module in FILES}


def room(module):
    top, _, rest = module.partition(".")
    return top if top == "specvlm_bench" else rest.partition(".")[0]


@pytest.mark.parametrize("module", [module for module in sorted(FILES) if room(module) in FLOOR])
def test_nothing_is_imported_from_above_or_from_a_room_beside(module):
    own = room(module)
    others = {room(name): name for name in GRAPH[module] if room(name) != own}
    assert {name for place, name in others.items() if place and FLOOR[place] >= FLOOR[own]} == set()


def test_every_module_stands_in_a_room_but_the_door_and_the_bell():
    assert {module for module in FILES if room(module) not in FLOOR} == {"specvlm", "specvlm.__main__"}


def test_no_circle():
    left = {module: set(names) for module, names in GRAPH.items()}
    while leaves := {module for module, names in left.items() if not names}:
        left = {module: names - leaves for module, names in left.items() if module not in leaves}
    assert left == {}
