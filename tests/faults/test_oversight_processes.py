"""A real gateway over real providers on a chain: what they leave out is proven, and a slash pays its wallet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from node.gateway.control import ControlClient
from protocol.units import AuditOutcome
from tests.faults.court_stage import PATIENCE_S, SHORT, CourtStage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JOBS = 8
"""The adversary omits every other job by its id, so that one of each kind is in some epoch but once in a hundred."""


async def overseen(stage: CourtStage, figure: str) -> dict[str, Any]:
    """What the gateway says of its oversight, once a figure of it is no longer zero. Raises: TimeoutError."""
    control = ControlClient(stage.cluster.gateway.home / "control.sock")
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found: dict[str, Any] = (await control.call("status"))["oversight"]
            if found[figure]:
                return found
            await asyncio.sleep(0.5)


async def test_a_provider_that_omits_jobs_is_shown_by_the_gateway_that_bought_them(tmp_path: Path) -> None:
    async with CourtStage(tmp_path / "market", adversaries={"provider-1": "omitted-receipt"}) as stage:
        await asyncio.gather(*(stage.job(8) for _ in range(JOBS)))
        found = await overseen(stage, "faults_proved")
        provider, *validators = (await stage.stakes()).parties
        assert provider.slashed * 2 >= provider.deposited and not any(stake.slashed for stake in validators)
        assert all(task["failures"] == 0 for task in found["background"].values())


async def test_the_gateway_is_compensated_when_its_provider_is_slashed(tmp_path: Path) -> None:
    async with CourtStage(tmp_path / "market", deploy=SHORT, adversaries={"provider-1": "withheld"}) as stage:
        await stage.job()
        (case,) = await stage.over()
        assert case.outcome == AuditOutcome.WITHHELD
        found = await overseen(stage, "jobs_compensated")
        assert (found["jobs_compensated"], found["faults_proved"]) == (1, 0)
        (event,) = [event for event in (await stage.court.events(0))[0] if event.name == "Compensated"]
        assert event.case_id == case.id and int(event.values["amount"]) > 0
