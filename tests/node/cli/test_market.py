"""The market's table: offers compared over the basket, one job priced everywhere, outside sheets beside them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from incentives.basket import Prices, job_up, measured, mix_ste_micro, ste_up, text_up, tokens_up
from incentives.price_sheets import parse_sheet
from incentives.reference_text import TEXTS
from node.cli.market_rows import Row, Wanted, factor, lend_counts, offer_row, outside_row, sorted_by
from node.config import NodeConfig
from node.gateway.vocabulary import load_vocabulary
from node.ports import MarketEntry
from protocol.metering import Usage
from protocol.tariff import MULTIPLIER_ONE
from protocol.units import Address, Digest, Tier, Verifiability
from tests.node.cli.conftest import Tally
from tests.node.gateway import cards
from tests.twins import fake_marketplace
from tests.twins.chain_lab import MemoryLab
from tests.twins.fake_marketplace import FakeMarketplace

OTHER = Address(b"\xbb" * 20)
CARD = replace(cards.card(), profile=replace(cards.card().profile, body_parameters=10**9, head_parameters=10**8))


def count(text: str) -> int:
    vocabulary = load_vocabulary(CARD.tokenizer_json, CARD.eos_ids, "test")
    return len(vocabulary.decoder.encode(text, add_special_tokens=False).ids)


class Two(FakeMarketplace):
    """Two offers of one profile: the second is dearer, at a raised base multiplier, and promises its first token."""

    async def market(self) -> list[MarketEntry]:
        (first,) = await super().market()
        first = replace(first, profile=CARD.profile_id)
        sheet = replace(
            first.tariff, provider=OTHER, prompt_price=40, completion_price=50, base_max_bps=20_000, flex_bps=0,
            standard_ttft_ms=900, priority_bps=15_000,
        )  # fmt: skip
        dearer = replace(first, provider=OTHER, tariff=sheet, base_bps=12_500, verifiability=Verifiability.LOGPROB)
        return [dearer, first]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = MemoryLab()

    async def refresh() -> None:
        pass

    @asynccontextmanager
    async def client_app(config: NodeConfig) -> AsyncIterator[Any]:
        parts = {"marketplace": Two(CARD), "chain": await lab.node(None), "directory": SimpleNamespace(refresh=refresh)}
        yield SimpleNamespace(**parts)

    monkeypatch.setattr("node.app.client_app", client_app)


def shown(tally: Tally, *args: str) -> list[dict[str, Any]]:
    result = tally("market", *args, "--json")
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def test_figures_are_the_baskets_over_the_offers_own_card(tally: Tally, client: None) -> None:
    rows = {row["provider"]: row for row in shown(tally)}
    row = rows["0x" + OTHER.hex()]
    prices = Prices(40, 1, 50, 5, 1, MULTIPLIER_ONE * 5 // 4)
    assert row["per_million_mix"] == str(tokens_up(prices))
    assert row["per_ste"] == str(ste_up(prices, mix_ste_micro(CARD.profile)))
    assert row["per_megabyte"] == str(text_up(prices, measured([count(text) for _, text in TEXTS])))
    assert row["per_million"] == {
        "prompt": "50000000",
        "cached": "1250000",
        "output": "62500000",
        "reasoning": "6250000",
    }
    assert (row["verifiability"], row["base_bps"], row["ttft_ms"], row["job"]) == ("logprob", 12_500, 900, None)


def test_cheapest_work_first_and_the_soonest_when_asked(tally: Tally, client: None) -> None:
    cheap, dear = "0x" + fake_marketplace.PROVIDER.hex(), "0x" + OTHER.hex()
    assert [row["provider"] for row in shown(tally)] == [cheap, dear]
    for key in ("tokens", "text", "ste"):
        assert [row["provider"] for row in shown(tally, "--sort", key)] == [cheap, dear]
    # 0 ms is no promise, so it is not the soonest
    assert [row["provider"] for row in shown(tally, "--sort", "ttft")] == [dear, cheap]


def test_one_job_is_priced_at_every_offer(tally: Tally, client: None) -> None:
    rows = {row["provider"]: row for row in shown(tally, "--job", "1000:200:600", "--tier", "priority")}
    raised = Prices(40, 1, 50, 5, 1, MULTIPLIER_ONE * 5 // 4 * 3 // 2)
    assert rows["0x" + OTHER.hex()]["job"] == str(job_up(raised, Usage(1_000, 600, 200, 0)))
    plain = rows["0x" + fake_marketplace.PROVIDER.hex()]
    assert plain["job"] == str(400 * 2 + 600 * 1 + 200 * 5 + 1) and plain["job_tokens"] == [1_000, 200, 600]


def test_a_text_is_counted_by_the_offers_own_tokenizer(tally: Tally, client: None, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog <|im_end|>"
    (tmp_path / "q.txt").write_text(text)
    row = shown(tally, "--prompt", str(tmp_path / "q.txt"), "--max-tokens", "7")[0]
    assert row["job_tokens"] == [count(text), 7, 0] and row["job"] == str(count(text) * 2 + 7 * 5 + 1)


def test_a_tier_without_a_price_and_a_job_that_does_not_fit(tally: Tally, client: None) -> None:
    rows = {row["provider"]: row for row in shown(tally, "--tier", "flex", "--job", "10:10")}
    closed = rows["0x" + OTHER.hex()]
    assert closed["per_million"] is closed["per_ste"] is closed["job"] is None
    assert all(row["job"] is None for row in shown(tally, "--job", "4000:100"))
    lines = tally("market", "--tier", "flex").stdout.splitlines()
    assert lines[0].split()[:4] == ["MODEL", "SELLER", "PROMPT", "CACHED"] and " - " in lines[-1]


def test_the_table_says_what_the_figures_are(tally: Tally, client: None) -> None:
    head, first, second = tally("market", "--job", "10:10").stdout.splitlines()
    assert [name in head for name in ("/STE", "MIX", "/MB", "JOB", "BASE", "TTFT", "VERIFY")] == [True] * 7
    assert "x1.25" in second and "900 ms" in second and "logprob" in second and "x1 " in first


@pytest.mark.parametrize("job", ["", "10", "10:", "10:20:30:40", "a:b", "-1:5", "10:5:11", "99999999:1"])
def test_jobs_that_cannot_be(tally: Tally, client: None, job: str) -> None:
    assert tally("market", "--job", job).exit_code == 2


def test_a_prompt_that_cannot_be_counted(tally: Tally, client: None, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"a" * 160_001)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("large", "bytes", "nothing-there"):
        result = tally("market", "--prompt", str(tmp_path / name))
        assert result.exit_code == 1 and "Traceback" not in result.output
    assert tally("market", "--job", "1:1", "--prompt", str(tmp_path / "large")).exit_code == 2


def test_an_offer_whose_card_cannot_be_had_is_shown_without_its_figures(
    tally: Tally, client: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from node.ports import NoProvider

    async def card_of(self: FakeMarketplace, profile: Digest) -> Any:
        raise NoProvider("nobody gave it")

    monkeypatch.setattr(FakeMarketplace, "card_of", card_of)
    row = shown(tally)[0]
    assert row["per_ste"] is row["per_megabyte"] is None and row["per_million_mix"] is not None
    assert "?" in tally("market").stdout


# ------------------------------------------------------------------------------------------------------ outside sheets

SHEET = parse_sheet(
    json.dumps(
        {
            "data": [
                {
                    "id": "tally-test",
                    "context_length": 8_000,
                    "pricing": {"prompt": "0.0000001", "completion": "0.0000004", "input_cache_read": "0.00000001"},
                    "top_provider": {"max_completion_tokens": 1_000},
                }
            ]
        }
    ).encode(),
    "https://platform.example/api/v1/models",
    1_700_000_000,
)


def outside(wanted: Wanted, rate: str | None = None) -> Row:
    return outside_row(SHEET, SHEET.models[0], None if rate is None else Decimal(rate), wanted)


def test_an_outside_job_in_its_own_currency_and_at_a_rate() -> None:
    wanted = Wanted(Tier.STANDARD, 1_000, 500, 200)
    dollars = outside(wanted)
    assert (dollars.unit, dollars.seller) == ("USD", "platform.example")
    assert dollars.job == (500 * 10**11 + 500 * 10**10 + 200 * 4 * 10**11)
    at_rate = outside(wanted, "0.5")
    assert (at_rate.unit, at_rate.job) == ("TALLY", 2 * dollars.job)


def test_outside_limits_are_respected() -> None:
    assert outside(Wanted(Tier.STANDARD, 7_999, 0, 2)).job is None
    assert outside(Wanted(Tier.STANDARD, 1_000, 0, 1_001)).job is None
    assert outside(Wanted(Tier.STANDARD, 7_000, 0, 1_000)).job is not None


async def test_a_sheet_names_no_tokenizer_so_counts_are_lent_and_said_to_be() -> None:
    from node.routes import market_routes

    two = Two(CARD)
    route = market_routes(two, await MemoryLab().node(None), two.card_of)["market"]
    offers = (await route({"measure": True, "text": "hello world"}))["offers"]
    wanted = Wanted(Tier.STANDARD, output=5)
    own = [offer_row(offer, wanted) for offer in offers]
    *_, lent = lend_counts([*own, outside(wanted)])
    assert lent.estimated and lent.counted == own[0].counted and lent.prompt_tokens == count("hello world")
    assert not any(row.estimated for row in lend_counts(own))
    (alone,) = lend_counts([outside(wanted)])
    assert alone.per_megabyte is alone.job is None and not alone.estimated


async def test_another_currency_is_never_ranked_among_ours() -> None:
    from node.routes import market_routes

    two = Two(CARD)
    route = market_routes(two, await MemoryLab().node(None), two.card_of)["market"]
    wanted = Wanted(Tier.STANDARD)
    own = [offer_row(offer, wanted) for offer in (await route({"measure": True}))["offers"]]
    rows = lend_counts([outside(wanted), *own])
    for key in ("tokens", "text"):
        assert [row.unit for row in sorted_by(rows, key)] == ["TALLY", "TALLY", "USD"]
    converted = sorted_by(lend_counts([outside(wanted, "1000000000000"), *own]), "tokens")
    assert converted[0].seller == "platform.example"


@pytest.mark.parametrize(("bps", "text"), [(10_000, "x1"), (12_500, "x1.25"), (1, "x0.0001"), (0, "x0")])
def test_factors(bps: int, text: str) -> None:
    assert factor(bps) == text
