"""What decides about money has no floats, and no order that depends on a hash: read off the core's own source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUMERIC = {"sampling.py", "transcript.py", "verdicts.py"}
"""The model's numbers: log-probabilities, noise and projections are floats by nature, and their bits are signed. What a
verdict is made of is rounded to whole units where it enters (`scaled_up`)."""

OUTSIDE = {"price_sheets.py"}
"""Other platforms' prices are decimal fractions of a dollar. They are read as they are written and computed with as
fractions, so `Decimal` and the division of fractions are exact there; floats and `round` are forbidden as elsewhere."""

CORE = sorted([*ROOT.glob("protocol/*.py"), *ROOT.glob("incentives/*.py")])
MONEY = [path for path in CORE if path.name not in NUMERIC]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def floats(tree: ast.AST, *, exact: bool = False) -> Iterator[ast.AST]:
    """Float literals, `float` and `round`; and unless the module is `exact`, true division and `Decimal`."""
    words = ("float", "round") if exact else ("float", "round", "Decimal")
    for node in ast.walk(tree):
        literal = isinstance(node, ast.Constant) and isinstance(node.value, float | complex)
        divided = not exact and isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div)
        named = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in words
        by_name = isinstance(node, ast.Attribute) and node.attr in ("sqrt", "log", "exp", "pow")
        if literal or divided or named or by_name:
            yield node


def unordered(tree: ast.AST) -> Iterator[ast.AST]:
    """Loops over a set, or `hash`, whose order differs from one process to the next."""
    for node in ast.walk(tree):
        looped = node.iter if isinstance(node, ast.For | ast.comprehension) else None
        called = isinstance(looped, ast.Call) and isinstance(looped.func, ast.Name) and looped.func.id
        if isinstance(looped, ast.Set | ast.SetComp) or called in ("set", "frozenset"):
            yield looped or node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hash":
            yield node


def places(found: Iterator[ast.AST]) -> list[int]:
    return [getattr(node, "lineno", 0) for node in found]


def test_the_core_was_found() -> None:
    assert {"tariff.py", "work.py", "channel.py", "selection.py", "settlement.py"} <= {path.name for path in MONEY}


@pytest.mark.parametrize("path", MONEY, ids=name)
def test_no_float_decides_about_money(path: Path) -> None:
    assert places(floats(ast.parse(path.read_text()), exact=path.name in OUTSIDE)) == []


@pytest.mark.parametrize("path", CORE, ids=name)
def test_no_order_depends_on_a_hash(path: Path) -> None:
    assert places(unordered(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "source", ["x = 0.5", "x = a / b", "x = float(a)", "x = round(a)", "a /= 2", "x = math.sqrt(a)"]
)
def test_the_search_finds_floats(source: str) -> None:
    assert places(floats(ast.parse(source)))


@pytest.mark.parametrize("source", ["x = 0.5", "x = Decimal(0.1)", "x = float(a) / b", "x = round(a)"])
def test_the_search_finds_floats_among_fractions(source: str) -> None:
    assert places(floats(ast.parse(source), exact=True))


@pytest.mark.parametrize("source", ["for x in {1, 2}: pass", "[x for x in set(a)]", "x = hash(a)"])
def test_the_search_finds_unordered_loops(source: str) -> None:
    assert places(unordered(ast.parse(source)))


def test_the_readme_names_tests_that_exist() -> None:
    """Each invariant says where it is checked; a renamed test takes its line with it."""
    readme = (ROOT / "incentives" / "README.md").read_text()
    table = readme[readme.index("## Invariants") :]
    numbers = re.findall(r"^\| I(\d+) \|", table, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    for row in table.splitlines():
        if not row.startswith("| I"):
            continue
        cited = re.findall(r"`([\w./]+)`", row.rsplit("|", 2)[1])
        files = [word if "/" in word else f"tests/incentives/{word}" for word in cited if word.endswith(".py")]
        source = "".join((ROOT / file).read_text() for file in files)
        names = [part for word in cited if not word.endswith(".py") for part in word.split(".")]
        assert files and all(re.search(rf"(def|class) {part}\b", source) for part in names), row
