"""`lab`: every test that takes it runs on the twin and on Anvil."""

from __future__ import annotations

import pytest

from tests.twins.chain_lab import ChainLab


@pytest.fixture(params=["memory", "anvil"])
def lab(request: pytest.FixtureRequest) -> ChainLab:
    """The chain under test."""
    found: ChainLab = request.getfixturevalue(f"{request.param}_lab")
    return found
