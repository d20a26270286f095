"""What a validator does about one case: draw it, look into it, commit, reveal, count, execute.

Contract: a verdict is in the journal, synced, before its digest goes out, and what is revealed is what the journal
holds; so a process that dies anywhere starts again where it was and never says two things about one round. What
anybody may send (draws, counts, executions) is sent by rank, one validator after the other until one was first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from incentives.committee import CaseFacts, Seat, Step, next_step
from incentives.faults import Proof
from incentives.ledger import VerdictMade
from incentives.verdicts import findings_json, summarise
from node.background import log_bug, pause
from node.crashpoints import crash_point, declare
from node.ports import (
    CaseRecord,
    CaseState,
    Chain,
    ChainError,
    ChainUnavailable,
    Clock,
    CommitmentRecord,
    Court,
    Entropy,
    Mined,
    Store,
)
from node.validator.audit import Auditor, Docket, Looked, Recused, Unable
from node.validator.shelf import Shelf
from protocol.eip712 import digest
from protocol.errors import TallyError
from protocol.messages import Verdict
from protocol.units import ZERO_DIGEST, Address, AuditOutcome, Digest

log = logging.getLogger("tally.validator")

TURN_S: Final = 3.0
"""What each validator waits for the one before it to send what anybody may send. Unit: s, of rank. Longer than a
transaction takes on a chain of one's own; doubling it makes an absent validator cost twice the time, halving it has
several pay for the same transaction."""

REFUSALS_TOLD: Final = 3
"""Refusals of one step in a row before they are worth a warning. One is another validator being first."""

JOURNALED: Final = declare("validator.verdict.journaled")
"""The verdict is in the journal; its digest has not been sent."""

SUBMITTED: Final = declare("validator.verdict.submitted")
"""The digest is on chain; nothing was revealed."""

REVEALED: Final = declare("validator.verdict.revealed")
"""The verdict is on chain; nobody has counted yet."""

COUNTED: Final = declare("validator.case.counted")
"""A draw, a count or an execution of ours is on chain."""

EncodeProof = Callable[[Proof], tuple[int, bytes]]
"""A proof as Court.prove takes it: (kind, bytes). Raises: ValueError for a fault that the Court does not judge."""


@dataclass(slots=True)
class Totals:
    """What this process did since it started."""

    audits: int = 0
    jobs: int = 0
    tokens: int = 0
    flags: int = 0
    guilty: int = 0
    proofs: int = 0


@dataclass(slots=True)
class _Due:
    """A step that is due since `since` (monotonic s). `refused`: times in a row; not before `again`."""

    since: float
    refused: int = 0
    again: float = 0.0


class Cases:
    """Works on cases for the wallet `me`. `wake`: called when a case can go on at once. Call `stop` at the end."""

    def __init__(
        self,
        me: Address,
        auditor: Auditor,
        shelf: Shelf,
        store: Store,
        chain: Chain,
        court: Court,
        clock: Clock,
        entropy: Entropy,
        encode_proof: EncodeProof,
        max_audits: int,
        auto_draw: bool,
        wake: Callable[[], None],
    ) -> None:
        self._me, self._auditor, self._shelf, self._store = me, auditor, shelf, store
        self._chain, self._court, self._clock, self._entropy = chain, court, clock, entropy
        self._encode_proof, self._auto_draw, self._wake = encode_proof, auto_draw, wake
        self._free = asyncio.Semaphore(max_audits)
        self._audits: dict[tuple[Digest, int], asyncio.Task[None]] = {}
        self._abstained: dict[tuple[Digest, int], str] = {}
        self._due: dict[tuple[Digest, Step, int], _Due] = {}
        self.totals = Totals()

    @property
    def looking(self) -> int:
        """Audits under way."""
        return len(self._audits)

    async def stop(self) -> None:
        """End what is under way; the next start begins it again. Idempotent."""
        tasks = list(self._audits.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def advance(self, key: Digest) -> bool:
        """Do what is due about the case of a commitment; whether it is over.

        Raises: ChainUnavailable, StoreError (then nothing is lost: call it again).
        """
        record = await self._court.commitment(key)
        if record is None:
            return False  # not deep enough yet, or reorganised away
        if record.count == 0:
            return True  # an epoch without jobs is not judged
        case = await self._court.case(key)
        step = next_step(await self._facts(record, case), self._me, await self._court.now())
        round_ = case.round if case is not None else 0
        match step:
            case Step.DONE:
                self._forget(key)
                return True
            case Step.SUBMIT if case is not None:
                await self._submit(record, case)
            case Step.REVEAL if case is not None:
                await self._reveal(case)
            case Step.DRAW | Step.CONCLUDE | Step.EXECUTE:
                await self._anybody(key, step, round_, case)
        return False

    async def _facts(self, record: CommitmentRecord, case: CaseRecord | None) -> CaseFacts:
        rules = await self._court.rules()
        if case is None or case.state == CaseState.NONE:
            # the beacon is of the block after the commitment; the draw itself is at least one block later
            drawable = (await self._chain.head()).number >= record.block + 1
            return CaseFacts(CaseState.NONE, 0, rules.reveal_window, drawable)
        seats = tuple(
            Seat(member.validator, member.submitted != ZERO_DIGEST, member.verdict is not None)
            for member in case.members
        )
        return CaseFacts(case.state, case.until, rules.reveal_window, True, seats)

    def _forget(self, key: Digest) -> None:
        self._due = {known: due for known, due in self._due.items() if known[0] != key}
        self._abstained = {known: why for known, why in self._abstained.items() if known[0] != key}

    # --------------------------------------------------------------------------------------------------- our verdict

    async def _submit(self, record: CommitmentRecord, case: CaseRecord) -> None:
        """Send the journaled verdict's digest, or look into the case first. Raises: ChainUnavailable, StoreError."""
        seat = (case.id, case.round)
        made = await self._store.verdict(*seat)
        if made is not None:
            await self._send(seat, Step.SUBMIT, lambda: self._court.submit(case.id, made.record.digest), SUBMITTED)
        elif seat not in self._audits and seat not in self._abstained:
            docket = Docket(record, case.round, case.until)
            task = asyncio.create_task(self._audit(docket), name=f"audit of case 0x{case.id.hex()[:8]}")
            self._audits[seat] = task
            task.add_done_callback(lambda ended: self._audit_ended(seat, ended))

    def _audit_ended(self, seat: tuple[Digest, int], task: asyncio.Task[None]) -> None:
        log_bug(task)
        self._audits.pop(seat, None)
        self._wake()

    async def _audit(self, docket: Docket) -> None:
        """From nothing to a journaled verdict. What fails for now is begun again at the next look."""
        case_id = docket.record.key
        began = self._clock.monotonic()
        try:
            async with self._free:
                looked = await self._auditor.look(docket)
            verdict = self._verdict(docket, looked)
            made = VerdictMade(verdict, digest(self._court.domain, verdict), findings_json(looked.findings))
            await self._store.write(made)
        except (Recused, Unable) as exc:
            self._abstained[case_id, docket.round] = str(exc)
            log.warning("case 0x%s: no verdict of ours: %s", case_id.hex()[:8], exc)
            return
        except TallyError as exc:
            log.warning("case 0x%s: looking into it failed and is begun again: %s", case_id.hex()[:8], exc)
            await self._clock.sleep(pause(1))
            return
        crash_point(JOURNALED)
        self._tell(docket, looked, verdict, self._clock.monotonic() - began)
        for proof in looked.proofs:
            await self._prove(proof)

    def _verdict(self, docket: Docket, looked: Looked) -> Verdict:
        profile = self._shelf.profile(docket.record.profile_id)
        assert profile is not None, "the auditor found it"
        salt = Digest(self._entropy.token(32))
        seat = (self._me, docket.record.key, docket.round)
        return summarise(*seat, looked.findings, looked.gaps, salt, profile.flag_ppm)

    def _tell(self, docket: Docket, looked: Looked, verdict: Verdict, seconds: float) -> None:
        totals, outcome = self.totals, AuditOutcome(verdict.outcome)
        totals.audits += 1
        totals.jobs += len(looked.findings)
        totals.tokens += verdict.tokens
        totals.flags += verdict.flags
        totals.guilty += outcome not in (AuditOutcome.PASS, AuditOutcome.VOID)
        why = next((item.detail for item in looked.findings if item.outcome == outcome and item.detail), "")
        log.info(
            "case 0x%s of provider 0x%s: audited %d jobs, %d tokens, %d flags in %.1f s: %s%s",
            docket.record.key.hex()[:8],
            docket.record.provider.hex()[:8],
            len(looked.findings),
            verdict.tokens,
            verdict.flags,
            seconds,
            outcome.name,
            f" ({why})" if outcome is not AuditOutcome.PASS and why else "",
        )

    async def _reveal(self, case: CaseRecord) -> None:
        """Open what was submitted, from the journal. Raises: ChainUnavailable, StoreError."""
        made = await self._store.verdict(case.id, case.round)
        mine = next(member for member in case.members if member.validator == self._me)
        if made is None or made.record.digest != mine.submitted:
            self._refused((case.id, Step.REVEAL, case.round), "what was submitted is not in this journal")
            return
        verdict = made.record.verdict
        await self._send((case.id, case.round), Step.REVEAL, lambda: self._court.reveal(verdict), REVEALED)

    async def _prove(self, proof: Proof) -> None:
        """Have an objective fault punished. Somebody else may have been first, and a proof may be bought no second
        time, so a refusal is no error of ours."""
        try:
            await self._court.prove(*self._encode_proof(proof))
        except (ValueError, ChainError) as exc:
            log.info("the fault %r was not taken by the Court: %s", proof.fault.value, exc)
            return
        self.totals.proofs += 1
        log.warning("proved on chain: %s, by node key 0x%s", proof.fault.value, proof.node_key.hex())

    # ---------------------------------------------------------------------------------------- what anybody may send

    async def _anybody(self, key: Digest, step: Step, round_: int, case: CaseRecord | None) -> None:
        """Draw, count or execute when it is our turn. Raises: ChainUnavailable."""
        if not self._auto_draw:
            return
        members = [member.validator for member in case.members] if case is not None else []
        order = members or list(await self._court.validators())
        due = self._due.setdefault((key, step, round_), _Due(self._clock.monotonic()))
        if self._clock.monotonic() - due.since < TURN_S * rank(key, order, self._me):
            return
        act = {Step.DRAW: self._court.draw, Step.CONCLUDE: self._court.conclude, Step.EXECUTE: self._court.execute}
        await self._send((key, round_), step, lambda: act[step](key), COUNTED)

    async def _send(self, seat: tuple[Digest, int], step: Step, act: Callable[[], Awaitable[Mined]], mark: str) -> None:
        """One transaction, unless it was refused a moment ago. Raises: ChainUnavailable."""
        where = (seat[0], step, seat[1])
        due = self._due.setdefault(where, _Due(self._clock.monotonic()))
        if self._clock.monotonic() < due.again:
            return
        try:
            await act()
        except ChainUnavailable:
            raise
        except ChainError as exc:
            self._refused(where, str(exc))
            return
        crash_point(mark)
        due.refused = 0
        self._wake()

    def _refused(self, where: tuple[Digest, Step, int], why: str) -> None:
        """Most likely somebody else did it: look again soon, and tell only what goes on."""
        due = self._due.setdefault(where, _Due(self._clock.monotonic()))
        due.refused += 1
        due.again = self._clock.monotonic() + pause(due.refused)
        level = logging.WARNING if due.refused == REFUSALS_TOLD else logging.DEBUG
        log.log(level, "case 0x%s: %s was refused %d times: %s", where[0].hex()[:8], where[1].value, due.refused, why)


def rank(key: Digest, order: Sequence[Address], me: Address) -> int:
    """Place of `me` in a case's own order of `order`, from 0; whoever is not in it comes last."""
    if me not in order:
        return len(order)
    return (order.index(me) - int.from_bytes(key[:8], "big")) % len(order)
