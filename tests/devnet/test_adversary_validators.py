"""Validators that copy, rubber-stamp, toss a coin or collude, among honest ones on a market of twins.

None of them earns credit, none of them moves an honest provider's stake, and who invents what it did not measure pays.
"""

from __future__ import annotations

import asyncio

import pytest

from devnet.adversaries.validators import Colluding, Copying, RubberStamping, Tossing
from node.ports import CaseRecord, CaseState
from protocol.units import WEI_PER_TALLY, AuditOutcome
from tests.spine.judged import FAST, PATIENCE_S, STAKE, Judge, JudgedMarket
from tests.spine.lab import Seller, idle, run, spec
from tests.twins.replayer_twin import Altering

MOST_CASES = 6
"""Cases until the adversary has had a seat: three of four validators sit in each."""

SOLD_STAKE = 100 * WEI_PER_TALLY

PARTS = {
    "copies": ("node.validator.validator.Cases", Copying),
    "rubber-stamps": ("node.validator.validator.Auditor", RubberStamping),
    "no-model": ("node.validator.validator.Auditor", Tossing),
    "colludes": ("node.validator.validator.Auditor", Colluding),
}


async def adversary(market: JudgedMarket, name: str, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """A judge with one part of the adversary's."""
    with monkeypatch.context() as patched:
        patched.setattr(*PARTS[name])
        return await market.judge()


async def all_over(market: JudgedMarket) -> list[CaseRecord]:
    """Every case that was opened, once all are over."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            ids = [event.case_id for event in market.events("Committed")]
            cases = [case for key in ids if (case := await market.judges[0].court.case(key)) is not None]
            over = all(case.state in (CaseState.CLOSED, CaseState.UNDECIDED) for case in cases)
            if ids and len(cases) == len(ids) and over:
                return cases
            await market.world.tick.wait()


async def judged_until_seated(market: JudgedMarket, seller: Seller, liar: Judge) -> list[CaseRecord]:
    """Jobs, one after the other, until the adversary has submitted in a case and all cases are over."""
    buyer = await market.buyer()
    for _ in range(MOST_CASES):
        before = len(market.events("Committed"))
        await run(buyer, spec(64))
        await idle(seller)
        async with asyncio.timeout(PATIENCE_S):
            while len(market.events("Committed")) == before:
                await market.world.tick.wait()
        cases = await all_over(market)
        if any(event.about == liar.address for event in market.events("Submitted")):
            return cases
    raise AssertionError(f"the adversary was drawn in none of {MOST_CASES} cases")


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
async def test_no_credit_for_whoever_did_not_judge(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with JudgedMarket() as market:
        seller = await market.seller()
        honest = await market.judges_of(3)
        liar = await adversary(market, name, monkeypatch)
        cases = await judged_until_seated(market, seller, liar)
        assert all(case.outcome is AuditOutcome.PASS and case.state is CaseState.CLOSED for case in cases)
        assert seller.chain.world.head.state.stakes[seller.wallet.address] == SOLD_STAKE
        credited, missed = await liar.court.credits(liar.address)
        assert credited == 0
        assert (missed > 0) == (name == "copies"), "what was copied cannot be revealed"
        if name in ("copies", "rubber-stamps", "colludes"):  # what a coin says may have been the opposite
            assert liar.stake() == STAKE
        for judge in honest:
            assert judge.stake() == STAKE
        assert sum([(await judge.court.credits(judge.address))[0] for judge in honest]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rubber-stamps", "colludes"])
async def test_whom_they_cover_is_slashed_all_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with JudgedMarket() as market:
        seller = await market.seller(engine=Altering())
        honest = await market.judges_of(3)
        liar = await adversary(market, name, monkeypatch)
        (case, *_) = await judged_until_seated(market, seller, liar)
        assert case.outcome is AuditOutcome.IMPROBABLE and case.slashed == SOLD_STAKE
        measured = name == "colludes"
        assert (liar.stake() == STAKE) == measured, "who guessed the gaps pays, who measured them is only not paid"
        assert measured or liar.stake() <= STAKE - FAST.validator_penalty
        assert (await liar.court.credits(liar.address))[0] == 0
        assert all(judge.stake() == STAKE for judge in honest)
