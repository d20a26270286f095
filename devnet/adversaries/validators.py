"""Validators that want the credit without the work, or a verdict of their choosing. Otherwise the node's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from devnet.adversaries.standing_in import stand_in
from incentives.audit_draw import GAPS, pack_gaps
from incentives.committee import Step
from incentives.verdicts import JobFinding
from node.ports import CaseRecord, CommitmentRecord
from node.validator.audit import Auditor, Docket, Looked
from node.validator.cases import REVEALED, SUBMITTED, Cases
from protocol.units import ZERO_DIGEST, AuditOutcome, Digest, JobId

TOKENS: Final = 1_000
"""Output tokens that an invented finding claims to have looked at."""

GAP_MEAN_MILLI: Final = 1_500
"""Mean of invented gaps. Unit: thousandths of a logit. About the demo model's, which anybody can learn."""

_dice = random.SystemRandom()


def invented(outcome: AuditOutcome, rng: random.Random = _dice) -> Looked:
    """A finding that holds together in itself, over gaps that nobody measured."""
    guilty = outcome is AuditOutcome.IMPROBABLE
    finding = JobFinding(
        JobId(ZERO_DIGEST), outcome, TOKENS, TOKENS // 4 if guilty else 0, TOKENS // 20 if guilty else 0
    )
    gaps: Sequence[int] = [round(rng.expovariate(1 / GAP_MEAN_MILLI)) for _ in range(GAPS)]
    return Looked((finding,), pack_gaps(gaps), ())


class RubberStamping(Auditor):
    """Passes everything unseen."""

    async def look(self, _: Docket) -> Looked:
        """Nothing is fetched and nothing is run."""
        return invented(AuditOutcome.PASS)


class Tossing(Auditor):
    """Tosses a coin."""

    async def look(self, _: Docket) -> Looked:
        """Nothing is fetched and nothing is run."""
        return invented(_dice.choice((AuditOutcome.PASS, AuditOutcome.IMPROBABLE)))


class Colluding(Auditor):
    """Runs the model, so that its gaps are right, and turns the outcome round."""

    async def look(self, docket: Docket) -> Looked:
        """What was found, reversed."""
        found = await super().look(docket)
        guilty = any(item.outcome is not AuditOutcome.PASS for item in found.findings)
        turned = invented(AuditOutcome.PASS if guilty else AuditOutcome.IMPROBABLE)
        return Looked(turned.findings, found.gaps, ())


class Copying(Cases):
    """Waits for somebody else's digest and submits it, then reveals that verdict under its own name."""

    async def _submit(self, _: CommitmentRecord, case: CaseRecord) -> None:
        digest = _other(self, case)
        if digest is not None:
            await self._send((case.id, case.round), Step.SUBMIT, lambda: self._court.submit(case.id, digest), SUBMITTED)

    async def _reveal(self, case: CaseRecord) -> None:
        shown = next((member.verdict for member in case.members if member.verdict is not None), None)
        if shown is not None:
            ours = replace(shown, validator=self._me)
            await self._send((case.id, case.round), Step.REVEAL, lambda: self._court.reveal(ours), REVEALED)


def _other(cases: Copying, case: CaseRecord) -> Digest | None:
    """A digest that another member submitted; None while nobody has."""
    others = (member.submitted for member in case.members if member.validator != cases._me)
    return next((digest for digest in others if digest != ZERO_DIGEST), None)


def _audit_as(auditor: type[Auditor]) -> None:
    stand_in("node.validator.audit", "Auditor", auditor)


def rubber_stamp() -> None:
    """Have this process pass everything."""
    _audit_as(RubberStamping)


def toss() -> None:
    """Have this process vote at random."""
    _audit_as(Tossing)


def collude() -> None:
    """Have this process vote against what it finds."""
    _audit_as(Colluding)


def copy() -> None:
    """Have this process copy."""
    stand_in("node.validator.cases", "Cases", Copying)
