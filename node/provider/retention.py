"""Which content a provider may let go of: nothing that a committee can still ask for.

A job's transcript can be asked for from its commitment until the case about it is over, and only if the beacon drew
the job. A commitment that nobody drew by the time its content should go is drawn by its provider, who is the one to
gain from having it over with.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from incentives.audit_draw import case_key, is_drawn
from node.ports import ChainError, ChainUnavailable, Clock, CommitmentRecord, Court, Store
from node.provider.cases import Cases
from node.provider.epochs import Epochs
from protocol.dossier import unpack_entries
from protocol.units import ZERO_DIGEST, Digest, JobId

log = logging.getLogger("tally.provider.retention")


LOOK_AGAIN_S: Final = 30.0
"""How long what the chain said of one commitment counts. Unit: s. An epoch may hold thousands of jobs, and each is
asked about in every pass of the shredder; a case that ended meanwhile is seen in the next pass."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One commitment at a time: where its jobs stand in the tree, whether its case is over, and what the Court has."""

    at: float
    places: dict[JobId, int]
    over: bool
    record: CommitmentRecord | None


class Retention:
    """Answers for the shredder. `court` None: nobody can ask."""

    def __init__(self, court: Court | None, store: Store, epochs: Epochs, cases: Cases | None, clock: Clock) -> None:
        self._court = court
        self._store = store
        self._epochs = epochs
        self._cases = cases
        self._clock = clock
        self._seen: dict[Digest, _Seen] = {}  # of the commitment asked about last

    async def may_go(self, job_id: JobId) -> bool:
        """Whether no case about the job can ask for its content any more. Raises: ChainError, StoreError."""
        if self._court is None or self._cases is None:
            return True
        job = await self._store.job(job_id)
        if job is None or not self._epochs.is_past(job):
            return False
        profile_id = Digest(job.request.profile_id)
        key = case_key(job.request.provider, profile_id, self._epochs.epoch_of(job.opened_at_ms))
        seen = await self._look(self._court, self._cases, key)
        index = seen.places.get(job_id)
        if index is None or seen.over:  # it had no receipt, or its profile is not judged
            return True
        if seen.record is None or seen.record.beacon == ZERO_DIGEST:
            return False
        return not is_drawn(seen.record.beacon, job_id, seen.record.earlier + index)

    async def _look(self, court: Court, cases: Cases, key: Digest) -> _Seen:
        """What is known of a commitment; one that a block holds and nobody drew is drawn now, once."""
        now = self._clock.monotonic()
        seen = self._seen.get(key)
        if seen is not None and now - seen.at < LOOK_AGAIN_S:
            return seen
        row = await self._store.commitment(key)
        places = {} if row is None else {e.job_id: at for at, e in enumerate(unpack_entries(row.record.entries))}
        over = bool(places) and await cases.is_over(key)
        record = None if over or not places else await court.commitment(key)
        if record is not None and record.beacon == ZERO_DIGEST:
            await self._draw(court, key)
        seen = _Seen(now, places, over, record)
        self._seen = {key: seen}
        return seen

    async def _draw(self, court: Court, key: Digest) -> None:
        try:
            await court.draw(key)
        except ChainUnavailable:
            raise
        except ChainError as exc:
            log.info("commitment 0x%s cannot be drawn yet, so its content stays: %s", key.hex(), exc)
