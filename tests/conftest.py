"""Fixtures of the whole house: one Anvil per test process, with the contracts on it, put back after each test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from devnet.anvil import Anvil
from devnet.deploy import deploy
from node.chain import Deployment
from node.foreign import tame_py_ecc
from tests.twins.chain_lab import LAB_OPTIONS, AnvilLab, MemoryLab
from tests.twins.wall_clock import WallClock

tame_py_ecc()  # before a test module imports eth_account: a deep document must fail a test, not the interpreter


@pytest.fixture(scope="session")
def anvil() -> Iterator[Anvil]:
    """A chain of its own for this test process; its accounts are test keys."""
    with Anvil() as running:
        yield running


@pytest.fixture(scope="session")
def deployment(anvil: Anvil) -> Deployment:
    """The contracts, deployed once; `anvil.accounts[0]` holds the supply."""
    return asyncio.run(deploy(anvil.rpc_url, anvil.accounts[0], WallClock(), LAB_OPTIONS))


@pytest.fixture
async def anvil_lab(anvil: Anvil, deployment: Deployment) -> AsyncIterator[AnvilLab]:
    """Web3Chain nodes on Anvil; the chain is as before when the test is over."""
    lab = await AnvilLab(anvil, deployment).open()
    try:
        yield lab
    finally:
        await lab.close()


@pytest.fixture
def memory_lab() -> MemoryLab:
    """MemoryChain nodes over a world of their own."""
    return MemoryLab()
