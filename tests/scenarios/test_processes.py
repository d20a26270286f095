"""Every scenario on real processes: one cluster acts them all, then all books are held against the chain."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.processes import ProcessStage
from tests.scenarios.runner import act
from tests.scenarios.table import SCENARIOS


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_every_scenario_on_processes(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    async with ProcessStage(tmp_path / "market") as stage:
        for scenario in SCENARIOS:
            start = time.monotonic()
            await act(stage, scenario)
            record_property(scenario.name, round(time.monotonic() - start, 2))
            print(f"{scenario.name:22} {time.monotonic() - start:6.2f} s")
        audit = await stage.audit()
    assert audit.lost_wei == audit.credit_wei == 0
