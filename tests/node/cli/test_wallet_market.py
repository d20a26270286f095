"""The wallet on the chain's twin, and the market's table."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node.config import NodeConfig
from node.keys import save
from node.ports import ChainUnavailable
from protocol.units import WEI_PER_TALLY
from tests.node.cli.conftest import Tally
from tests.node.cli.sticks import NODE, SESSION, WALLET
from tests.node.gateway import cards
from tests.twins.chain_lab import LAB_OPTIONS, MemoryLab
from tests.twins.fake_marketplace import PROVIDER, FakeMarketplace

SELLER = "0x" + NODE.address.hex()


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> MemoryLab:
    """The wallet's chain, with 10 TALLY in the wallet."""
    lab = MemoryLab()
    lab.world.fund(WALLET.address, 10 * WEI_PER_TALLY, 10**18)

    @asynccontextmanager
    async def wallet_chain(config: NodeConfig) -> AsyncIterator[Any]:
        node = await lab.node(WALLET)
        yield node, WALLET
        await node.stop()

    monkeypatch.setattr("node.app.wallet_chain", wallet_chain)
    return lab


def test_show_has_chain_and_journal(furnished: Path, tally: Tally, chain: MemoryLab) -> None:
    facts = json.loads(tally("wallet", "show", "--json").stdout)
    assert facts["wallet"] == "0x" + WALLET.address.hex()
    assert (facts["balance_wei"], facts["stake_wei"], facts["earned_wei"]) == (str(10 * WEI_PER_TALLY), "0", "0")
    assert [channel["role"] for channel in facts["channels"]] == ["client"]
    text = tally("wallet", "show").stdout
    assert "balance    10 TALLY" in text and "PROMISED" in text


def test_show_without_a_chain_still_names_the_wallet(
    furnished: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def down(config: NodeConfig) -> AsyncIterator[Any]:
        raise ChainUnavailable("the RPC is down")
        yield

    monkeypatch.setattr("node.app.wallet_chain", down)
    result = tally("wallet", "show")
    assert result.exit_code == 0
    assert WALLET.address.hex() in result.stdout and "the RPC is down" in result.stdout


def test_deposit_exit_and_send(furnished: Path, tally: Tally, chain: MemoryLab) -> None:
    assert tally("wallet", "deposit", SELLER, "2.5", "--yes").exit_code == 0
    assert "exit of 2.5 TALLY" in tally("wallet", "withdraw", SELLER, "--yes").stderr
    early = tally("wallet", "withdraw", SELLER, "--yes")
    assert early.exit_code == 1 and "can be taken in" in early.stderr
    chain.world.advance(LAB_OPTIONS.exit_delay + 1)
    assert tally("wallet", "withdraw", SELLER, "--yes").exit_code == 0
    assert tally("wallet", "withdraw", SELLER, "--yes").exit_code == 1
    sent = json.loads(tally("wallet", "send", SELLER, "1.25", "--yes", "--json").stdout)
    assert sent["transaction"].startswith("0x") and sent["gas_wei"].isdecimal()
    assert json.loads(tally("wallet", "show", "--json").stdout)["balance_wei"] == str(8750 * WEI_PER_TALLY // 1000)


def test_money_is_not_moved_without_a_yes(furnished: Path, tally: Tally, chain: MemoryLab) -> None:
    before = chain.world.head.number
    asked = tally("wallet", "send", SELLER, "1.25", stdin="n\n")
    assert asked.exit_code == 130 and f"Send 1.25 TALLY to {SELLER}?" in asked.stderr
    assert chain.world.head.number == before


@pytest.mark.parametrize(
    ("amount", "code"), [("11", 1), ("0", 2), ("-1", 2), ("1e3", 2), ("0.0000000000000000001", 2), ("nan", 2)]
)
def test_amounts_that_cannot_be(furnished: Path, tally: Tally, chain: MemoryLab, amount: str, code: int) -> None:
    assert tally("wallet", "send", SELLER, "--yes", "--", amount).exit_code == code


def test_nothing_earned_is_said(furnished: Path, tally: Tally, chain: MemoryLab) -> None:
    result = tally("wallet", "collect")
    assert result.exit_code == 1 and "nothing is settled" in result.stderr


def test_a_key_is_made_once_and_taken_over_from_files(home: Path, tally: Tally, tmp_path: Path) -> None:
    (home / "password").write_text("correct horse\n")
    (home / "password").chmod(0o600)
    assert "there is no wallet" in tally("wallet", "show").stderr
    secret = SESSION.secret.hex()
    made = tally("wallet", "import", "-", stdin=f"0x{secret}\n")
    assert made.exit_code == 0 and SESSION.address.hex() in made.stdout and secret not in made.output
    again = tally("wallet", "create")
    assert again.exit_code == 1 and "a wallet already" in again.stderr
    (home / "keys" / "wallet.json").unlink()

    save(tmp_path / "other", "old", "another", NODE.secret, scrypt_n=1024)
    (tmp_path / "pw").write_text("another\n")
    (tmp_path / "pw").chmod(0o600)
    old = str(tmp_path / "other" / "old.json")
    assert tally("wallet", "import", old).exit_code == 1
    taken = tally("wallet", "import", old, "--file-password", str(tmp_path / "pw"), "--json")
    assert json.loads(taken.stdout) == {"wallet": SELLER}


@pytest.mark.parametrize("text", ["", "xyz", "00" * 32, "ab" * 31, "{}", "{"])
def test_what_is_no_key_is_refused(home: Path, tally: Tally, text: str) -> None:
    (home / "password").write_text("correct horse\n")
    (home / "password").chmod(0o600)
    result = tally("wallet", "import", "-", stdin=text)
    assert result.exit_code == 1 and not (home / "keys" / "wallet.json").exists()
    assert len(text) < 10 or text not in result.output


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> MemoryLab:
    """A client with one offer; PROVIDER is unknown to the chain until it is."""
    lab = MemoryLab()

    async def refresh() -> None:
        pass

    @asynccontextmanager
    async def client_app(config: NodeConfig) -> AsyncIterator[Any]:
        market = FakeMarketplace(cards.card())
        yield SimpleNamespace(
            marketplace=market, chain=await lab.node(None), directory=SimpleNamespace(refresh=refresh)
        )

    monkeypatch.setattr("node.app.client_app", client_app)
    return lab


def test_market_lists_offers_with_exact_prices(tally: Tally, client: MemoryLab) -> None:
    (offer,) = json.loads(tally("market", "--json").stdout)
    assert offer["provider"] == "0x" + PROVIDER.hex() and offer["stake_wei"] is None
    assert (offer["prompt_wei"], offer["completion_wei"]) == ("2", "5")
    text = tally("market").stdout
    assert "0.000000000005" in text and " ?" in text


def test_market_of_another_model_is_empty(tally: Tally, client: MemoryLab) -> None:
    result = tally("market", "--model", "nobody-has-this")
    assert result.exit_code == 0 and "no live offer" in result.stdout


def test_stake_is_shown_when_the_chain_knows_it(
    tally: Tally, client: MemoryLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    from node.ports import ProviderRecord
    from protocol.units import Address, Wei
    from tests.twins.memory_chain import MemoryChain

    async def provider(self: MemoryChain, wallet: Address) -> ProviderRecord:
        return ProviderRecord(wallet, wallet, Wei(1500 * WEI_PER_TALLY // 1000))

    monkeypatch.setattr(MemoryChain, "provider", provider)
    assert "1.5" in tally("market").stdout
