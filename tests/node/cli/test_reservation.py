"""`tally reservation` on the chain's twin: a right's whole life from both sides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from web3 import HTTPProvider, Web3
from web3.types import RPCEndpoint

from devnet.anvil import Anvil
from devnet.deploy import fund
from node.chain import Deployment
from node.cli.main import cli
from node.cli.refusals import span
from node.config import NodeConfig
from node.keys import save
from node.ports import CapacityTerms
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Digest, Wei
from tests.node.cli.conftest import Tally
from tests.node.cli.sticks import NODE, SESSION, WALLET
from tests.twins.chain_lab import LAB_OPTIONS, MemoryLab, secret_of
from tests.twins.wall_clock import WallClock

PROFILE = Digest(b"\x07" * 32)
SELLER = secret_of(1)
PERIOD = LAB_OPTIONS.period_seconds
PRICE = 2 * 10**11
"""0.2 TALLY per million STE. Unit: wei per STE."""


class Desk:
    """The chain, and whose wallet the commands act for."""

    def __init__(self) -> None:
        self.lab, self.acting = MemoryLab(), WALLET
        for signer in (WALLET, SELLER):
            self.lab.world.fund(signer.address, 10 * WEI_PER_TALLY, 10**18)

    def tally_of(self, signer: Signer) -> int:
        return self.lab.world.head.state.tally[signer.address]

    async def sell(self) -> None:
        seller = await self.lab.node(SELLER)
        await seller.offer_capacity(PROFILE, CapacityTerms(5_000_000, Wei(PRICE), 1, 100))


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk()

    @asynccontextmanager
    async def wallet_chain(config: NodeConfig) -> AsyncIterator[Any]:
        yield await desk.lab.node(desk.acting), desk.acting

    monkeypatch.setattr("node.app.wallet_chain", wallet_chain)
    return desk


def bought(tally: Tally, *more: str) -> dict[str, Any]:
    """A purchase of 2.5 STE/s for five minutes."""
    seller = ("--from", "0x" + SELLER.address.hex())
    result = tally("reservation", "buy", "0x" + PROFILE.hex(), "2.5", "--for", "5m", *seller, "--yes", "--json", *more)
    assert result.exit_code == 0, result.stderr
    made: dict[str, Any] = json.loads(result.stdout)
    return made


def test_a_right_is_bought_listed_shown_and_used_up(furnished: Path, tally: Tally, desk: Desk) -> None:
    asyncio.run(desk.sell())
    made = bought(tally)
    cost = 5 * PERIOD * PRICE * 25 // 10
    assert desk.tally_of(WALLET) == 10 * WEI_PER_TALLY - cost
    (row,) = json.loads(tally("reservation", "list", "--json").stdout)
    assert (row["reservation"], row["side"], row["state"]) == (made["reservation"], "holder", "to come")
    assert (row["rate_micro"], row["price_wei"], row["earned_wei"]) == (2_500_000, str(cost), "0")
    assert row["session"] == "0x" + SESSION.address.hex()
    assert (row["start"] % PERIOD, row["end"] - row["start"]) == (0, 5 * PERIOD)
    desk.lab.world.advance(row["start"] + PERIOD - desk.lab.world.head.state.timestamp)
    text = tally("reservation", "show", made["reservation"][:12]).stdout
    assert "2.5 STE/s" in text and "(running)" in text and "of which earned 0.00003 TALLY" in text
    assert "running" in tally("reservation", "list").stdout


def test_a_right_is_transferred_and_assigned_anew(furnished: Path, tally: Tally, desk: Desk) -> None:
    asyncio.run(desk.sell())
    right = bought(tally)["reservation"]
    to = "0x" + SELLER.address.hex()
    assert tally("reservation", "transfer", right, to, "--yes").exit_code == 0
    assert tally("reservation", "list").stdout == "no reservation is held or was sold\n"
    refused = tally("reservation", "assign", right)
    assert refused.exit_code == 1 and "is held by 0x" in refused.stderr and "nothing was moved" in refused.stderr
    desk.acting = SELLER
    key = "0x" + NODE.address.hex()
    assert tally("reservation", "assign", right, key).exit_code == 0
    assert json.loads(tally("reservation", "show", right, "--json").stdout)["session"] == key


def test_quitting_releasing_and_claiming(furnished: Path, tally: Tally, desk: Desk) -> None:
    asyncio.run(desk.sell())
    quitted, released = (
        bought(tally)["reservation"],
        bought(tally, "--session", "0x" + NODE.address.hex())["reservation"],
    )
    assert tally("reservation", "quit", quitted, "--yes").exit_code == 0
    desk.acting = SELLER
    nothing = tally("reservation", "claim")
    assert nothing.exit_code == 1 and "earned anything" in nothing.stderr
    facts = json.loads(tally("reservation", "show", released, "--json").stdout)
    assert facts["side"] == "provider" and facts["session"] == "0x" + NODE.address.hex()
    desk.lab.world.advance(facts["start"] + 2 * PERIOD - desk.lab.world.head.state.timestamp)
    before = desk.tally_of(SELLER)
    assert tally("reservation", "release", released, "--yes").exit_code == 0
    assert tally("reservation", "claim").exit_code == 0
    earned = sum(int(row["earned_wei"]) for row in json.loads(tally("reservation", "list", "--json").stdout))
    per_period = PERIOD * PRICE * 25 // 10
    assert 3 * per_period <= earned < 3 * per_period + per_period // 2
    assert desk.tally_of(SELLER) == before + earned - earned * 12 // 100


def test_capacity_is_offered_and_closed(furnished: Path, tally: Tally, desk: Desk) -> None:
    offer = ("reservation", "offer", "5", "--price", "0.2", "--profile", "0x" + PROFILE.hex(), "--yes")
    assert tally(*offer, "--min-term", "90s", "--max-term", "1h").exit_code == 0
    terms = desk.lab.world.head.state.capacities[WALLET.address, PROFILE]
    assert terms == CapacityTerms(5_000_000, Wei(PRICE), 2, 60)
    assert tally(*offer, "--close").exit_code == 0
    closed = tally(
        "reservation", "buy", "0x" + PROFILE.hex(), "1", "--for", "1h", "--from", "0x" + WALLET.address.hex()
    )
    assert closed.exit_code == 1 and "sells no capacity" in closed.stderr and "nothing was sent" in closed.stderr


def test_nothing_is_bought_without_a_yes_or_above_the_limit(furnished: Path, tally: Tally, desk: Desk) -> None:
    asyncio.run(desk.sell())
    buy = ("reservation", "buy", "0x" + PROFILE.hex(), "2.5", "--for", "5m", "--from", "0x" + SELLER.address.hex())
    asked = tally(*buy)
    assert asked.exit_code != 0 and "Reserve 2.5 STE/s from" in asked.stderr
    dear = tally(*buy, "--yes", "--max-cost", "0.0001")
    assert dear.exit_code == 1 and "above the limit of 0.0001 TALLY" in dear.stderr and "wei" not in dear.stderr
    assert desk.tally_of(WALLET) == 10 * WEI_PER_TALLY


@pytest.mark.parametrize(
    ("rate", "term", "said"),
    [
        ("200", "5m", "only 5 STE/s are free at"),
        ("1", "9d", f"a term of 9d is not sold: this provider sells {span(PERIOD)} to {span(100 * PERIOD)}"),
    ],
)
def test_what_the_contract_refuses_is_said_in_the_units_it_was_asked_in(
    rate: str, term: str, said: str, furnished: Path, tally: Tally, desk: Desk
) -> None:
    asyncio.run(desk.sell())
    seller = "0x" + SELLER.address.hex()
    result = tally("reservation", "buy", "0x" + PROFILE.hex(), rate, "--for", term, "--from", seller, "--yes")
    assert result.exit_code == 1 and said in result.stderr and "kept safe: nothing was moved" in result.stderr


def test_spans_read_as_people_say_them() -> None:
    assert [span(s) for s in (0, 59, 60, 30_720, 2_592_000)] == ["0s", "59s", "1m", "8h 32m", "30d"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("buy", "0x" + PROFILE.hex(), "1", "--for", "1h"), "name the provider with --from"),
        (("buy", "m", "0.0000001", "--for", "1h"), "is no rate"),
        (("buy", "m", "0", "--for", "1h"), "is no rate"),
        (("buy", "m", "1", "--for", "soon"), "is no duration"),
        (("buy", "m", "1", "--for", "1h", "--start", "tomorrow"), "is no time"),
        (("show", "zz"), "is no reservation's id"),
        (("show", "0xabcd"), "no reservation's id begins with 0xabcd"),
        (("show", "0x" + "00" * 32), "no reservation's id begins with"),
        (("offer", "1", "--price", "1", "--yes"), "no provider runs in this home"),
        (("offer", "1", "--price", "1", "--profile", "0x12", "--yes"), "is no profile id"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], said: str, furnished: Path, tally: Tally, desk: Desk) -> None:
    result = tally("reservation", *arguments)
    assert result.exit_code in (1, 2) and said in result.stderr


@pytest.mark.slow
def test_the_same_on_the_contract_itself(
    tmp_path: Path, anvil: Anvil, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two homes, one chain: sell, buy, transfer, claim with the commands alone."""
    wallets = {name: Signer.from_secret(bytes([number]) * 32) for number, name in enumerate(("seller", "buyer"), 77)}
    for name, signer in wallets.items():
        for role, key in (("wallet", signer), ("session", SESSION)):
            save(tmp_path / name / "keys", role, "correct horse", key.secret, scrypt_n=1024)
        (tmp_path / name / "password").write_text("correct horse\n")
        (tmp_path / name / "password").chmod(0o600)
        deployment.save(tmp_path / name / "deployment.json")
    accounts = [signer.address for signer in wallets.values()]
    bank = anvil.accounts[0]
    asyncio.run(fund(anvil.rpc_url, deployment, bank, WallClock(), accounts, Wei(10 * WEI_PER_TALLY), 10**18))
    monkeypatch.setenv("TALLY_CHAIN_RPC_URL", anvil.rpc_url)

    def tally(who: str, *arguments: str) -> Any:
        result = CliRunner().invoke(cli, ["--home", str(tmp_path / who), "reservation", *arguments, "--json"])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    def balance(who: str) -> int:
        result = CliRunner().invoke(cli, ["--home", str(tmp_path / who), "wallet", "show", "--json"])
        return int(json.loads(result.stdout)["balance_wei"])

    profile, seller, buyer = "0x" + PROFILE.hex(), *("0x" + account.hex() for account in accounts)
    tally("seller", "offer", "5", "--price", "0.2", "--profile", profile, "--min-term", "60s", "--yes")
    # From the running minute on, so that something is earned at once.
    now = datetime.fromtimestamp(_newest(anvil), UTC).isoformat()
    right = tally("buyer", "buy", profile, "2.5", "--for", "20m", "--from", seller, "--start", now, "--yes")
    (held,) = tally("buyer", "list")
    cost = int(held["price_wei"])
    assert held["reservation"] == right["reservation"] and cost in (
        20 * 60 * PRICE * 25 // 10,
        21 * 60 * PRICE * 25 // 10,
    )
    assert balance("buyer") == 10 * WEI_PER_TALLY - cost
    Web3(HTTPProvider(anvil.rpc_url)).provider.make_request(RPCEndpoint("evm_increaseTime"), [90])
    tally("seller", "claim")
    assert 0 < balance("seller") - 10 * WEI_PER_TALLY < cost
    tally("buyer", "transfer", right["reservation"], seller, "--yes")
    assert tally("buyer", "list") == []
    (sold,) = tally("seller", "list")
    assert (sold["holder"], sold["session"], sold["side"]) == (seller, None, "holder")
    assert buyer != seller


def _newest(anvil: Anvil) -> int:
    """The newest block's time, Unix s."""
    return int(Web3(HTTPProvider(anvil.rpc_url)).eth.get_block("latest")["timestamp"])
