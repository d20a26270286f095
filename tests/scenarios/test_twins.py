"""Every scenario on the twins, each on a market of its own."""

from __future__ import annotations

import pytest

from tests.scenarios.runner import act
from tests.scenarios.table import SCENARIOS
from tests.scenarios.twins import TwinStage
from tests.scenarios.vocabulary import Scenario


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
async def test_scenario(scenario: Scenario) -> None:
    async with TwinStage() as stage:
        await act(stage, scenario)


async def test_all_scenarios_one_after_another_on_one_market() -> None:
    async with TwinStage() as stage:
        for scenario in SCENARIOS:
            await act(stage, scenario)
