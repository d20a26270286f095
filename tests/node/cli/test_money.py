"""Amounts are printed exactly, and read back as what they were."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.cli import money
from node.cli.tables import short, table
from node.config_values import price, tally


@pytest.mark.parametrize(
    ("wei", "text"),
    [(0, "0"), (10**18, "1"), (15 * 10**17, "1.5"), (1, "0.000000000000000001"), (-(10**17), "-0.1"), (10**20, "100")],
)
def test_examples(wei: int, text: str) -> None:
    assert money.tally(wei) == text


@pytest.mark.parametrize(
    ("wei", "text"),
    [(0, "0"), (94_753_466_872_110_940, "0.0947535"), (10**18 + 1, "1.00001"), (999_999_900, "0.000000001")],
)
def test_compared_figures_are_rounded_up(wei: int, text: str) -> None:
    assert money.rounded_up(wei) == text


@given(st.integers(0, (1 << 96) - 1))
def test_rounding_up_is_close_and_never_down(wei: int) -> None:
    with localcontext(prec=60):
        shown = Decimal(money.rounded_up(wei)) * 10**18
        assert wei <= shown <= wei + wei * Decimal("0.00001")


@given(st.integers(0, (1 << 96) - 1))
def test_what_is_printed_is_exact(wei: int) -> None:
    text = money.tally(wei)
    with localcontext(prec=60):
        assert Decimal(text) * 10**18 == wei
    assert "E" not in text and not ("." in text and text.endswith("0"))
    assert tally.parse(text) == wei


@given(st.integers(0, 10**21))
def test_a_price_reads_back(wei: int) -> None:
    assert price.parse(money.per_million(wei)) == wei


def test_tables_line_up() -> None:
    text = table(("NAME", ">COST"), [("a", "1"), ("longer", "10.5")])
    assert text.splitlines() == ["NAME    COST", "a          1", "longer  10.5"]
    assert short("0x1234567890ab") == "0x12345678…" and short("0x12") == "0x12"
