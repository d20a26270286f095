"""Foreign price sheets: exact to the last digit, rounded up once, and skipped by name where they make no sense."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.price_sheets import (
    OutsideUsage,
    SheetError,
    UsdPrices,
    cost_up,
    parse_sheet,
    usd_cost,
    wei_prices,
    wei_up,
)
from protocol.units import WEI_PER_TALLY


def row(name: str = "meta/llama", **changes: Any) -> dict[str, Any]:
    """A row as OpenRouter writes it."""
    pricing = {"prompt": "0.00000015", "completion": "0.0000006", "request": "0", "image": "0.001", "web_search": "0"}
    made = {
        "id": name,
        "name": "Meta: Llama",
        "context_length": 131072,
        "pricing": pricing,
        "top_provider": {"context_length": 131072, "max_completion_tokens": 16384, "is_moderated": False},
    }
    return {**made, **changes}


def sheet(*rows: Any) -> bytes:
    return json.dumps({"data": list(rows)}).encode()


def test_a_sheet_is_read_as_it_is_written() -> None:
    read = parse_sheet(sheet(row()), "https://openrouter.ai/api/v1/models", 7)
    (model,) = read.models
    assert (read.source, read.read_at, read.skipped) == ("https://openrouter.ai/api/v1/models", 7, ())
    assert (model.id, model.name, model.context, model.max_output) == ("meta/llama", "Meta: Llama", 131072, 16384)
    assert model.usd == UsdPrices(*map(Decimal, ("0.00000015", "0.0000006", "0", "0.00000015", "0.0000006")))
    assert model.extra == (("image", "0.001"),)
    assert read.model("meta/llama") is model and read.model("Meta/llama") is None


def test_cached_and_reasoning_prices_where_they_are_stated() -> None:
    pricing = {"prompt": "0.000001", "completion": "0.000002", "input_cache_read": "0.0000001"}
    stated = parse_sheet(sheet(row(pricing={**pricing, "internal_reasoning": "0.000003"})), "", 0).models[0].usd
    assert (stated.cached, stated.reasoning) == (Decimal("0.0000001"), Decimal("0.000003"))
    zero = parse_sheet(sheet(row(pricing={**pricing, "internal_reasoning": "0"})), "", 0).models[0].usd
    assert zero.reasoning == zero.completion, "no platform gives its reasoning away"
    free = parse_sheet(sheet(row(pricing={**pricing, "input_cache_read": "0"})), "", 0).models[0].usd
    assert free.cached == 0


def test_numbers_that_are_no_strings_keep_their_digits() -> None:
    raw = b'{"data":[{"id":"m","pricing":{"prompt":0.1,"completion":2e-7}}]}'
    usd = parse_sheet(raw, "", 0).models[0].usd
    assert (usd.prompt, usd.completion) == (Decimal("0.1"), Decimal("0.0000002"))


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row("bad", pricing={"prompt": "-1", "completion": "-1"}), "not fixed"),
        (row("bad", pricing={"prompt": "0.1"}), "no price per token"),
        (row("bad", pricing=None), "no pricing"),
        (row("bad", pricing={"prompt": "NaN", "completion": "1"}), "no decimal"),
        (row("bad", pricing={"prompt": "1e99", "completion": "1"}), "out of range"),
        (row("bad", pricing={"prompt": "1e-99", "completion": "1"}), "out of range"),
        (row("bad", pricing={"prompt": True, "completion": "1"}), "no decimal"),
        (row("meta/llama", pricing={"prompt": "9", "completion": "9"}), "twice"),
        (row(""), "no id"),
        (17, "no id"),
    ],
)
def test_what_makes_no_sense_is_skipped_and_named(bad: Any, why: str) -> None:
    read = parse_sheet(sheet(row(), bad), "", 0)
    assert [model.id for model in read.models] == ["meta/llama"]
    ((_, said),) = read.skipped
    assert why in said


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"data":{}}', b'{"data":[]}', b"\xff", sheet(17), b"[" * 100_000])
def test_what_is_no_sheet_is_refused(raw: bytes) -> None:
    with pytest.raises(SheetError):
        parse_sheet(raw, "", 0)


def test_usd_in_wei() -> None:
    assert wei_up(Decimal("0.0000006"), Decimal("0.5")) == 1_200_000_000_000
    assert wei_up(Decimal(1), Decimal(3)) == WEI_PER_TALLY // 3 + 1, "up, so that nothing outside looks cheaper"
    assert wei_up(Decimal(0), Decimal(3)) == 0
    for rate in ("0", "-1", "NaN", "Infinity"):
        with pytest.raises(ValueError, match="rate"):
            wei_up(Decimal(1), Decimal(rate))


price = st.decimals(min_value=0, max_value=Decimal("0.01"), places=12)
rate = st.decimals(min_value=Decimal("0.000001"), max_value=100_000, places=6)
usages = st.integers(0, 10**6).flatmap(
    lambda n: st.builds(OutsideUsage, st.just(n), st.integers(500, 10**6), st.integers(0, n), st.integers(0, 500))
)


@given(st.builds(UsdPrices, price, price, price, price, price), usages, rate)
def test_a_job_is_rounded_up_once_and_by_less_than_a_wei(
    usd: UsdPrices, usage: OutsideUsage, tally_usd: Decimal
) -> None:
    exact = Fraction(usd_cost(usd, usage)) / Fraction(tally_usd) * WEI_PER_TALLY
    assert 0 <= cost_up(usd, usage, tally_usd) - exact < 1
    prices = wei_prices(usd, tally_usd)
    by_token = (
        (usage.prompt - usage.cached) * prices.prompt
        + usage.cached * prices.cached
        + (usage.completion - usage.reasoning) * prices.completion
        + usage.reasoning * prices.reasoning
        + prices.request
    )
    assert by_token >= cost_up(usd, usage, tally_usd), "prices rounded one by one are never below the job's"


def test_counts_that_do_not_fit_together_are_refused() -> None:
    usd = UsdPrices(*[Decimal("0.1")] * 5)
    for usage in (OutsideUsage(1, 1, 2, 0), OutsideUsage(1, 1, 0, 2), OutsideUsage(1, 1, -1, 0)):
        with pytest.raises(ValueError, match="fit together"):
            cost_up(usd, usage, Decimal(1))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=9),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(st.sampled_from(["data", "id", "pricing", "prompt", "completion"]), x, max_size=4)
        ),
    )
)
def test_any_json_is_a_sheet_or_one_error(value: Any) -> None:
    try:
        parse_sheet(json.dumps(value).encode(), "", 0)
    except SheetError:
        pass
