"""`lab`, `court_lab`, `forced_lab`: every test that takes one runs on the twin and on Anvil."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.twins.chain_lab import ChainLab, CourtLab, MemoryLab
from tests.twins.memory_court import RULES


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
def forced_lab() -> CourtLab:
    """A Court under which every commitment obliges the next one to hold an error."""
    return MemoryLab(replace(RULES, forced_bps=10_000))
