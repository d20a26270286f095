"""Audits of real processes under kill -9: who dies and comes back is not punished, and who withholds is.

tests/node/validator and tests/node/provider have every crash point on the twins; here it is the whole loop on a chain.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from node.ports import CaseState
from protocol.units import AuditOutcome
from tests.faults.court_stage import SHORT, CourtStage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VALIDATOR_POINTS = (
    "store.VerdictMade.before",
    "validator.verdict.journaled",
    "validator.verdict.submitted",
    "validator.verdict.revealed",
)
PROVIDER_POINTS = ("provider.commitment.journaled", "provider.commitment.posted", "provider.dossier.read")


async def test_a_validator_killed_at_any_point_votes_once_and_what_it_journaled(tmp_path: Path) -> None:
    async with CourtStage(tmp_path / "market") as stage:
        validator = stage.cluster.validators[0]
        for number, point in enumerate(VALIDATOR_POINTS, 1):
            validator.kill()
            validator.start(TALLY_CRASH_AT=point)
            await validator.wait_ready()
            await stage.job()
            await stage.killed(validator)
            validator.start()
            await validator.wait_ready()
            cases = await stage.over()
            assert [case.verdict for case in cases] == ["PASS"] * number, point
            rounds = [vote.round for vote in cases[-1].votes if vote.validator == validator.name]
            assert rounds and len(set(rounds)) == len(rounds), point
        assert not (await stage.stakes()).slashes
        assert await stage.verdicts(validator) >= len(VALIDATOR_POINTS)


async def test_a_provider_killed_at_any_point_of_its_audit_is_found_honest(tmp_path: Path) -> None:
    async with CourtStage(tmp_path / "market") as stage:
        (provider,) = stage.cluster.providers
        for number, point in enumerate(PROVIDER_POINTS, 1):
            provider.kill()
            provider.start(TALLY_CRASH_AT=point)
            await provider.wait_ready()
            await stage.job()
            await stage.killed(provider)
            provider.start()
            await provider.wait_ready()
            assert [case.verdict for case in await stage.over()] == ["PASS"] * number, point
        assert not (await stage.stakes()).slashes


async def test_who_shows_no_transcript_loses_a_tenth_of_its_stake(tmp_path: Path) -> None:
    async with CourtStage(tmp_path / "market", deploy=SHORT, adversaries={"provider-1": "withheld"}) as stage:
        await stage.job()
        (case,) = await stage.over()
        assert (case.state, case.outcome) == (CaseState.CLOSED, AuditOutcome.WITHHELD)
        provider, *validators = (await stage.stakes()).parties
        assert provider.slashed * 10 == provider.deposited == provider.slashed + provider.held
        assert not any(stake.slashed for stake in validators)
