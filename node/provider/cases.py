"""The provider as the accused: follows its cases, answers for a forced error, appeals a wrong verdict.

An honest provider that is found guilty without having planted anything meets a committee that erred or colluded. It
appeals, once per round, while it may: the next committee is larger, and what it risks is the bond.
"""

from __future__ import annotations

import logging
from typing import Final

from incentives.committee import GUILTY
from incentives.ledger import CommitmentMade
from node.ports import CaseRecord, CaseState, Chain, ChainError, ChainUnavailable, Clock, Court, Store
from protocol.units import AuditOutcome, Digest

log = logging.getLogger("tally.provider.cases")

LOOK_S: Final = 2.0
"""How often the Court's events are read. Unit: s. An answer window is many blocks; doubling it halves the reads."""

LOOK_BACK: Final = 32
"""Commitments whose cases are looked up at a start. Their windows are long over for any before."""

OVER: Final = frozenset({CaseState.CLOSED, CaseState.UNDECIDED})


class Cases:
    """The cases of one provider's commitments. `appeals`: whether to appeal a verdict by itself."""

    def __init__(self, court: Court, chain: Chain, store: Store, clock: Clock, *, appeals: bool) -> None:
        self._court = court
        self._chain = chain
        self._store = store
        self._clock = clock
        self._appeals = appeals
        self._block: int | None = None
        self._live: set[Digest] = set()  # accused and not yet answered for
        self._told: set[tuple[Digest, int, str]] = set()
        self._over: set[Digest] = set()
        self.convicted = 0

    async def run(self) -> None:
        """For ever. Raises: ChainError, StoreError; then call it again."""
        while True:
            await self.look()
            await self._clock.sleep(LOOK_S)

    async def look(self) -> None:
        """Act on whatever stands now. Raises: ChainError, StoreError."""
        if self._block is None:
            block = (await self._chain.head()).number
            self._live = {row.record.key for row in await self._store.commitments(limit=LOOK_BACK)}
        else:
            events, block = await self._court.events(self._block)
            self._live |= {event.case_id for event in events}
        self._block = block
        for key in sorted(self._live):
            row = await self._store.commitment(key)
            if row is None or await self._look_at(row.record):
                self._live.discard(key)

    async def is_over(self, key: Digest) -> bool:
        """Whether nobody can ask for this commitment's transcripts any more. Raises: ChainError."""
        if key not in self._over:
            case = await self._court.case(key)
            if case is not None and case.state in OVER:
                self._over.add(key)
        return key in self._over

    async def _look_at(self, made: CommitmentMade) -> bool:
        """Act on one case; whether nothing is left to do until the Court says something new. Raises: ChainError."""
        case = await self._court.case(made.key)
        if case is None or case.outcome not in GUILTY:
            return True
        if case.state is CaseState.ANSWER:
            return await self._defend(made, case)
        if case.state is CaseState.CLOSED and not case.was_forced and self._first(made.key, -1, "closed"):
            self.convicted += 1
            log.error("case 0x%s is closed: %s, %d wei were slashed", made.key.hex(), case.outcome.name, case.slashed)
        return True

    def _first(self, key: Digest, round_: int, what: str) -> bool:
        """Whether that was not said about the case in this round before."""
        said = (key, round_, what) in self._told
        self._told.add((key, round_, what))
        return not said

    async def _defend(self, made: CommitmentMade, case: CaseRecord) -> bool:
        """Show that the error was forced, or appeal; whether that is done. Raises: ChainUnavailable."""
        try:
            secret = await self._secret_before(made) if any(made.decoy) else None
            # documents and delivery are due of a planted error too, so only improbable tokens are excused by it
            if secret is not None and case.outcome is AuditOutcome.IMPROBABLE:
                await self._court.answer(made.key, secret)
                log.info("case 0x%s: the error was planted because it was due; answered", made.key.hex())
            else:
                await self._unforced(made, case)
        except ChainUnavailable:
            raise
        except ChainError as exc:
            now = await self._court.case(made.key)
            if now is None or (now.state, now.round) != (case.state, case.round):
                return True  # mined all the same, or overtaken
            if self._first(made.key, case.round, str(exc)):
                log.error("case 0x%s: the Court did not take the answer: %s", made.key.hex(), exc)
            return False
        return True

    async def _unforced(self, made: CommitmentMade, case: CaseRecord) -> None:
        """Say what an operator can do, and appeal once in this round. Raises: ChainError."""
        rules = await self._court.rules()
        if self._first(made.key, case.round, "found"):
            seconds = max(0, case.until - await self._court.now())
            log.error(
                "case 0x%s: a committee found %s in epoch %d, and no error was planted there. The stake is slashed in "
                "%d s unless the verdict is appealed. Look at `tally case show`, and check with `tally audit` whether "
                "this machine computes what its profile says",
                made.key.hex(),
                case.outcome.name,
                case.epoch,
                seconds,
            )
        if not self._appeals:
            log.error("provider.appeal is off, so nothing is done about case 0x%s", made.key.hex())
        elif case.round + 1 < len(rules.committees):
            await self._court.appeal(made.key)
            larger = rules.committees[case.round + 1]
            log.warning("appealed to %d members with a bond of %d wei", larger, rules.appeal_bond)
        else:
            log.error("the last committee has spoken on case 0x%s; there is no further appeal", made.key.hex())

    async def _secret_before(self, made: CommitmentMade) -> bytes | None:
        """The secret of the commitment before this one, which decided that it had to hold an error."""
        commitment = made.commitment
        for row in await self._store.commitments(limit=10_000):
            other = row.record.commitment
            same = (other.provider, other.profile_id) == (commitment.provider, commitment.profile_id)
            if same and other.epoch < commitment.epoch:
                return row.record.secret
        return None
