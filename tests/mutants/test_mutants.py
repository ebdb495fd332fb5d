"""Each rule changes what it says, and a mutant is reported with the test that it breaks."""

from __future__ import annotations

import dataclasses
import signal
import threading
from pathlib import Path

import pytest

from .report import CAUGHT, SURVIVED, comparison, row, share
from .rooms import ROOMS, Room, Run, files
from .rules import RULES, changes
from .sample import Mutant, sample
from .trial import copy, mutate, run_room, verdict

SAID = {
    "removed check": [
        ("if n < 1:\n        raise ValueError('n')", "if False:\n        raise ValueError('n')"),
        ("check_eps(n)", "pass"),
    ],
    "sign": [("return a + b", "return a - b"), ("return -a", "return a"), ("a -= b", "a += b")],
    "dropped term": [
        ("return (a + b) * c", "return (a + b)"),
        ("return (a + b) * c", "return c"),
        ("return (a + b) * c", "return (a) * c"),
        ("a += b", "pass"),
        ("return x**2", "return x"),
        ("return a & b", "return b"),
    ],
    "comparison": [
        ("return a < b", "return a <= b"),
        ("return a is  not None", "return a is None"),
        ("return a < b <= c", "return a < b < c"),
        ("return a not in b", "return a in b"),
    ],
    "off by one": [("return x[0]", "return x[1]"), ("f(n, start=1)", "f(n, start=2)")],
    "swapped operands": [
        ("return a - b - c", "return ((c) - (a - b))"),
        ("return a / (b + c)", "return (((b + c)) / (a))"),
        ("f(a, b, c)", "f(b, a, c)"),
        ("f((a), (b + c))", "f((b + c), (a))"),
    ],
    "negated condition": [
        ("if a:\n        f()", "if (not (a)):\n        f()"),
        ("return [x for x in a if x]", "return [x for x in a if (not (x))]"),
        ("return b if a else c", "return b if (not (a)) else c"),
        ("return not a", "return (a)"),
    ],
    "dropped statement": [("f(a)", "pass"), ("a.b = c", "pass"), ("a[0] = c", "pass")],
    "dropped condition": [
        ("return a and (b) and c", "return (b) and c"),
        ("return a and (b) and c", "return a and (b)"),
    ],
    "flag": [("return True", "return False"), ("f(a, keep=False)", "f(a, keep=True)")],
    "and, or": [("return a and (b)", "return a or (b)"), ("return a & b", "return a | b")],
    "operator": [("return a * b", "return a / b")],
}
ALONE = [
    '"""Return 1."""',
    "assert a > 1, 'no'",
    "raise ValueError('a' + f'{a - 1}')",
    "if a:\n        b = 1\n        raise ValueError(b)",
    "_log.info('%d', 1)",
    "a: dict[str, int | None]",
    "return isinstance(a, int | str)",
    "return zip(*a, strict=True)",
    "return f'{a + 1}'",
    "return '1' + a",
]


def _function(body: str) -> str:
    return f"def g(a: int | None, *, b: bool) -> int | str:\n    {body}\n"


def test_every_rule_has_its_examples() -> None:
    """And a room's name is its own."""
    assert set(SAID) == set(RULES)
    assert len({room.name for room in ROOMS}) == len(ROOMS)


@pytest.mark.parametrize(
    ("rule", "before", "after"), [(rule, *pair) for rule, pairs in SAID.items() for pair in pairs]
)
def test_a_rule_changes_what_it_says(rule: str, before: str, after: str) -> None:
    """Beside other rules' mutants of the same line."""
    source = _function(before)
    mutated = {change.apply(source) for change in changes(source) if change.rule == rule}
    assert _function(after) in mutated


@pytest.mark.parametrize("body", ALONE)
def test_what_is_no_behaviour_is_left_alone(body: str) -> None:
    """A check that is removed is another matter than its message."""
    rules = {change.rule for change in changes("LIMIT = 10\n" + _function(body))}
    assert rules <= {"removed check"}


def test_positions_are_right_behind_letters_of_several_bytes() -> None:
    """Python counts columns in bytes."""
    source = "def g(β, ε):\n    return β - ε  # −\n"
    (change,) = (c for c in changes(source) if c.rule == "sign")
    assert change.line == 2
    assert change.lines(source) == ("return β - ε # −", "return β + ε # −")


