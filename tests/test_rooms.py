"""The house: which room may import which, through what, and that nothing goes in circles."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "mpcore"
#: From the ground up. A room imports what lies on lower floors, and what is left of it on its own.
FLOORS = (
    ("errors", "base"),
    ("loss_scale", "optim", "stores", "updates"),
    ("backends", "ranks"),
    ("masters",),
    ("checkpoint",),
    ("engine",),
    ("amp", "precision", "monitoring", "migration"),
    ("doctor", "report", "comparison", "demo", "bench", "cli", "integrations", "__main__"),
)
ROOMS = [room for floor in FLOORS for room in floor]
#: Rooms of which others see what `__init__.py` names, and nothing else.
FACED = ("base", "loss_scale", "stores", "updates", "backends", "masters", "checkpoint", "engine")
FACED += ("amp", "precision", "ranks")
#: Modules that only show a name of a room where the documentation has it.
DOORS = sorted(path.stem for path in HOUSE.glob("*.py") if path.stem not in (*ROOMS, "__init__"))
FILES = sorted(HOUSE.rglob("*.py"))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module):
    return [*module.split("."), ""][1]


@cache
def imports(path):
    """(module, name) of every import of ours in a file, in functions and for types as well."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and is_ours(node.module):
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if is_ours(alias.name)]
    return found


def is_ours(module):
    return module.split(".")[0] == "mpcore"


def target(module, name):
    """The module that an import runs."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def test_every_folder_and_module_is_a_room_or_a_door():
    folders = {path.parent.name for path in HOUSE.glob("*/__init__.py")}
    modules = {path.stem for path in HOUSE.glob("*.py")} - {"__init__"}
    assert folders | modules == {*ROOMS, *DOORS}
    assert len(FLOORS) <= 8


def test_imports_go_down():
    height = {
        room: (floor, place)
        for floor, rooms in enumerate(FLOORS)
        for place, room in enumerate(rooms)
    }
    upward = []
    for user, path in MODULES.items():
        here = room_of(user)
        if here in ("", *DOORS):
            continue
        for module, name in imports(path):
            there = room_of(target(module, name))
            # the top level is what users have: only what is built on top of the engine may use it
            if not (there == here or height[there] < height[here] if there else here in FLOORS[-1]):
                upward.append(f"{user}: {module} {name}")
    assert upward == []


def test_imports_of_another_room_come_through_its_face():
    past = []
    for user, path in MODULES.items():
        for module, name in imports(path):
            there = room_of(target(module, name))
            if there not in FACED or room_of(user) in (there, *DOORS):
                continue
            if module != f"mpcore.{there}" or name not in names_of_face(there):
                past.append(f"{user}: {module} {name}")
    assert past == []


@cache
def names_of_face(room):
    tree = ast.parse(MODULES[f"mpcore.{room}"].read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"mpcore/{room}/__init__.py: no __all__")


@pytest.mark.parametrize("room", FACED)
def test_a_face_shows_what_others_use_and_nothing_else(room):
    used = {
        name
        for path in FILES
        for module, name in imports(path)
        if module == f"mpcore.{room}" and room_of(module_of(path)) != room
    }
    documented = (ROOT / "docs").rglob("*.md")
    text = "".join(path.read_text(encoding="utf-8") for path in documented)
    used |= set(re.findall(rf"mpcore\.{room}\.(\w+)", text))
    used |= {
        n
        for line in re.findall(rf"from mpcore\.{room} import (.*)", text)
        for n in line.split(", ")
    }
    assert set(names_of_face(room)) - used == set()


@pytest.mark.parametrize("door", DOORS)
def test_a_door_only_shows_what_a_room_has(door):
    tree = ast.parse((HOUSE / f"{door}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert all(isinstance(node, ast.ImportFrom) for node in tree.body[1:])
    users = [
        m for m, p in MODULES.items() for module, _ in imports(p) if module == f"mpcore.{door}"
    ]
    assert set(users) <= {"mpcore"}


def test_no_import_circle():
    graph = {
        name: {target(*each) for each in imports(path)} - {name, "mpcore"}
        for name, path in MODULES.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES) - 1  # or CycleError


def test_every_room_is_on_the_drawing_of_the_design():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    drawing = text[text.index("## The house") :].split("```")[1]
    assert [room for room in ROOMS if not re.search(rf"\b{room}\b", drawing)] == []
