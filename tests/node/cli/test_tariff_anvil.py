"""A price sheet's whole life on a real chain: written, signed, logged, served under, and changed while serving."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devnet.anvil import Anvil
from devnet.deploy import DeployOptions, deploy
from node.app import provider_app
from node.chain import ChainOptions, Deployment, Web3Chain
from node.config import NodeConfig, load
from node.keys import save
from node.tariff_sheet import read_signed
from protocol.eip712 import digest
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Digest, Wei
from tests.node.cli.conftest import Tally
from tests.twins.wall_clock import WallClock

MODEL = Path(__file__).parents[3] / "devnet" / "model" / "tally-demo-4m"
NODE_KEY = Signer.from_secret(b"\x5a" * 32)
STAKE = Wei(100 * WEI_PER_TALLY)

pytestmark = pytest.mark.slow


@contextmanager
def own_chain() -> Iterator[tuple[Anvil, Deployment]]:
    """Epochs of one second, so that a sheet comes into force within the test."""
    with Anvil() as anvil:
        options = DeployOptions(exit_delay=600, min_stake=STAKE, epoch_seconds=1)
        yield anvil, asyncio.run(deploy(anvil.rpc_url, anvil.accounts[0], WallClock(), options))


async def register(anvil: Anvil, deployment: Deployment) -> None:
    chain = Web3Chain(anvil.rpc_url, deployment, anvil.accounts[0], clock=WallClock(), options=ChainOptions(1, 0.05))
    await chain.start()
    await chain.register_provider(NODE_KEY.secret, STAKE)
    await chain.stop()


async def command(home: Path, *args: str) -> dict[str, Any]:
    """Another process of the same home, as an operator beside the running node would start it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "node", "--home", str(home), *args, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out
    found: dict[str, Any] = json.loads(out)
    return found


async def serve_and_change(config: NodeConfig, home: Path, first: Digest, sheet: Path) -> None:
    async with provider_app(config) as app:
        offering = app.provider.offering
        assert set(offering.terms().tariffs) == {first}
        profile = "0x" + offering.terms().profile_id.hex()
        assert await app.chain.last_sequence(app.wallet.address, offering.terms().profile_id) == 1
        made = await command(
            home, "tariff", "sign", str(sheet), "-o", str(home / "next.json"), "--profile", profile, "--json"
        )
        second = read_signed(json.dumps(made))
        facts = await command(home, "tariff", "log", str(home / "next.json"), "--yes", "--json")
        assert (second.tariff.sequence, facts["sequence"]) == (2, 2)
        assert "offers it as soon as it is in force" in facts["running"]
        assert set(offering.terms().tariffs) == {first, digest(app.chain.domain, second.tariff)}
        # looking after its tariff, the node is content with the one it went over to
        await offering.prepare_tariff()
        assert await app.chain.last_sequence(app.wallet.address, offering.terms().profile_id) == 2


def test_from_a_sheet_to_a_served_tariff_and_to_the_next(
    tally: Tally, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_chain() as (anvil, deployment):
        (home / "password").write_text("correct horse\n")
        (home / "password").chmod(0o600)
        save(home / "keys", "wallet", "correct horse", anvil.accounts[0].secret, scrypt_n=1024)
        save(home / "keys", "node", "correct horse", NODE_KEY.secret, scrypt_n=1024)
        deployment.save(home / "deployment.json")
        monkeypatch.setenv("TALLY_CHAIN_RPC_URL", anvil.rpc_url)
        asyncio.run(register(anvil, deployment))
        monkeypatch.setattr("node.cli.tariff.SIGN_MARGIN_S", 4)
        sheet, signed = home / "sheet.json", home / "signed.json"
        steps = (
            ("new", "-o", str(sheet), "--set", "prices.prompt=0.05"),
            ("sign", str(sheet), "-o", str(signed), "--model", str(MODEL)),
            ("log", str(signed), "--yes"),
            ("log", str(signed), "--yes"),
        )
        for step in steps:
            result = tally("tariff", *step)
            assert result.exit_code == 0, result.output
        read = read_signed(signed.read_text())
        first = digest(deployment.domain, read.tariff)
        flags = {"home": str(home), "provider.model_dir": str(MODEL), "provider.tariff_file": str(signed)}
        flags |= {"transport.listen_host": "127.0.0.1", "transport.listen_port": 0, "provider.slots": 1}
        asyncio.run(serve_and_change(load(flags), home, first, sheet))
        shown = json.loads(tally("tariff", "show", "0x" + first.hex(), "--json").stdout)
        assert shown[0]["sheet"]["prices"]["prompt"] == "0.05" and shown[0]["source"] == "this home's journal"