def test_every_file_of_ours_that_a_room_names_exists() -> None:
    """Patterns that match nothing, and tests that are not there, are mistakes of rooms.py."""
    root = Path(__file__).parents[2]
    rooms = {room.name for room, _ in files(root)}
    assert rooms == {room.name for room in ROOMS}
    patterns = [pattern for room in ROOMS for pattern in room.files]
    assert [p for p in patterns if not list((root / "src/batchnorm").glob(p))] == []
    tests = {test for room in ROOMS for run in room.runs for test in run.tests}
    assert [test for test in sorted(tests) if not (root / test).exists()] == []


def test_every_file_is_tried_with_some_tests() -> None:
    """A run may be for some files of its room only."""
    untried = [
        file for room, file in files(Path(__file__).parents[2]) if not any(r.tries(file) for r in room.runs)
    ]
    assert untried == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with two functions, one of which is tested."""
    root = tmp_path / "root"
    (root / "src").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "src/sums.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef less(a, b):\n    return a - b\n"
    )
    (root / "tests/test_sums.py").write_text(
        "import sums\n\n\ndef test_none():\n    pass\n\n\ndef test_add():\n    assert sums.add(3, 2) == 5\n"
    )
    return root


def _mutants(root: Path) -> list[Mutant]:
    room = Room("sums", ("sums.py",), (Run(("tests/test_sums.py",)),))
    source, file = (root / "src/sums.py").read_text(), Path("src/sums.py")
    return [Mutant(room, file, c, *c.lines(source)) for c in changes(source) if c.rule == "sign"]


def test_a_mutant_is_caught_by_the_test_that_it_breaks(tree: Path, tmp_path: Path) -> None:
    """One that no test runs survives; the repository itself is never changed."""
    before = (tree / "src/sums.py").read_text()
    place = copy(tree, tmp_path)
    found = []
    for mutant in _mutants(tree):
        mutate(mutant, tree, place)
        found.append(run_room(mutant.room, None, place, 60.0, threading.Event()).by)
    assert found == ["tests/test_sums.py::test_add", "survived"]
    assert (tree / "src/sums.py").read_text() == before
    mutate(None, tree, place)
    assert (place / "src/sums.py").read_text() == before


def test_a_sample_is_the_same_for_the_same_seed(tree: Path) -> None:
    """And another, sooner or later, for another one."""
    everything = [dataclasses.replace(mutant, room=ROOMS[0]) for mutant in _mutants(tree)]
    chosen = [sample(tree, everything, [ROOMS[0]], 1, seed) for seed in [*range(20), *range(20)]]
    assert chosen[:20] == chosen[20:]
    assert {mutants[0].change.line for mutants in chosen} == {2, 6}


@pytest.mark.parametrize(
    ("code", "output", "said"),
    [
        (0, "1 passed", "survived"),
        (1, "FAILED tests/a.py::test[x-1] - assert 1 == 2\n1 failed", "tests/a.py::test[x-1]"),
        (2, "ERROR tests/a.py - NameError: a", "collection fails: tests/a.py"),
        (4, "ImportError while loading conftest", "conftest fails"),
        (-signal.SIGSEGV, "", "crash, by SIGSEGV"),
        (None, "", "timeout"),
    ],
)
def test_the_verdict_says_how_a_mutant_was_caught(code: int | None, output: str, said: str) -> None:
    """By a test's name, if one failed."""
    assert verdict(code, output) == said


def test_no_tests_at_all_are_no_verdict() -> None:
    """They would pass for a mutant that is caught."""
    with pytest.raises(ValueError, match="no tests"):
        verdict(5, "no tests ran")


def test_another_run_is_compared_by_the_text_of_the_change(tree: Path) -> None:
    """Lines may have moved between the two."""
    add, less = _mutants(tree)
    then = [row(add, CAUGHT, "a", 1.0), row(less, CAUGHT, "b", 1.0)]
    now = [row(add, CAUGHT, "a", 1.0), dataclasses.replace(row(less, SURVIVED, "", 1.0), line=99)]
    assert share(now) == 0.5
    text = comparison(now, then)
    assert text.startswith("1 of 2")
    assert "return a - b" in text
    assert "return a + b\n    +" not in text
