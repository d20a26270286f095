"""Whether the stake is worth what stands open behind it: looked up, warned about, and settled for in time.

A provider could cheat for whatever it has earned and no committee has judged yet. Clients therefore buy no more of it
than a third of its stake covers (incentives/exposure.py); an honest one settles before that, and knows what to stake.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from incentives.audit_draw import AUDIT_FLOOR_BPS
from incentives.exposure import needed_stake, stake_for, unsettled_cap
from node.ports import Chain, Clock, CourtRules, Store
from node.provider.books import Books
from node.provider.settler import Settler
from protocol.units import Address, Wei

log = logging.getLogger("tally.provider.staking")

LOOK_S: Final = 30.0
"""How often stake and open value are compared. Unit: s. A channel fills up over minutes."""

DETECTION_BPS: Final = 2_500
"""Audits of a cheated job that lead to a verdict, of 10^4: of int8 weights sold as bf16, the slowest to be condemned
(incentives/README.md, "Stake"). Whatever saves more is found sooner, so half of it would double the stake for nothing
but doubt about the calibration."""

WINDOWS: Final = 2
"""Epochs before a case begins that a cheat serves on in: the one it is found in, and the one committed meanwhile."""


class Staking:
    """What the stake is, what it should be, and how much may stand open behind it. All in wei."""

    def __init__(
        self,
        wallet: Address,
        books: Books,
        settler: Settler,
        store: Store,
        chain: Chain,
        clock: Clock,
        rules: Callable[[], CourtRules | None],
    ) -> None:
        """`rules`: the Court's, None while they are not known."""
        self._wallet = wallet
        self._books = books
        self._settler = settler
        self._store = store
        self._chain = chain
        self._clock = clock
        self._rules = rules
        self._warned = Wei(0)
        self.stake: Wei | None = None
        self.needed = Wei(0)

    async def run(self) -> None:
        """For ever. Raises: ChainError, StoreError; then call it again."""
        while True:
            await self.look()
            await self._clock.sleep(LOOK_S)

    @property
    def unsettled(self) -> Wei:
        """Vouched for and not claimed, over all channels."""
        return Wei(sum(max(0, channel.unclaimed) for channel, _ in self._books.channels()))

    async def look(self) -> None:
        """Compare, warn when it became worse, have it settled. Raises: ChainError, StoreError."""
        record = await self._chain.provider(self._wallet)
        self.stake = Wei(0) if record is None else record.stake
        self._settler.cap = cap = unsettled_cap(self.stake)
        unsettled = self.unsettled
        self.needed = Wei(max(stake_for(unsettled), await self._against_cheating()))
        if self.needed > self.stake and self.needed > self._warned:
            log.warning(
                "the stake of %d wei is below the %d wei that this provider's prices and unsettled work call for: "
                "clients buy no more than %d wei ahead of settlement. Raise provider.stake, or settle more often "
                "(provider.settle_value)",
                self.stake,
                self.needed,
                cap,
            )
            self._warned = self.needed
        if unsettled >= cap:
            self._settler.wake()

    async def _against_cheating(self) -> Wei:
        """Stake under which cheating in every job loses, if all of a job's price were gained by it."""
        rules = self._rules()
        made = [row.record.commitment for row in await self._store.commitments(limit=8)]
        jobs = sum(commitment.count for commitment in made)
        if not jobs or rules is None:
            return Wei(0)
        gain = Wei(-(-sum(commitment.total for commitment in made) // jobs))
        served_s = (max(c.epoch for c in made) - min(c.epoch for c in made) + 1) * rules.epoch_seconds
        verdict_s = WINDOWS * rules.epoch_seconds + rules.submit_window + rules.reveal_window + rules.answer_window
        return needed_stake(gain, AUDIT_FLOOR_BPS, DETECTION_BPS, -(-jobs * verdict_s // served_s))

    def status(self) -> dict[str, object]:
        """Plain JSON values; amounts as decimal strings of wei."""
        known = self.stake is not None
        return {
            "stake_wei": str(self.stake) if known else "",
            "stake_needed_wei": str(self.needed),
            "unsettled_cap_wei": str(self._settler.cap) if known else "",
            "stake_covers": not known or self.needed <= (self.stake or 0),
        }
