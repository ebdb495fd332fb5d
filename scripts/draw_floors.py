"""Draws docs/floors.svg: the rooms of src/batchnorm, and which of them import which.

    python scripts/draw_floors.py

A room is a folder or a file at the top of the package, and stands one floor above the highest room that it
imports, so that every arrow goes down. An arrow that follows from others is left out: where a imports b and b
imports c, a may import c too. The file is the same for the same imports; tests/test_documents.py compares it.
"""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

import grimp

PICTURE = Path(__file__).parents[1] / "docs" / "floors.svg"
PACKAGE = "batchnorm"
Imports = dict[str, set[str]]

# Pixels.
WIDTH, BOX_WIDTH, BOX_HEIGHT, FLOOR_HEIGHT, MARGIN = 900, 164, 60, 112, 16
PASSAGE_WIDTH = 12  # of an arrow that passes a floor
STYLE = """
    .page { fill: #ffffff } .box { fill: #eef2ff; stroke: #4f46e5 } .only-tests { stroke-dasharray: 5 4 }
    .arrow { fill: none; stroke: #64748b; stroke-width: 1.4 } .head { fill: #64748b }
    text { font-family: system-ui, sans-serif; fill: #111827; text-anchor: middle }
    .room { font-size: 15px; font-weight: 600 } .folders { font-size: 11px }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117 } .box { fill: #1e1b4b; stroke: #818cf8 } text { fill: #f1f5f9 }
      .arrow { stroke: #94a3b8 } .head { fill: #94a3b8 }
    }"""


def imports_between_rooms() -> tuple[Imports, dict[str, list[str]]]:
    """Return the rooms that each room imports, and the folders within each room."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    imports: Imports = {}
    folders: dict[str, list[str]] = {}
    for child in sorted(graph.find_children(PACKAGE)):
        room = child.rpartition(".")[2]
        imported = {
            name.split(".")[1]
            for module in {child} | graph.find_descendants(child)
            for name in graph.find_modules_directly_imported_by(module)
            if name.startswith(f"{PACKAGE}.")
        }
        imports[room] = imported - {room}
        folders[room] = sorted(
            name.rpartition(".")[2] for name in graph.find_children(child) if graph.find_children(name)
        )
    return imports, folders


def floor_of(room: str, imports: Imports) -> int:
    """Return 0 for a room without imports, else one floor more than the highest of those."""
    return max((floor_of(other, imports) + 1 for other in imports[room]), default=0)


def without_implied(imports: Imports) -> Imports:
    """Return the imports without those that a chain of others implies."""

    def below(room: str) -> set[str]:
        return imports[room].union(*map(below, imports[room]))

    return {room: others - set().union(*map(below, others)) for room, others in imports.items()}


def with_passages(imports: Imports) -> tuple[dict[str, int], Imports]:
    """Return the floor of each room, and the imports with a passage on each floor that an arrow passes.

    A passage has the name of its arrow and of its floor.
    """
    floors = {room: floor_of(room, imports) for room in imports}
    steps: Imports = {room: set() for room in imports}
    for room in imports:
        for other in sorted(imports[room]):
            passages = [f"{room} {other} {floor}" for floor in range(floors[room] - 1, floors[other], -1)]
            floors |= {passage: int(passage.rpartition(" ")[2]) for passage in passages}
            steps |= {passage: set() for passage in passages}
            for start, end in itertools.pairwise([room, *passages, other]):
                steps[start].add(end)
    return floors, steps


def centres(floors: dict[str, int], steps: Imports) -> dict[str, tuple[float, float]]:
    """Return the centre of each box or passage: on its floor, ordered as the rooms above that import it."""
    found: dict[str, tuple[float, float]] = {}
    for floor in range(max(floors.values()), -1, -1):

        def wanted(name: str) -> float:
            above = [found[other][0] for other in found if name in steps[other]]
            return sum(above) / len(above) if above else WIDTH

        names = sorted(
            (name for name in floors if floors[name] == floor), key=lambda name: (wanted(name), name)
        )
        widths = [PASSAGE_WIDTH if " " in name else BOX_WIDTH for name in names]
        gap = (WIDTH - sum(widths)) / len(names)
        y = MARGIN + (max(floors.values()) - floor) * FLOOR_HEIGHT + BOX_HEIGHT / 2
        for place, name in enumerate(names):
            found[name] = (sum(widths[:place]) + (place + 0.5) * gap + widths[place] / 2, y)
    return found


def picture() -> str:
    """Return the picture as SVG."""
    imports, folders = imports_between_rooms()
    floors, steps = with_passages(without_implied(imports))
    place = centres(floors, steps)
    passages = steps.keys() - imports
    tested_only = {
        room for room in imports if not imports[room] and not any(room in o for o in imports.values())
    }
    height = max(y for _, y in place.values()) + BOX_HEIGHT / 2 + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">',
        f"  <title>The rooms of {PACKAGE} on their floors; arrows are imports</title>",
        f"  <style>{STYLE}\n  </style>",
        '  <marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"',
        '    orient="auto">',
        '    <path class="head" d="M0 0 8 4 0 8z"/>',
        "  </marker>",
        '  <rect class="page" width="100%" height="100%"/>',
        *(
            _arrow(place[start], place[end], start in passages, end in passages)
            for start in steps
            for end in sorted(steps[start])
        ),
        *(_box(room, *place[room], folders[room], room in tested_only) for room in imports),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _arrow(start: tuple[float, float], end: tuple[float, float], from_passage: bool, to_passage: bool) -> str:
    """Return one floor's part of an arrow: a curve between boxes, which goes straight through a passage."""
    (x, y), (to_x, to_y) = start, end
    y, to_y = y + BOX_HEIGHT / 2, to_y - BOX_HEIGHT / 2
    straight = f"M{x:.0f} {y - BOX_HEIGHT * from_passage:.0f}V{y:.0f}"
    middle = (y + to_y) / 2
    curve = f"C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
    head = "" if to_passage else ' marker-end="url(#head)"'
    return f'  <path class="arrow"{head} d="{straight}{curve}"/>'


def _box(room: str, x: float, y: float, folders: list[str], tested_only: bool) -> str:
    left, top = x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2
    kind = "box only-tests" if tested_only else "box"
    below = ["imported by tests only"] if tested_only else textwrap.wrap(", ".join(folders), 26)
    first = y + 5 - 7 * len(below)
    lines = [f'  <text class="room" x="{x:.0f}" y="{first:.0f}">{room}</text>']
    lines += [
        f'  <text class="folders" x="{x:.0f}" y="{first + 15 + 13 * number:.0f}">{line}</text>'
        for number, line in enumerate(below)
    ]
    size = f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}"'
    return "\n".join([f'  <rect class="{kind}" x="{left:.0f}" y="{top:.0f}" {size} rx="6"/>', *lines])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
