"""`tally provider economics`: from the journal and the settings, for the owner of the home alone."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from incentives.ledger import Role
from node.books import activity
from node.routes import journal_routes, market_routes
from node.store.store import SqlStore
from protocol.bundle import Bundle
from tests.incentives.trade import DOMAIN, PAYERS, last, sell
from tests.node.cli.conftest import Tally
from tests.node.cli.shop import furnish_shop
from tests.node.gateway import cards
from tests.twins.chain_lab import MemoryLab
from tests.twins.fake_marketplace import FakeMarketplace

HOUR_MS = 3_600_000


@pytest.fixture
def sold(home: Path) -> list[Bundle]:
    """Jobs of two hours ago: two at the same time, one later; and one of ten days ago."""
    now = time.time_ns() // 1_000_000
    begin = now - 2 * HOUR_MS
    bundles = [
        sell(at=now - 240 * HOUR_MS, nonce=0),
        sell(at=begin, nonce=1, tokens=64, tpot_ms=50, cached=64, before=10**9),
        sell(at=begin, nonce=2, tokens=64, tpot_ms=50, payer=PAYERS[1]),
        sell(at=begin + HOUR_MS, nonce=3, tokens=32, tpot_ms=50, payer=PAYERS[2]),
    ]
    furnish_shop(home, Role.PROVIDER, bundles)
    return bundles


def settings(home: Path, text: str) -> None:
    (home / "config.toml").write_text(text)


COSTS = """
[economics]
currency = "EUR"
watts_idle = 100
watts_busy = 400
price_per_kwh = 0.30
hardware_price = 1752
lifetime = "1095d"
tally_rate = "0.5"
"""


def asked(tally: Tally, *args: str) -> dict[str, Any]:
    result = tally("provider", "economics", "--json", *args)
    assert result.exit_code == 0, result.output
    out: dict[str, Any] = json.loads(result.stdout)
    return out


def test_the_sums_of_a_period(tally: Tally, home: Path, sold: list[Bundle]) -> None:
    settings(home, COSTS)
    out = asked(tally, "--since", "1d")
    recent = sold[1:]
    assert (out["jobs"], out["whole"], out["currency"]) == (3, True, "EUR")
    assert out["revenue_wei"] == str(sum(last(bundle).total for bundle in recent))
    assert out["ste_micro"] == sum(last(bundle).ste_micro for bundle in recent)
    assert (out["prompt_tokens"], out["cached_tokens"], out["completion_tokens"]) == (300, 64, 160)
    assert out["cached_bps"] == 64 * 10_000 // 300
    # two jobs at once keep the machine busy once
    assert out["busy_ms"] == sum(last(b).finished_at - last(b).received_at for b in (recent[0], recent[2]))
    day = 24 * HOUR_MS
    assert out["period_ms"] == day
    watt_ms = 100 * (day - out["busy_ms"]) + 400 * out["busy_ms"]
    assert out["energy"] == str(-(-watt_ms * 300_000_000_000 // 3_600_000_000))
    assert out["depreciation"] == str(1_600_000_000_000)
    assert int(out["break_even_wei"]) > int(out["revenue_per_ste_wei"]) and int(out["profit"]) < 0


def test_the_period_begins_with_the_first_job_known(tally: Tally, home: Path, sold: list[Bundle]) -> None:
    out = asked(tally, "--since", "60d")
    assert out["jobs"] == 4 and abs(out["period_ms"] - 240 * HOUR_MS) < HOUR_MS


def test_the_report_is_readable_and_says_what_is_missing(tally: Tally, home: Path, sold: list[Bundle]) -> None:
    bare = tally("provider", "economics", "--since", "1d").stdout
    assert "set economics.tally_rate" in bare and "profit" not in bare and "cost          0 EUR" in bare
    settings(home, COSTS)
    text = tally("provider", "economics", "--since", "1d").stdout
    assert "depreciation  1.6 EUR" in text and "break-even" in text and "21.33 % cache hits" in text
    amounts = re.findall(r"-?([0-9.]+) (?:EUR|TALLY an STE)", text)
    assert len(amounts) > 6 and all(len(amount.replace(".", "").lstrip("0")) <= 6 for amount in amounts), amounts
    assert tally("provider", "economics", "--since", "soon").exit_code == 2


def test_a_home_without_a_journal_says_so(tally: Tally, home: Path) -> None:
    result = tally("provider", "economics")
    assert result.exit_code == 1 and "no journal" in result.stderr


def test_nothing_sold_costs_all_the_same(tally: Tally, home: Path) -> None:
    furnish_shop(home, Role.PROVIDER, [])
    settings(home, COSTS)
    out = asked(tally, "--since", "10h")
    assert (out["jobs"], out["energy"], out["break_even_wei"]) == (0, str(300_000_000_000), None)


async def test_neither_the_gateway_nor_a_clients_journal_tells_it(tmp_path: Path) -> None:
    store = SqlStore(tmp_path / "journal.db")
    await store.open()
    routes = {
        **journal_routes(store, DOMAIN),
        **market_routes(FakeMarketplace(cards.card()), await MemoryLab().node(None)),
    }
    assert "activity" not in routes
    found, whole = await activity(store, 0, 1_000, 4)
    assert (found.jobs, found.period_ms, whole) == (0, 1_000, True)
    await store.close()


@pytest.mark.parametrize("text", ["price_per_kwh = -1", 'tally_rate = "1e3"', "watts_idle = 1.5", 'lifetime = "0d"'])
def test_settings_that_cannot_be_are_refused_by_name(tally: Tally, home: Path, text: str) -> None:
    settings(home, f"[economics]\n{text}\n")
    result = tally("provider", "economics")
    assert result.exit_code == 1 and f"economics.{text.split()[0]}" in result.stderr
