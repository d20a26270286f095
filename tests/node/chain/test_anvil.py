"""Anvil as a child process: found or named, up on a port of its own, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import devnet.anvil
from devnet.anvil import Anvil, AnvilError, AnvilOptions, anvil_binary
from devnet.deploy import DeployOptions, deploy, fund
from node.chain import ChainOptions, Web3Chain
from node.chain.errors import ContractReverted
from protocol.units import Address, Wei
from tests.twins.wall_clock import WallClock


def test_each_has_its_own_port_and_is_gone_after_stop() -> None:
    with Anvil() as one, Anvil(AnvilOptions(accounts=2, chain_id=99)) as two:
        assert one.rpc_url != two.rpc_url
        assert one.rpc_url.startswith("http://127.0.0.1:")
        assert (len(one.accounts), len(two.accounts)) == (10, 2)
        assert one.accounts[:2] == two.accounts  # the mnemonic is the same
        listening = [c.laddr.ip for c in psutil.Process(one.pid).net_connections("inet") if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]
    one.stop()
    assert not psutil.pid_exists(one.pid)
    assert not psutil.pid_exists(two.pid)


def test_a_used_port_or_a_missing_binary_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with Anvil() as running, pytest.raises(AnvilError, match="Address already in use"):
        Anvil(AnvilOptions(port=int(running.rpc_url.rsplit(":", 1)[1])))

    def missing(name: str) -> Path:
        raise FileNotFoundError(name)

    monkeypatch.setattr(devnet.anvil, "tool", missing)
    with pytest.raises(AnvilError, match="make setup"):
        anvil_binary()


def test_it_dies_with_its_parent() -> None:
    program = "from devnet.anvil import Anvil; print(Anvil().pid, flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None and parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()


async def test_a_deployment_is_complete_and_accounts_are_funded(anvil: Anvil) -> None:
    clock, bank, account = WallClock(), anvil.accounts[1], Address(b"\x55" * 20)
    deployment = await deploy(anvil.rpc_url, bank, clock, DeployOptions(supply=1_000, epoch_seconds=7))
    await fund(anvil.rpc_url, deployment, bank, clock, [account], Wei(400), 5)
    node = Web3Chain(anvil.rpc_url, deployment, None, clock=clock, options=ChainOptions())
    await node.start()
    assert await node.token_balance(account) == 400
    assert await node.token_balance(bank.address) == 600
    assert await node.coin_balance(account) == 5
    assert await node.epoch_seconds() == 7
    assert (await node.head()).number >= deployment.block
    await node.stop()
    with pytest.raises(ContractReverted, match=r"UnbondDelayTooShort\(unbondDelay=1, judgement=900\)"):
        await deploy(anvil.rpc_url, bank, clock, DeployOptions(unbond_delay=1))
    with pytest.raises(ContractReverted, match="ERC20InsufficientBalance"):
        await fund(anvil.rpc_url, deployment, bank, clock, [account], Wei(10**6), 0)
