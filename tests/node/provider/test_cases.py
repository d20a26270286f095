"""The accused: answers what it planted, appeals what it did not, and says what an operator can do."""

from __future__ import annotations

from typing import Any

import pytest

from incentives.ledger import CommitmentMade
from node.ports import CaseRecord, CaseState, ChainError, ChainUnavailable, CourtEvent, CourtRules
from node.provider.cases import Cases
from protocol.messages import Commitment
from protocol.units import ZERO_ADDRESS, ZERO_DIGEST, Address, AuditOutcome, Digest, JobId, Wei
from tests.node.provider.desk import Desk
from tests.twins.memory_court import RULES

WALLET = Address(b"\x61" * 20)
PROFILE = Digest(b"\x62" * 32)


class Bench:
    """A court with one case. What the provider does is in `done`; `refuses` is raised for each try."""

    def __init__(self, key: Digest) -> None:
        self.key, self.state, self.round, self.outcome = key, CaseState.ANSWER, 0, AuditOutcome.IMPROBABLE
        self.done: list[Any] = []
        self.refuses: Exception | None = None
        self.was_forced = False

    async def rules(self) -> CourtRules:
        return RULES

    async def now(self) -> int:
        return 100

    async def events(self, first: int) -> tuple[list[CourtEvent], int]:
        return [CourtEvent("Concluded", first, self.key, ZERO_ADDRESS, {})], first + 1

    async def case(self, key: Digest) -> CaseRecord | None:
        if key != self.key:
            return None
        outcome, forced = self.outcome, self.was_forced
        return CaseRecord(key, WALLET, PROFILE, 7, self.state, self.round, 108, outcome, (), 0, Wei(5), forced)

    async def _act(self, *what: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.done.append(what)
        self.state = CaseState.SUBMIT if what[0] == "appeal" else CaseState.CLOSED

    async def answer(self, key: Digest, secret: bytes) -> None:
        await self._act("answer", key, secret)
        self.was_forced = True

    async def appeal(self, key: Digest) -> None:
        await self._act("appeal", key)


def made(number: int, *, decoy: bool = False) -> CommitmentMade:
    key, secret = Digest(bytes([number]) * 32), bytes([100 + number]) * 32
    commitment = Commitment(WALLET, PROFILE, number, ZERO_DIGEST, 1, 0, ZERO_DIGEST)
    return CommitmentMade(key, commitment, b"", secret, JobId(b"\1" * 32 if decoy else ZERO_DIGEST))


async def accused(*, decoy: bool = False, appeals: bool = True) -> tuple[Cases, Bench]:
    desk = await Desk.made()
    await desk.store.write(made(1), made(2, decoy=decoy))
    bench = Bench(made(2).key)
    return Cases(bench, desk.chain, desk.store, desk.clock, appeals=appeals), bench  # type: ignore[arg-type]


async def test_a_planted_error_is_answered_with_the_secret_of_the_commitment_before() -> None:
    cases, bench = await accused(decoy=True)
    for _ in range(3):
        await cases.look()
    assert bench.done == [("answer", made(2).key, made(1).secret)]
    assert await cases.is_over(made(2).key)
    assert cases.convicted == 0


async def test_what_was_not_planted_is_appealed_once_a_round_while_there_is_a_larger_committee(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cases, bench = await accused()
    for round_ in range(3):
        bench.state, bench.round = CaseState.ANSWER, round_
        await cases.look()
        await cases.look()
    assert bench.done == [("appeal", made(2).key)] * 2
    assert "tally case show" in caplog.text and "no further appeal" in caplog.text


async def test_a_planted_error_excuses_no_document() -> None:
    cases, bench = await accused(decoy=True)
    bench.outcome = AuditOutcome.FORGED
    await cases.look()
    assert bench.done == [("appeal", made(2).key)]


async def test_an_operator_may_choose_not_to_appeal(caplog: pytest.LogCaptureFixture) -> None:
    cases, bench = await accused(appeals=False)
    await cases.look()
    assert bench.done == [] and "provider.appeal is off" in caplog.text


async def test_what_the_chain_does_not_take_is_tried_again() -> None:
    cases, bench = await accused(decoy=True)
    bench.refuses = ChainUnavailable("down")
    with pytest.raises(ChainUnavailable):
        await cases.look()
    bench.refuses = ChainError("out of gas")
    await cases.look()
    assert bench.done == []
    bench.refuses = None
    await cases.look()
    assert len(bench.done) == 1


async def test_a_conviction_is_said_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    cases, bench = await accused()
    bench.state = CaseState.CLOSED
    for _ in range(3):
        await cases.look()
    assert cases.convicted == 1
    assert sum("slashed" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("state", [CaseState.SUBMIT, CaseState.REVEAL, CaseState.UNDECIDED])
async def test_nothing_is_done_about_a_case_that_accuses_nobody(state: CaseState) -> None:
    cases, bench = await accused()
    bench.state = state
    bench.outcome = AuditOutcome.PASS
    await cases.look()
    assert bench.done == [] and cases.convicted == 0
    assert await cases.is_over(made(2).key) == (state is CaseState.UNDECIDED)
    assert not await cases.is_over(made(1).key)
