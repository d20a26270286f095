"""Rights to capacity, as the provider honours them: whose they are is the chain's word, how fast they are used is ours.

Contract: a job under a right is admitted only if the right is this provider's own, for this profile, running now, and
assigned to the job's session key at a confirmed block; and no faster than its rate (incentives/reservation.py).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Final

from incentives.reservation import Bucket, RateExceeded
from node.ports import Chain, ChainError, ReservationRecord
from protocol.errors import Refused
from protocol.frames import RefusalCode
from protocol.units import Address, Digest

log = logging.getLogger("tally.provider.reservations")

MEMORY_MS: Final = 30_000
"""How long the chain's word on a right is believed. Unit: ms. A transferred right serves its former holder's key no
longer than this; doubling it halves the reads a busy right costs."""

DENIED_MS: Final = 10_000
"""How long an id that is no right of ours is refused without asking again. Unit: ms. A right bought a moment ago is
confirmed within it."""

MAX_DENIED: Final = 4_096
"""Ids remembered that are no right of ours. Unit: ids, about 150 bytes each. Strangers make these up, so the oldest are
forgotten first; rights that we did sell are bounded by what we sold, and are forgotten when they end."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A right of ours as the chain had it at `at_ms`, and its use so far."""

    record: ReservationRecord
    at_ms: int
    bucket: Bucket


class Reservations:
    """The rights that one provider wallet sold for one profile."""

    def __init__(self, wallet: Address, profile_id: Digest, chain: Chain) -> None:
        self._wallet, self._profile_id, self._chain = wallet, profile_id, chain
        self._known: dict[Digest, _Known] = {}
        self._denied: dict[Digest, int] = {}  # id -> when it was looked up, Unix ms; oldest first

    async def check(self, reservation: Digest, client: Address, ste_micro: int, now_ms: int) -> None:
        """Let a job of at most `ste_micro` run under the right, or refuse it. Ask last: an unknown id costs a read.

        `client`: the session key that signed the job. `now_ms`: Unix ms. Raises: Refused.
        """
        known = await self._look_up(reservation, now_ms)
        if known is None:
            raise Refused(RefusalCode.BAD_REQUEST, "there is no such reservation of this provider's for this model")
        record = known.record
        if record.session != client:
            reason = "the reservation is not assigned to this session key; its holder can: tally reservation assign"
            raise Refused(RefusalCode.BAD_REQUEST, reason)
        if not record.start <= now_ms // 1000 < record.end:
            reason = f"the reservation runs from {record.start} to {record.end}, now is {now_ms // 1000} (Unix s)"
            raise Refused(RefusalCode.BAD_REQUEST, reason)
        try:
            self._known[reservation] = replace(known, bucket=known.bucket.take(ste_micro, now_ms))
        except RateExceeded as exc:
            raise Refused(RefusalCode.BUSY, str(exc)) from exc

    def give_back(self, reservation: Digest, ste_micro: int, now_ms: int) -> None:
        """A job that `check` let in ended `ste_micro` below what it might have come to."""
        known = self._known.get(reservation)
        if known is not None:
            self._known[reservation] = replace(known, bucket=known.bucket.give_back(ste_micro, now_ms))

    async def _look_up(self, reservation: Digest, now_ms: int) -> _Known | None:
        """The chain's word, at most MEMORY_MS old; older while the chain does not answer, since it was confirmed.

        Raises: Refused when it was never confirmed and the chain does not answer.
        """
        known, denied_at = self._known.get(reservation), self._denied.get(reservation)
        if known is not None and now_ms - known.at_ms < MEMORY_MS:
            return known
        if denied_at is not None and now_ms - denied_at < DENIED_MS:
            return None
        try:
            record = await self._chain.reservation(reservation)
        except ChainError as exc:
            log.warning("reservation 0x%s cannot be looked up: %s", reservation.hex(), exc)
            known = self._known.get(reservation)
            if known is None:
                reason = "the chain does not answer, so the reservation cannot be looked up; try again, or without it"
                raise Refused(RefusalCode.BUSY, reason) from exc
            return known
        if record is None or (record.provider, record.profile_id) != (self._wallet, self._profile_id):
            self._deny(reservation, now_ms)
            return None
        return self._learn(record, now_ms)

    def _learn(self, record: ReservationRecord, now_ms: int) -> _Known:
        """What other jobs took meanwhile stays taken. Rights that are over are forgotten."""
        before = self._known.get(record.id)
        bucket = before.bucket if before is not None else Bucket.full(record.rate, now_ms)
        alive = {right: known for right, known in self._known.items() if now_ms // 1000 < known.record.end}
        self._known = alive | {record.id: _Known(record, now_ms, bucket)}
        return self._known[record.id]

    def _deny(self, reservation: Digest, now_ms: int) -> None:
        self._known.pop(reservation, None)
        self._denied.pop(reservation, None)
        self._denied[reservation] = now_ms
        if len(self._denied) > MAX_DENIED:
            del self._denied[next(iter(self._denied))]
