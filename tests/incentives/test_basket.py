"""Prices over the basket: one rounding, up, and never another number than the receipt's formula."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.basket import (
    MIX,
    Prices,
    job_up,
    measured,
    million_up,
    mix_ste_micro,
    prices_of,
    ste_up,
    text_up,
    tokens_up,
)
from incentives.reference_text import DIGEST, TEXT_BYTES, TEXTS
from protocol.errors import TierNotOffered
from protocol.messages import Tariff
from protocol.metering import Usage
from protocol.tariff import MULTIPLIER_ONE, Basis, Timing, cost_up
from protocol.units import BPS, JobKind, Tier
from tests.protocol.sheets import ON_SLOW_CPU, PROFILE, SHEET, bases, tariffs, usages

STE = mix_ste_micro(PROFILE)
amounts = st.one_of(st.integers(0, 10**6), st.integers(0, 10**19))
sheets = st.builds(Prices, amounts, amounts, amounts, amounts, amounts, st.integers(0, 100 * BPS**4))
tokens = st.tuples(*(st.integers(1, len(text.encode())) for _, text in TEXTS))


def test_the_reference_text_is_the_one_the_basket_is_named_for() -> None:
    assert DIGEST == "75031e512ef1c1dc54e0bce3639ef47e1d14d9522c24eba614bb66148e695f36"
    assert [kind for kind, _ in TEXTS] == ["english", "code", "json", "german", "chinese"]
    assert sum(len(text.encode()) for _, text in TEXTS) == TEXT_BYTES and all(len(t.encode()) > 480 for _, t in TEXTS)


@ON_SLOW_CPU
@given(st.data(), tariffs())
def test_a_jobs_price_is_what_its_receipt_will_say(data: st.DataObject, tariff: Tariff) -> None:
    basis = data.draw(bases(tariff).filter(lambda basis: basis.kind is not JobKind.EMBED))
    usage = data.draw(usages(st.integers(0, 10_000)))
    usage = replace(
        usage, completion=min(usage.completion, 10_000), reasoning=min(usage.reasoning, 10_000, usage.completion)
    )
    receipt = cost_up(tariff, usage, basis, Timing(0, 0, 0))
    assert job_up(prices_of(tariff, basis, usage.prompt), usage) == receipt.total


@given(sheets, tokens)
def test_every_figure_is_the_exact_one_rounded_up_once(prices: Prices, counts: tuple[int, ...]) -> None:
    exact = Fraction(prices.multiplier * (1_500 * prices.prompt + 500 * prices.output), MULTIPLIER_ONE)
    exact += prices.per_request
    text = measured(counts)
    assert tokens_up(prices) == ceil(exact * 500)
    assert ste_up(prices, STE) == ceil(exact * 10**6 / STE)
    assert text_up(prices, text) == ceil(exact / 2_000 * Fraction(text.total, TEXT_BYTES) * 10**6)
    assert million_up(prices.prompt, prices.multiplier) == ceil(
        Fraction(prices.prompt * prices.multiplier * 10**6, MULTIPLIER_ONE)
    )


@given(sheets, tokens, st.sampled_from(["prompt", "output", "per_request", "multiplier"]))
def test_a_higher_price_is_never_a_cheaper_offer(prices: Prices, counts: tuple[int, ...], name: str) -> None:
    dearer = replace(prices, **{name: getattr(prices, name) + 1})
    text = measured(counts)
    assert tokens_up(dearer) >= tokens_up(prices)
    assert ste_up(dearer, STE) >= ste_up(prices, STE)
    assert text_up(dearer, text) >= text_up(prices, text)


def test_a_coarser_tokenizer_makes_the_same_price_per_token_cheaper_text() -> None:
    prices = Prices(1_000, 100, 3_000, 3_000, 0)
    fine, coarse = measured([400] * 5), measured([200] * 5)
    assert text_up(prices, coarse) * 2 == text_up(prices, fine)
    assert tokens_up(prices) == 1_500_000_000


def test_a_larger_model_at_the_same_price_is_cheaper_work() -> None:
    prices = Prices(1_000, 100, 3_000, 3_000, 0)
    larger = replace(PROFILE, body_parameters=2 * PROFILE.body_parameters)
    assert ste_up(prices, mix_ste_micro(larger)) < ste_up(prices, STE)


def test_a_price_hidden_in_the_request_is_seen() -> None:
    cheap, hidden = Prices(10, 1, 30, 30, 0), Prices(0, 0, 0, 0, 30_000)
    assert tokens_up(cheap) == tokens_up(hidden) == 15_000_000


def test_multipliers_are_those_of_the_job() -> None:
    assert prices_of(SHEET, Basis(tier=Tier.PRIORITY), MIX.prompt).multiplier == 2 * MULTIPLIER_ONE
    assert prices_of(SHEET, Basis(), SHEET.long_context_threshold + 1).multiplier == MULTIPLIER_ONE * 3 // 2
    assert prices_of(SHEET, Basis(kind=JobKind.EMBED), 10).prompt == SHEET.embedding_price
    with pytest.raises(TierNotOffered):
        prices_of(replace(SHEET, flex_bps=0), Basis(tier=Tier.FLEX), 10)


@pytest.mark.parametrize("counts", [[], [1] * 4, [0, 1, 1, 1, 1], [10**6, 1, 1, 1, 1]])
def test_counts_that_cannot_be(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="token counts"):
        measured(counts)


def test_free_is_free() -> None:
    assert tokens_up(Prices(0, 0, 0, 0, 0)) == 0 and job_up(Prices(0, 0, 0, 0, 0), Usage(9, 0, 9, 0)) == 0
