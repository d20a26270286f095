"""`tally tariff`: written, signed, logged on the chain's twin, and shown; nothing odd unsaid, no number used twice."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from node.config import NodeConfig
from node.tariff_sheet import read_signed
from protocol.eip712 import digest
from protocol.units import WEI_PER_TALLY, Digest
from tests.node.cli.conftest import Tally
from tests.node.cli.sticks import NODE, WALLET
from tests.node.cli.test_market import client as client
from tests.twins.chain_lab import LAB_OPTIONS, MemoryLab
from tests.twins.fake_marketplace import PROVIDER

PROFILE = "0x" + "ab" * 32


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch, furnished: Path) -> MemoryLab:
    """A chain in which this home's provider is registered, its time the machine's."""
    import asyncio
    import time

    lab = MemoryLab()
    lab.world.fund(WALLET.address, 1000 * WEI_PER_TALLY, 10**18)
    lab.world.advance(int(time.time()) - lab.world.head.state.timestamp)

    @asynccontextmanager
    async def wallet_chain(config: NodeConfig) -> AsyncIterator[Any]:
        node = await lab.node(WALLET)
        yield node, WALLET
        await node.stop()

    async def register() -> None:
        node = await lab.node(WALLET)
        await node.register_provider(NODE.secret, LAB_OPTIONS.min_stake)

    asyncio.run(register())
    monkeypatch.setattr("node.app.wallet_chain", wallet_chain)
    return lab


def sheet(tally: Tally, where: Path, *changes: str) -> Path:
    args = [word for change in changes for word in ("--set", change)]
    result = tally("tariff", "new", "-o", str(where), *args)
    assert result.exit_code == 0, result.output
    return where


def signed(tally: Tally, tmp_path: Path, *args: str) -> Path:
    made = sheet(tally, tmp_path / "sheet.json")
    out = tmp_path / "signed.json"
    result = tally("tariff", "sign", str(made), "-o", str(out), "--profile", PROFILE, *args)
    assert result.exit_code == 0, result.output
    return out


# ----------------------------------------------------------------------------------------------------------------- new


def test_a_new_sheet_has_every_field_from_the_settings(tally: Tally, home: Path) -> None:
    (home / "config.toml").write_text('[provider]\nprompt_price = "0.07"\ncache_ttl = 600\n')
    result = tally("tariff", "new", "--set", "tiers.priority.factor=2", "--set", "base.max=3")
    out = json.loads(result.stdout)
    assert out["prices"]["prompt"] == "0.07" and out["cache_ttl_s"] == 600
    assert out["tiers"]["priority"]["factor"] == "2" and out["base"]["max"] == "3"
    assert out["sequence"] is out["valid_from"] is out["provider"] is None


def test_a_file_in_toml_stands_above_the_settings_and_flags_above_it(tally: Tally, tmp_path: Path) -> None:
    (tmp_path / "part.toml").write_text('privacy_factor = 1.5\n[prices]\ncompletion = "0.9"\nprompt = 0.2\n')
    result = tally("tariff", "new", "--from", str(tmp_path / "part.toml"), "--set", "prices.prompt=0.3")
    out = json.loads(result.stdout)
    assert (out["prices"]["prompt"], out["prices"]["completion"], out["privacy_factor"]) == ("0.3", "0.9", "1.5")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("tiers.flex.factor=0", "the flex tier has no price and is not offered"),
        ("prices.cached=0.1", "a hit saves the payer nothing"),
        ("tiers.priority.factor=0.5", "the priority tier is cheaper than standard"),
        ("tiers.priority.refund=0", "promises times and gives nothing back"),
        ("prices.completion=0.05", "cheaper than prompt tokens"),
        ("prices.reasoning=0.1", "asked for as reasoning"),
        ("prices.embedding=0", "embeddings are free"),
        ("reserved_discount=1", "cost nothing"),
        ("base.min=2", "can never be x1"),
    ],
)
def test_odd_prices_are_pointed_out_and_written(tally: Tally, change: str, told: str) -> None:
    result = tally("tariff", "new", "--set", change)
    assert result.exit_code == 0 and told in result.stderr and json.loads(result.stdout)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("prices.cached=0.2", ("prices.cached", "at most prices.prompt")),
        ("prices.prompt=-1", ("prices.prompt", "TALLY per million tokens")),
        ("prices.prompt=0.0000000000001", ("prices.prompt", "at most 12 decimals")),
        ("prices.prompt=99999999", ("prices.prompt", "0 to 10000000 TALLY")),
        ("tiers.flex.factor=101", ("tiers.flex.factor", "factor")),
        ("tiers.standard.refund=1.5", ("tiers.standard.refund", "share from 0 to 1")),
        ("base.max=0.5", ("base.max", "base.min")),
        ("long_context.factor=90", ("the factors together", "100")),
        ("long_context.threshold=4294967296", ("long_context.threshold", "whole number")),
        ("tiers.flexible.factor=1", ("tiers.flexible.factor", "did you mean tiers.flex.factor")),
        ("prices.prompt", ("prices.prompt", "KEY=VALUE")),
        ("valid_until=abc", ("valid_until", "whole number")),
        ("provider=0x12", ("provider", "40 hexadecimal digits")),
    ],
)
def test_what_cannot_be_is_refused_by_field_and_bounds(tally: Tally, change: str, named: tuple[str, str]) -> None:
    extra = ("--set", "tiers.priority.factor=2") if "long" in change else ()
    result = tally("tariff", "new", "--set", change, *extra)
    assert result.exit_code == 1 and result.stdout == ""
    assert all(word in result.stderr for word in named), result.stderr


def test_a_sheet_that_offers_no_tier_is_refused(tally: Tally) -> None:
    changes = [word for tier in ("flex", "standard", "priority") for word in ("--set", f"tiers.{tier}.factor=0")]
    result = tally("tariff", "new", *changes)
    assert result.exit_code == 1 and "one tier at least" in result.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00", "a = ", "{" * 5_000, '{"format": "other/1"}', '"x"'])
def test_what_is_no_sheet_is_refused_and_nothing_signed(
    tally: Tally, chain: MemoryLab, tmp_path: Path, text: str
) -> None:
    (tmp_path / "odd.json").write_text(text)
    result = tally("tariff", "sign", str(tmp_path / "odd.json"), "--profile", PROFILE)
    assert result.exit_code == 1 and "price sheet" in result.stderr and "Traceback" not in result.output


def test_a_missing_key_is_named(tally: Tally, chain: MemoryLab, tmp_path: Path) -> None:
    tree = json.loads(sheet(tally, tmp_path / "s.json").read_text())
    del tree["prices"]["embedding"]
    (tmp_path / "s.json").write_text(json.dumps(tree))
    result = tally("tariff", "sign", str(tmp_path / "s.json"), "--profile", PROFILE)
    assert result.exit_code == 1 and "prices.embedding is missing" in result.stderr


# ---------------------------------------------------------------------------------------------------- sign and log


def test_signed_a_full_epoch_ahead_with_the_next_number(tally: Tally, chain: MemoryLab, tmp_path: Path) -> None:
    first = read_signed(signed(tally, tmp_path).read_text())
    assert (first.node_key, first.tariff.provider) == (NODE.address, WALLET.address)
    assert first.tariff.sequence == 1 and first.tariff.profile_id == bytes.fromhex(PROFILE[2:])
    assert first.tariff.valid_from >= chain.world.head.state.timestamp + LAB_OPTIONS.epoch_seconds
    assert first.tariff.valid_until == first.tariff.valid_from + 90 * 86_400
    # the number is used up whether or not the sheet is ever logged
    assert read_signed(signed(tally, tmp_path).read_text()).tariff.sequence == 2
    assert chain.world.head.state.tariffs == {}


def test_logged_once_told_when_and_adopted_nowhere(tally: Tally, chain: MemoryLab, tmp_path: Path) -> None:
    path = signed(tally, tmp_path)
    read = read_signed(path.read_text())
    asked = tally("tariff", "log", str(path), stdin="n\n")
    assert asked.exit_code == 130 and chain.world.head.state.tariffs == {}
    facts = json.loads(tally("tariff", "log", str(path), "--yes", "--json").stdout)
    assert facts["tariff_hash"] == "0x" + digest(chain.domain, read.tariff).hex() and facts["transaction"]
    assert list(chain.world.head.state.tariffs) == [digest(chain.domain, read.tariff)]
    again = tally("tariff", "log", str(path), "--yes")
    assert again.exit_code == 0 and "already" in again.stdout and "in force from" in again.stdout


def test_a_second_sheet_under_one_number_is_refused(tally: Tally, chain: MemoryLab, tmp_path: Path) -> None:
    path = signed(tally, tmp_path)
    assert tally("tariff", "log", str(path), "--yes").exit_code == 0
    read = read_signed(path.read_text())
    from node.tariff_sheet import SignedSheet, signed_text

    other = replace(read.tariff, prompt_price=read.tariff.prompt_price - 10**6)
    twin = SignedSheet(read.domain, read.node_key, other, NODE.sign(read.domain, other))
    path.write_text(signed_text(twin))
    before = chain.world.head.number
    result = tally("tariff", "log", str(path), "--yes")
    assert result.exit_code == 1 and "sequence 1" in result.stderr and "nothing was sent" in result.stderr
    assert chain.world.head.number == before


def test_a_sheet_that_nobody_signed_is_not_logged_and_says_why(tally: Tally, chain: MemoryLab, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.json"
    assert tally("tariff", "new", "-o", str(sheet)).exit_code == 0
    result = tally("tariff", "log", str(sheet), "--yes")
    assert result.exit_code == 1 and "no signed tariff; `tally tariff sign" in result.stderr


def test_a_sheet_that_came_too_late_is_not_sent(tally: Tally, chain: MemoryLab, tmp_path: Path) -> None:
    path = signed(tally, tmp_path)
    chain.world.advance(10_000)
    before = chain.world.head.number
    result = tally("tariff", "log", str(path), "--yes")
    assert result.exit_code == 1 and "may not before" in result.stderr and chain.world.head.number == before


def test_wait_returns_when_it_is_in_force(
    tally: Tally, chain: MemoryLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = signed(tally, tmp_path)
    start = read_signed(path.read_text()).tariff.valid_from
    looks = []

    async def sleep(seconds: float) -> None:
        looks.append(chain.world.head.state.timestamp)
        chain.world.advance(60)

    monkeypatch.setattr("node.cli.tariff.asyncio.sleep", sleep)
    assert tally("tariff", "log", str(path), "--yes", "--wait").exit_code == 0
    assert looks and all(moment < start for moment in looks) and chain.world.head.state.timestamp >= start


def test_a_changed_signed_sheet_is_no_sheet(tally: Tally, chain: MemoryLab, tmp_path: Path) -> None:
    path = signed(tally, tmp_path)
    text = path.read_text()
    for old, new in (('"sequence": "1"', '"sequence": "2"'), ('"prompt": "0.1"', '"prompt": "0.01"')):
        assert old in text
        path.write_text(text.replace(old, new))
        result = tally("tariff", "log", str(path), "--yes")
        assert result.exit_code == 1 and "price sheet" in result.stderr and chain.world.head.state.tariffs == {}


def test_another_wallets_or_numbers_sheet_is_not_signed(tally: Tally, chain: MemoryLab, tmp_path: Path) -> None:
    other = sheet(tally, tmp_path / "a.json", "provider=0x" + "cd" * 20)
    assert "this home's is" in tally("tariff", "sign", str(other), "--profile", PROFILE).stderr
    assert "--model DIR" in tally("tariff", "sign", str(sheet(tally, tmp_path / "b.json"))).stderr
    signed(tally, tmp_path)
    taken = sheet(tally, tmp_path / "c.json", "sequence=1")
    result = tally("tariff", "sign", str(taken), "--profile", PROFILE)
    assert result.exit_code == 1 and "sequence 1 is taken" in result.stderr


# ---------------------------------------------------------------------------------------------------------------- show


def test_shown_with_every_price_a_payer_can_meet(tally: Tally, tmp_path: Path) -> None:
    made = sheet(
        tally, tmp_path / "s.json", "long_context.factor=2", "privacy_factor=1.5", "tiers.flex.factor=0", "base.min=0.5"
    )
    out = json.loads(tally("tariff", "show", str(made), "--json").stdout)[0]
    rows = {(r["tier"], r["long"], r["private"], r["base_bps"]): r for r in out["per_million_wei"]}
    assert len(rows) == 2 * 2 * 2 * 3 and not any(tier == "flex" for tier, *_ in rows)
    # 0.1 TALLY x 1.5 (priority) x 2 x 1.5 x 2 (base)
    assert rows["priority", True, True, 20_000]["prompt_price"] == str(9 * WEI_PER_TALLY // 10)
    assert out["tariff_hash"] is None and out["sheet"]["tiers"]["flex"] is None
    text = tally("tariff", "show", str(made)).stdout
    assert "flex" in text and "not offered" in text and ">32768" in text and "private" in text and "0.9" in text


def test_shown_by_file_hash_and_provider(tally: Tally, chain: MemoryLab, tmp_path: Path, client: None) -> None:
    path = signed(tally, tmp_path)
    by_file = json.loads(tally("tariff", "show", str(path), "--json").stdout)[0]
    assert by_file["tariff_hash"] == "0x" + digest(chain.domain, read_signed(path.read_text()).tariff).hex()
    offers = json.loads(tally("tariff", "show", "0x" + PROVIDER.hex(), "--json").stdout)
    assert [item["tariff"]["provider"] for item in offers] == ["0x" + PROVIDER.hex()]
    by_hash = json.loads(tally("tariff", "show", offers[0]["tariff_hash"], "--json").stdout)
    assert by_hash == offers
    nobody = tally("tariff", "show", "0x" + "ee" * 32)
    assert nobody.exit_code == 1 and "no tariff of hash" in nobody.stderr


def test_a_hash_is_found_in_the_journal(tally: Tally, furnished: Path) -> None:
    from tests.node.cli.sticks import DOMAIN, TARIFF

    out = json.loads(tally("tariff", "show", "0x" + digest(DOMAIN, TARIFF).hex(), "--json").stdout)[0]
    assert out["source"] == "this home's journal" and out["tariff"]["sequence"] == str(TARIFF.sequence)


def test_the_profile_of_a_model_directory(tally: Tally, chain: MemoryLab, tmp_path: Path) -> None:
    from node.engine.profile import profile_of
    from protocol.eip712 import hash_struct

    model = Path(__file__).parents[3] / "devnet" / "model" / "tally-demo-4m"
    made = sheet(tally, tmp_path / "s.json")
    result = tally("tariff", "sign", str(made), "-o", str(tmp_path / "out.json"), "--model", str(model))
    assert result.exit_code == 0, result.output
    read = read_signed((tmp_path / "out.json").read_text())
    assert Digest(read.tariff.profile_id) == hash_struct(profile_of(model, "auto"))
