"""Which content a provider may let go of: nothing that a committee can still ask for.

A job's transcript can be asked for from its commitment until the case about it is over, and only if the beacon drew
the job. A commitment that nobody drew by the time its content should go is drawn by its provider, who is the one to
gain from having it over with.
"""

from __future__ import annotations

import logging

from incentives.audit_draw import case_key, is_drawn
from node.ports import ChainError, ChainUnavailable, Court, Store
from node.provider.cases import Cases
from node.provider.epochs import Epochs
from protocol.dossier import unpack_entries
from protocol.units import ZERO_DIGEST, Digest, JobId

log = logging.getLogger("tally.provider.retention")


class Retention:
    """Answers for the shredder. `court` None: nobody can ask."""

    def __init__(self, court: Court | None, store: Store, epochs: Epochs, cases: Cases | None) -> None:
        self._court = court
        self._store = store
        self._epochs = epochs
        self._cases = cases
        self._places: tuple[Digest, dict[JobId, int]] = (ZERO_DIGEST, {})  # of the commitment asked about last

    async def may_go(self, job_id: JobId) -> bool:
        """Whether no case about the job can ask for its content any more. Raises: ChainError, StoreError."""
        if self._court is None or self._cases is None:
            return True
        job = await self._store.job(job_id)
        if job is None or not self._epochs.is_past(job):
            return False
        profile_id = Digest(job.request.profile_id)
        key = case_key(job.request.provider, profile_id, self._epochs.epoch_of(job.opened_at_ms))
        row = await self._store.commitment(key)
        if row is None:
            return True  # nothing was committed: an epoch without receipts, or a profile that is not judged
        if self._places[0] != key:
            self._places = key, {entry.job_id: at for at, entry in enumerate(unpack_entries(row.record.entries))}
        index = self._places[1].get(job_id)
        if index is None or await self._cases.is_over(key):
            return True
        record = await self._court.commitment(key)
        if record is None:
            return False  # not in a block yet
        if record.beacon == ZERO_DIGEST:
            await self._draw(self._court, key)
            return False
        return not is_drawn(record.beacon, job_id, record.earlier + index)

    async def _draw(self, court: Court, key: Digest) -> None:
        try:
            await court.draw(key)
        except ChainUnavailable:
            raise
        except ChainError as exc:
            log.info("commitment 0x%s cannot be drawn yet, so its content stays: %s", key.hex(), exc)
