"""`lab`, `court_lab`, `forced_lab`: every test that takes one runs on the twin and on Anvil."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from devnet.anvil import Anvil
from devnet.deploy import deploy
from tests.twins.chain_lab import LAB_OPTIONS, AnvilLab, ChainLab, CourtLab, MemoryLab
from tests.twins.memory_court import RULES
from tests.twins.wall_clock import WallClock


@pytest.fixture(params=["memory", "anvil"])
def lab(request: pytest.FixtureRequest) -> ChainLab:
    """The chain under test."""
    found: ChainLab = request.getfixturevalue(f"{request.param}_lab")
    return found


@pytest.fixture(params=["memory", pytest.param("anvil", marks=pytest.mark.slow)])
def court_lab(request: pytest.FixtureRequest) -> CourtLab:
    """The chain whose Court is under test."""
    found: CourtLab = request.getfixturevalue(f"{request.param}_lab")
    return found


@pytest.fixture
async def forced_anvil_lab(anvil: Anvil) -> AsyncIterator[AnvilLab]:
    """A deployment of its own on the test process's Anvil."""
    options = replace(LAB_OPTIONS, forced_bps=10_000)
    lab = AnvilLab(anvil, await deploy(anvil.rpc_url, anvil.accounts[0], WallClock(), options))
    await lab.open()
    try:
        yield lab
    finally:
        await lab.close()


@pytest.fixture
def forced_memory_lab() -> MemoryLab:
    """The twin under the same rule."""
    return MemoryLab(replace(RULES, forced_bps=10_000))


@pytest.fixture(params=["memory", pytest.param("anvil", marks=pytest.mark.slow)])
def forced_lab(request: pytest.FixtureRequest) -> CourtLab:
    """A Court under which every commitment obliges the next one to hold an error."""
    found: CourtLab = request.getfixturevalue(f"forced_{request.param}_lab")
    return found
