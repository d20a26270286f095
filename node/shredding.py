"""Kept content goes when its time is over, in either role: the keys are destroyed, the bills stay."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from incentives.ledger import ContentShredded, Role
from node.ports import Clock, Store
from protocol.units import JobId

log = logging.getLogger("tally.shredding")

LOOK_S: Final = 60.0
"""How often it is looked whether something's time is over. Unit: s. Retention is stated in hours."""

BATCH: Final = 64
"""Jobs shredded in one write. Each costs two deletes; a larger batch would keep vouchers waiting longer."""

MAX_DUE: Final = 10_000
"""Jobs looked at in one pass; those that may not go yet stay among them, oldest first."""

_HOUR_MS: Final = 3_600_000


class Shredder:
    """`hours`: how long content is kept from its job's acceptance. `may_go`: asked for each job whose time is over."""

    def __init__(
        self,
        role: Role,
        hours: int,
        store: Store,
        clock: Clock,
        may_go: Callable[[JobId], Awaitable[bool]] | None = None,
    ) -> None:
        self._role = role
        self._hours = hours
        self._store = store
        self._clock = clock
        self._may_go = may_go
        self.shredded = 0

    async def run(self) -> None:
        """For ever. Raises: StoreError, and what `may_go` raises; then call it again."""
        while True:
            await self.shred_due()
            await self._clock.sleep(LOOK_S)

    async def shred_due(self) -> int:
        """One pass; how many jobs' content went. Raises: StoreError, and what `may_go` raises."""
        # SPEC 8.9: Content is shredded once its retention is over and no case about its job can ask for it
        before = self._clock.now_ms() - self._hours * _HOUR_MS
        due = await self._store.kept_before(self._role, before, MAX_DUE)
        if not due:
            return 0
        running = {job.job_id for job in await self._store.jobs(self._role, open_only=True, limit=MAX_DUE)}
        going = []
        for job_id in due:
            if job_id not in running and (self._may_go is None or await self._may_go(job_id)):
                going.append(ContentShredded(self._role, job_id))
        for at in range(0, len(going), BATCH):
            await self._store.write(*going[at : at + BATCH])
        self.shredded += len(going)
        if going:
            log.info("shredded the content of %d jobs; their receipts stay", len(going))
        return len(going)
